"""One token's program computes what the batch computes, whatever the threads; and counts the rows that it reads."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hybrid_kernels.activation import activate
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.team import Team
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kernels import needed_kernels
from hybrid_runtime.model.kv_cache import KvCache

from . import published_models as models
from .tiny_models import load, random_tensors, random_tokens, write_folder

TOKENS = random_tokens(models.VOCAB)
NUM_PROMPT = 40
Q4, Q8, F32 = RowFormat("q4", 32), RowFormat("q8", 32), RowFormat("f32")
MODELS = {
    "llama": (models.SPARSE_LLAMA | {"model_type": "llama", "hidden_act": "silu"}, models.dense_tensors),
    "prosparse": (models.SPARSE_LLAMA, models.dense_tensors),
    "sparse-qwen2": (models.SPARSE_QWEN2, lambda: models.dense_tensors(qkv_bias=True)),
    "turbosparse-mistral": (models.TURBOSPARSE_MISTRAL, lambda: models.dense_tensors(models.RANKS, shift=0.4, seed=3)),
    "turbosparse-mixtral": (
        models.TURBOSPARSE_MIXTRAL,
        lambda: models.turbosparse_mixtral_tensors(shift=0.4, seed=3),
    ),
    "smallthinker": (models.SMALLTHINKER, models.smallthinker_tensors),
}
# Of the logits' norm. Both round activations to int8 for q8 and q4, but the batch also rounds down rows along columns,
# and the token q4's factors (sparse_ffn/reference.py, simd/int8_add.py): half a percent a layer's FFN, three layers.
TOLERANCES = {"f32": 1e-4, "bf16": 1e-4, "q8": 0.03, "q4": 0.04}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each model in each format, made when first asked for."""
    made = {}

    def find(name, row_format):
        key = (name, str(row_format))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            config, make = MODELS[name]
            options = {"ffn_activation": "drelu"} if name == "sparse-qwen2" else {}
            original = write_folder(folder / "original", config, make())
            made[key] = load(original, folder / "store", row_format, **options)
        return made[key]

    return find


def decoder_of(model, team, mode=None, weights=None):
    return Decoder(model.config, weights or model.weights, choose_predictor_mode(model.config, mode), team)


def by_steps(decoder, tokens, *, num_prompt=0, dtype="f32"):
    """Logits of the tokens after the first num_prompt, which are computed at once."""
    cache = KvCache(decoder.config, len(tokens), dtype)
    if num_prompt:
        decoder.forward(tokens[:num_prompt], cache)
    return torch.cat([decoder.forward(token.view(1), cache) for token in tokens[num_prompt:]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row_format", [F32, RowFormat("bf16"), Q8, Q4], ids=str)
def test_token_by_token_is_the_batch(loaded, team, name, row_format):
    model = loaded(name, row_format)
    for mode in ("off", *(["mask"] if model.config.predictor_input else [])):
        decoder = decoder_of(model, team, mode)
        whole = decoder.forward(TOKENS, KvCache(model.config, len(TOKENS), "f32"), all_logits=True)
        for num_prompt in (0, NUM_PROMPT):
            difference = (by_steps(decoder, TOKENS, num_prompt=num_prompt) - whole[num_prompt:]).norm(dim=1)
            limit = TOLERANCES[row_format.kind] * whole[num_prompt:].norm(dim=1)
            if row_format.is_quantized:  # where a token goes to another expert or a neuron to sleep, it moves by more
                assert difference.median() <= limit.median(), mode
                assert (difference > 2 * limit).double().mean() <= 0.2, mode
            else:
                assert (difference <= limit).all(), mode


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row_format", [F32, Q4], ids=str)
def test_logits_do_not_depend_on_the_number_of_threads(loaded, team, name, row_format):
    model, expected = loaded(name, row_format), None
    for num_threads in (1, 2, 4, 7):
        own = Team(num_threads, team.library)
        found = by_steps(decoder_of(model, own), TOKENS, num_prompt=NUM_PROMPT)
        own.close()
        expected = found if expected is None else expected
        assert torch.equal(found, expected), num_threads


def test_a_token_needs_no_kernel_that_is_not_prepared_before(loaded, team):
    for name in MODELS:
        for row_format in (F32, Q4):
            model = loaded(name, row_format)
            prepared = needed_kernels(model.config, model.store.manifest.quantization)
            for mode in ("off", *(["mask"] if model.config.predictor_input else [])):
                decoder = decoder_of(model, team, mode)
                program = decoder._program(KvCache(model.config, 4, "f32")).program
                assert {each.kernel for each in program.operations} <= prepared


def test_experts_may_have_predictors_of_different_ranks(tmp_path, team):
    """Real checkpoints differ from layer to layer; nothing says that experts do not."""
    tensors = models.turbosparse_mixtral_tensors(shift=0.4, seed=3)
    for expert_idx, rank in enumerate((2, 7, 5, 130, 1)):
        for layer_idx in range(models.LAYERS):
            name = f"model.layers.{layer_idx}.block_sparse_moe.experts.{expert_idx}.predictor"
            shapes = {f"{name}.fc1.weight": (rank, models.HIDDEN), f"{name}.fc2.weight": (models.INTER, rank)}
            tensors |= random_tensors(shapes, seed=expert_idx)
    folder = write_folder(tmp_path / "original", models.TURBOSPARSE_MIXTRAL, tensors)
    for row_format in (F32, Q4):
        model = load(folder, tmp_path / str(row_format).replace(" ", ""), row_format)
        decoder = decoder_of(model, team, "mask")
        whole = decoder.forward(TOKENS, KvCache(model.config, len(TOKENS), "f32"), all_logits=True)
        difference = (by_steps(decoder, TOKENS) - whole).norm(dim=1)
        assert difference.median() <= TOLERANCES[row_format.kind] * whole.norm(dim=1).median()


def rows_of_a_token(monkeypatch, decoder, tokens):
    """Gate, up and down rows that the last token needs, counted in a batch's own forward, where tokens are alone."""
    from hybrid_runtime.model import decoder as module  # noqa: PLC0415

    counts = [0, 0, 0]

    def counting(x, bundles, activation, active=None, *, team, observe=None):
        gate = module.linear(x[-1:], bundles.gate_proj, bundles.gate_bias, team=team)[0] if bundles.has_gate else None
        up = module.linear(x[-1:], bundles.up_proj, bundles.up_bias, team=team)[0]
        among = torch.ones(len(up), dtype=torch.bool) if active is None else active[-1]
        fires = gate > activation.threshold if activation.gate_decides else torch.ones(len(up), dtype=torch.bool)
        counts[0] += int(among.sum()) if gate is not None else 0
        counts[1] += int((among & fires).sum())
        counts[2] += int((among & fires & (activate(activation, gate, up) != 0)).sum())
        return found(x, bundles, activation, active, team=team)

    found = module.sparse_ffn
    monkeypatch.setattr(module, "sparse_ffn", counting)
    # every expert sees its tokens in order, so the last token is the last of each expert that it goes to: alone it is
    # the only one
    cache = KvCache(decoder.config, len(tokens), "f32")
    for token in tokens[:-1]:
        decoder.forward(token.view(1), cache)
    counts[:] = 0, 0, 0
    x = decoder._embed(tokens[-1:], torch.tensor([cache.length]))
    rotation = decoder._rotation(cache.length + 1)
    for layer_idx, layer in enumerate(decoder.weights.layers):
        x = decoder._layer(layer_idx, layer, x, torch.tensor([cache.length]), rotation, cache, None)
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_counted_rows_are_those_that_the_token_needs(loaded, team, monkeypatch, name):
    model = loaded(name, F32)
    for mode in ("off", *(["mask"] if model.config.predictor_input else [])):
        decoder = decoder_of(model, team, mode)
        cache = KvCache(model.config, 6, "f32")
        for token in TOKENS[:5]:
            decoder.forward(token.view(1), cache)
        decoder.counters.reset()
        assert (decoder.counters.gate_rows, decoder.counters.up_rows, decoder.counters.down_rows) == (0, 0, 0)
        decoder.forward(TOKENS[5:6], cache)
        counters = decoder.counters
        found = [counters.gate_rows, counters.up_rows, counters.down_rows]
        with monkeypatch.context() as patch:
            assert found == rows_of_a_token(patch, decoder_of(model, team, mode), TOKENS[:6])
        assert counters.active_neurons == (max(found[:2]) if mode == "mask" else found[1])
        assert 0 < counters.kernel_s < 10


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_prompts_last_token_alone_gives_the_same_cache(loaded, team, dtype):
    model = loaded("llama", F32)
    decoder = decoder_of(model, team)
    together, apart = KvCache(model.config, 8, dtype), KvCache(model.config, 8, dtype)
    decoder.forward(TOKENS[:6], together)
    decoder.forward(TOKENS[:5], apart)
    decoder.forward(TOKENS[5:6], apart)
    assert together.length == apart.length == 6
    for name in ("keys", "values"):
        first, second = (getattr(cache, name)[:, :6].float() for cache in (together, apart))
        torch.testing.assert_close(first, second, rtol=2e-3 if dtype == "f16" else 0, atol=2e-5)


def test_a_decoder_serves_several_caches(loaded, team):
    model = loaded("turbosparse-mixtral", F32)
    decoder = decoder_of(model, team, "mask")
    caches = [KvCache(model.config, 8, "f32") for _ in range(2)]
    expected = by_steps(decoder_of(model, team, "mask"), TOKENS[:4])
    for idx in range(4):
        for cache in caches:
            assert torch.equal(decoder.forward(TOKENS[idx : idx + 1], cache)[0], expected[idx])
    assert len(decoder._programs) == 2


def test_a_program_goes_when_its_cache_does(loaded, team):
    model = loaded("llama", F32)
    decoder, cache = decoder_of(model, team), KvCache(model.config, 4, "f32")
    decoder.forward(TOKENS[:1], cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert len(decoder._programs) == 0


def test_a_step_leaves_the_logits_of_the_one_before_alone(loaded, team):
    model = loaded("llama", F32)
    decoder, cache = decoder_of(model, team), KvCache(model.config, 4, "f32")
    first = decoder.forward(TOKENS[:1], cache)
    kept = first.clone()
    decoder.forward(TOKENS[1:2], cache)
    assert torch.equal(first, kept)


def test_biases_of_experts_are_chosen_with_them(loaded, team):
    """No family has them yet, but the kernel adds each chosen expert's own, times its weight."""
    model = loaded("smallthinker", F32)
    generator = torch.Generator().manual_seed(5)
    layers = []
    for layer in model.weights.layers:
        experts = [
            replace(ffn, bundles=replace(ffn.bundles, down_bias=torch.randn(models.HIDDEN, generator=generator)))
            for ffn in layer.experts
        ]
        layers.append(replace(layer, experts=tuple(experts)))
    weights = replace(model.weights, layers=tuple(layers))
    decoder = decoder_of(model, team, weights=weights)
    whole = decoder.forward(TOKENS, KvCache(model.config, len(TOKENS), "f32"), all_logits=True)
    torch.testing.assert_close(by_steps(decoder, TOKENS), whole, rtol=0, atol=1e-4)
