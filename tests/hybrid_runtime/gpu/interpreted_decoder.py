"""A model on a GPU and in RAM at once, its kernels in Triton's interpreter, beside one that is in one memory.

test_interpreted.py runs this file in its own process, and test_on_gpu.py on a GPU (HYBRID_TEST_DEVICE=cuda:0). The
models' sizes are changed to what tensor cores multiply.
"""

import os
import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_kernels.attention import gpu as attention_gpu
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.team import Team
from hybrid_kernels.tiers.layout import RAM
from hybrid_runtime.errors import UsageError
from hybrid_runtime.gpu.decoder import GpuDecoder
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.steps import WARM_UPS, Steps
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.weights import tiered_weights
from hybrid_runtime.tiers.disk_cache import DiskCache
from hybrid_runtime.tiers.load import load_tiered
from hybrid_runtime.tiers.tiering import Tiering
from tests.hybrid_runtime.model import published_models as models
from tests.hybrid_runtime.model.tiny_models import load, random_tokens, write_folder
from tests.hybrid_runtime.tiers.tiered_models import MERGES, plan_of, random_tiers

DEVICE = torch.device(os.environ.get("HYBRID_TEST_DEVICE", "cpu"))  # cuda:0, as find_device names it
IS_CUDA = DEVICE.type == "cuda"
if not IS_CUDA:
    attention_gpu.NUM_SPLITS = 2  # the interpreter takes milliseconds for each
models.HIDDEN, models.HEADS, models.HEAD_DIM = 64, 4, 16
SIZES = {"hidden_size": 64, "num_attention_heads": 4}
MODELS = {
    "llama": (models.SPARSE_LLAMA | {"model_type": "llama", "hidden_act": "silu"}, models.dense_tensors),
    "sparse-qwen2": (models.SPARSE_QWEN2, lambda: models.dense_tensors(qkv_bias=True)),
    "turbosparse-mistral": (models.TURBOSPARSE_MISTRAL, lambda: models.dense_tensors(models.RANKS, shift=0.4, seed=3)),
    "turbosparse-mixtral": (
        models.TURBOSPARSE_MIXTRAL,
        lambda: models.turbosparse_mixtral_tensors(shift=0.4, seed=3),
    ),
    "smallthinker": (models.SMALLTHINKER | {"head_dim": 16}, lambda: models.smallthinker_tensors(head_dim=16)),
}
# The GPU rounds activations to float16 and the CPU to int8, and a neuron near the predictor's threshold may fall to
# either side, which one token of a tiny model shows: f32, which rounds nothing, is what tells right from wrong.
EXACT, TYPICAL, WORST = (1e-4 if not IS_CUDA else 2e-3), 0.05, 0.3  # tf32 has ten bits
FORMATS = [RowFormat("f32"), RowFormat("q8", 32), RowFormat("q4", 32)]
NUM_PROMPT = 4
TOKENS = random_tokens(models.VOCAB)[: NUM_PROMPT + (2 if not IS_CUDA else 3 + 2 * WARM_UPS)]  # the last are replayed
ALL = frozenset(range(models.LAYERS))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    made = {}

    def find(name, row_format):
        key = (name, str(row_format))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            config, make = MODELS[name]
            options = {"ffn_activation": "drelu"} if name == "sparse-qwen2" else {}
            original = write_folder(folder / "original", config | SIZES, make())
            made[key] = load(original, folder / "store", row_format, **options)
        return made[key]

    return find


@pytest.fixture(scope="module")
def team():
    return Team(2)


def gpu_decoder(model, team, merges, tiers, led, *, has_head=True, crossing_tokens=32):
    """led: layers whose attention, cache and predictors are on the GPU."""
    manifest, config = model.store.manifest, model.config
    parts = frozenset({"head"}) if has_head else frozenset()
    plan = plan_of(manifest, merges, tiers, led=led, gpu_parts=parts)
    weights = load_tiered(model.store, plan, tiers, DEVICE if IS_CUDA else None)
    most = max(1, config.num_experts_per_tok) * config.intermediate_size
    cache = DiskCache(most + 1, weights.networks[0][0].bundle_bytes, most)
    mode = choose_predictor_mode(config, None)
    spread = tiered_weights(config, weights, Tiering(plan, cache, weights.gpu_bytes))
    return GpuDecoder(config, spread, mode, team, GpuDevice(DEVICE), crossing_tokens=crossing_tokens)


def logits_of(decoder, dtype="f32"):
    """After the prompt, as one batch, and after each token that follows."""
    cache = KvCache(decoder.config, len(TOKENS), dtype)
    prompt = decoder.forward(TOKENS[:NUM_PROMPT], cache, all_logits=True)
    return torch.cat([prompt, *(decoder.forward(token.view(1), cache) for token in TOKENS[NUM_PROMPT:])])


def assert_same(found, expected, row_format):
    difference = (found - expected).norm(dim=1) / expected.norm(dim=1)
    if row_format.is_quantized:
        assert difference.median() <= TYPICAL
        assert difference.max() <= WORST
    else:
        assert difference.max() <= EXACT


def one_memory(model, team):
    return Decoder(model.config, model.weights, choose_predictor_mode(model.config, None), team)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("led", [ALL, frozenset()], ids=["led by the GPU", "led by the CPU"])
@pytest.mark.parametrize("name", ["turbosparse-mistral", "turbosparse-mixtral"])
def test_every_merge_point_on_either_side(loaded, team, merge, led, name):
    row_format = RowFormat("f32")
    model = loaded(name, row_format)
    merges, tiers = random_tiers(model.store.manifest, 5, (merge,))
    decoder = gpu_decoder(model, team, merges, tiers, led)
    assert_same(logits_of(decoder), logits_of(one_memory(model, team)), row_format)


@pytest.mark.parametrize("seed", range(15))
def test_any_split_is_the_whole(loaded, team, seed):
    chance = random.Random(seed)
    name, row_format = list(MODELS)[seed % len(MODELS)], FORMATS[seed // len(MODELS)]
    model = loaded(name, row_format)
    merges, tiers = random_tiers(model.store.manifest, seed)
    led = frozenset(chance.sample(sorted(ALL), chance.randrange(len(ALL) + 1)))
    options = {"has_head": chance.random() < 0.5, "crossing_tokens": chance.choice((2, 32))}
    decoder = gpu_decoder(model, team, merges, tiers, led, **options)
    dtype = chance.choice(("f32", "f16"))
    found = logits_of(decoder, dtype)
    assert_same(found, logits_of(one_memory(model, team), dtype), row_format)
    assert torch.equal(logits_of(decoder, dtype), found), "two runs are the same bits"


@pytest.mark.parametrize("crossing_tokens", [2, 32], ids=["cold neurons come to the GPU", "cold neurons stay"])
def test_long_prompts(loaded, team, crossing_tokens):
    row_format = RowFormat("q8", 32)
    model = loaded("turbosparse-mixtral", row_format)
    merges, tiers = random_tiers(model.store.manifest, 1, ("output",))
    decoder = gpu_decoder(model, team, merges, tiers, ALL, crossing_tokens=crossing_tokens)
    tokens = random_tokens(models.VOCAB)
    assert len(tokens) < 64
    tokens = torch.cat([tokens, tokens])[:70]  # more than one product of few vectors takes
    expected = one_memory(model, team).forward(tokens, KvCache(model.config, 70, "f16"), all_logits=True)
    found = decoder.forward(tokens, KvCache(model.config, 70, "f16"), all_logits=True)
    assert_same(found, expected, row_format)


def test_steps_wait_once_for_either_side_of_a_layer(loaded, team):
    model = loaded("turbosparse-mistral", RowFormat("f32"))
    merges, tiers = random_tiers(model.store.manifest, 5, ("output",))
    decoder = gpu_decoder(model, team, merges, tiers, ALL)
    cache = KvCache(model.config, 4, "f32")
    decoder.forward(TOKENS[:1], cache)
    steps = decoder.program_of(cache)
    assert isinstance(steps, Steps)
    a_layer = ["launches", "mark", "launches", "wait for the GPU", "CPU"]
    assert steps.labels() == ["launches", "CPU", "host", *a_layer * len(ALL), "launches", "mark", "wait for the GPU"]
    assert [label for label, _, _ in steps.timeline()] == steps.labels()
    assert set(steps.ticks_by_label()) == set(steps.labels())


def test_cache_in_ram_stays_untouched_where_the_gpu_leads(loaded, team):
    model = loaded("turbosparse-mistral", RowFormat("f32"))
    merges, tiers = random_tiers(model.store.manifest, 5, ("gpu",))
    decoder = gpu_decoder(model, team, merges, tiers, frozenset({0, 2}))
    cache = KvCache(model.config, 4, "f32")
    cache.keys.fill_(-7.0)
    decoder.forward(TOKENS[:1], cache)
    assert (cache.keys[[0, 2]] == -7.0).all()
    assert (cache.keys[1, 0] != -7.0).all()


def test_heads_that_no_kernel_computes_are_refused(loaded, team):
    model = loaded("llama", RowFormat("f32"))
    merges, tiers = ["none"] * models.LAYERS, [torch.full((1, models.INTER), RAM, dtype=torch.uint8)] * models.LAYERS
    decoder = gpu_decoder(model, team, merges, tiers, ALL)
    config = replace(model.config, head_dim=24)
    with pytest.raises(UsageError, match=r"head_dim is 24, and the GPU's kernels compute powers of two"):
        GpuDecoder(config, decoder.weights, "off", team, GpuDevice(DEVICE))


class NoValuesForTheHost(TorchDispatchMode):
    """Raises where something asks the device for a value, which no recorded graph can."""

    ASKING = frozenset(
        {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.ASKING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("led", [ALL, frozenset()], ids=["led by the GPU", "led by the CPU"])
def test_launches_ask_for_no_value(loaded, team, merge, led, monkeypatch):
    launch = Steps.launch

    def launch_watched(steps, work):
        def watched():
            with NoValuesForTheHost():
                work()

        launch(steps, watched)

    monkeypatch.setattr(Steps, "launch", launch_watched)
    model = loaded("turbosparse-mixtral", RowFormat("f32"))
    merges, tiers = random_tiers(model.store.manifest, 5, (merge,))
    decoder = gpu_decoder(model, team, merges, tiers, led)
    cache = KvCache(model.config, 2, "f32")
    for token in TOKENS[:2]:
        decoder.forward(token.view(1), cache)
    with pytest.raises(AssertionError, match="waits for the device"), NoValuesForTheHost():
        int(torch.ones(1))
