"""Where weights lie in a store: aligned, without overlaps, every weight once, and in the promised formats."""

import pytest

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.model.weight_specs import all_weights
from hybrid_runtime.store.layout import CACHE_LINE, PAGE, Entry, Part, Quantization, lay_out

from .small_store import CONFIGS, FORMATS, Q4

F32, Q8 = RowFormat("f32"), RowFormat("q8", 32)

formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
configs = pytest.mark.parametrize("name", CONFIGS)


def parts_of(name, row_format) -> tuple[Part, ...]:
    config, ranks = CONFIGS[name]
    return lay_out(config, Quantization(row_format), ranks)


def entries_of(name, row_format) -> dict[str, Entry]:
    return {entry.name: entry for part in parts_of(name, row_format) for entry in part.entries}


@formats
@configs
def test_entries_are_aligned_and_do_not_overlap(name, row_format):
    for part in parts_of(name, row_format):
        end = 0
        for entry in part.entries:
            alignment = CACHE_LINE if entry.kind == "vector" else PAGE
            assert entry.offset % alignment == 0
            assert end <= entry.offset < end + alignment  # and no more room than the alignment needs
            assert entry.num_bytes > 0
            end = entry.offset + entry.num_bytes
        assert part.num_bytes == end


@formats
@configs
def test_the_size_of_an_entry_is_that_of_its_rows(name, row_format):
    for entry in entries_of(name, row_format).values():
        if entry.kind == "vector":
            assert entry.num_bytes == 4 * entry.shape[0]
            continue
        assert len(entry.shape) == (2 if entry.kind == "rows" else 3)
        num_rows = entry.shape[0] * (entry.shape[1] if entry.kind == "bundles" else 1)
        assert entry.num_bytes == num_rows * entry.row_format.row_bytes(entry.shape[-1])


@configs
def test_every_weight_is_in_one_part_exactly_once(name):
    config, _ = CONFIGS[name]
    found = []
    for part in parts_of(name, Q4):
        for entry in part.entries:
            if entry.kind != "bundles":
                found.append(entry.name)
                continue
            ffn = entry.name.removesuffix(".bundles")
            members = ("gate_proj", "up_proj", "down_proj") if config.activation.is_gated else ("up_proj", "down_proj")
            assert entry.shape == (config.intermediate_size, len(members), config.hidden_size)
            found += [f"{ffn}.{member}" for member in members]
    assert sorted(found) == sorted(spec.name for spec in all_weights(config))


@configs
def test_parts_are_the_embeddings_each_layer_and_the_head(name):
    config, _ = CONFIGS[name]
    layers = [f"layer-{layer_idx:05d}.bin" for layer_idx in range(config.num_hidden_layers)]
    parts = parts_of(name, Q4)
    assert [part.file for part in parts] == ["embed.bin", *layers, "head.bin"]
    assert all(entry.name.startswith("embed_") for entry in parts[0].entries)
    for layer_idx, part in enumerate(parts[1:-1]):
        assert all(entry.name.startswith(f"layers.{layer_idx}.") for entry in part.entries)
    assert {entry.name.removesuffix(".bias") for entry in parts[-1].entries} == (
        {"norm"} if config.tie_word_embeddings else {"norm", "lm_head"}
    )


@pytest.mark.parametrize(
    ("asked", "embedding"), [(F32, F32), (RowFormat("bf16"), RowFormat("bf16")), (Q8, Q8), (Q4, Q8)]
)
def test_vectors_and_routers_stay_float32_and_embeddings_at_eight_bits(asked, embedding):
    entries = entries_of("experts", asked) | entries_of("biased", asked)
    for name, entry in entries.items():
        if entry.kind == "vector" or name.endswith(".router"):
            assert entry.row_format == F32, name
        elif name in ("embed_tokens", "embed_positions", "lm_head"):
            assert entry.row_format == embedding, name
        elif name.endswith("k_proj"):  # finer where several queries share a key
            assert entry.row_format in (asked, embedding), name
        else:
            assert entry.row_format == asked, name
    assert entries["layers.0.mlp.router"].kind == "rows"


def test_a_predictors_rank_is_the_checkpoints():
    entries = entries_of("experts", Q4)
    for layer in range(2):
        for expert in range(3):
            prefix = f"layers.{layer}.mlp.experts.{expert}.predictor"
            assert entries[f"{prefix}.fc1"].shape == (5 + layer + expert, 36)
            assert entries[f"{prefix}.fc2"].shape == (51, 5 + layer + expert)


def test_the_group_of_an_embedding_is_the_weights():
    for group in (32, 64, 128):
        assert Quantization(RowFormat("q4", group)).finer == RowFormat("q8", group)


def test_sizes_of_a_real_model_are_known_before_a_byte_is_read():
    """Mistral 7B's bundles in q4: three rows of 2304 B, 14336 neurons, 32 layers."""
    from hybrid_kernels.activation import Activation  # noqa: PLC0415
    from hybrid_runtime.config import ModelConfig, RopeConfig  # noqa: PLC0415

    config = ModelConfig(
        "mistral", 32000, 4096, 14336, 32, 32, 8, 128, 32768, Activation("silu_glu"), 1e-5, rope=RopeConfig(1e6)
    )
    entries = [entry for part in lay_out(config, Quantization(Q4), {}) for entry in part.entries]
    bundles = sum(entry.num_bytes for entry in entries if entry.kind == "bundles")
    assert bundles == 32 * 14336 * 3 * 2304
    assert next(entry for entry in entries if entry.name == "embed_tokens").num_bytes == 32000 * 4352
