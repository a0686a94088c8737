"""A GGUF file of a given shape with random Q4_0 blocks, so that llama.cpp computes what we compute.

    python benchmarks/q4_0_gguf.py STORE model.gguf

STORE is one of ours: only its configuration is read. Types are those that llama.cpp's own "Q4_0" gives a model: Q4_0
for every matrix and the embedding, Q6_K for the output matrix, F32 for norms. Speeds are comparable, text is not: the
weights are noise. One tensor is in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.store.manifest import read_manifest

NAME = "synthetic"
WEIGHT_SPREAD = 0.02  # as trained models have it: no step of the forward pass overflows
Q4_0_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
Q6_K_BLOCK = np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("scale", "<f2")])
NIBBLE_SPREAD, SIX_BIT_SPREAD, SCALE_SPREAD = 4.6, 18.5, 37.0  # standard deviations of uniformly random codes


def write_q4_0(config: ModelConfig, path: Path) -> None:
    """Write the file under a temporary name and rename it."""
    refuse_what_llama_cpp_would_not_load(config)
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config)
    tensors = list(tensor_shapes(config))
    for name, shape, kind in tensors:
        stored = (
            gguf.quants.quant_shape_to_byte_shape(shape, kind) if kind != Kind.F32 else (*shape[:-1], shape[-1] * 4)
        )
        dtype = np.dtype(np.float32 if kind == Kind.F32 else np.uint8)
        num_bytes = int(np.prod(stored, dtype=np.int64))
        writer.add_tensor_info(name, shape if kind == Kind.F32 else stored, dtype, num_bytes, kind)
    temporary = path.with_name(path.name + ".tmp")
    writer.write_header_to_file(temporary)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, shape, kind in tensors:
        writer.write_tensor_data(random_tensor(rng, shape, kind))
    writer.close()
    temporary.replace(path)


def refuse_what_llama_cpp_would_not_load(config: ModelConfig) -> None:
    """Raise UsageError for a shape that Q4_0 and Q6_K do not divide, or an architecture that is not Llama's."""
    if config.hidden_size % 256 or config.intermediate_size % 32:
        raise UsageError(
            f"hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}: Q6_K needs a hidden_size "
            "of whole blocks of 256, Q4_0 an intermediate_size of whole blocks of 32"
        )
    if config.num_experts or config.norm != "rms" or not config.activation.is_gated:
        raise UsageError(f"{config.family} is not a dense Llama; give the store of one, such as mistral-7b")


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """What llama.cpp asks of a Llama. It benchmarks with random token ids, so there is no vocabulary."""
    writer.add_name(NAME)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta if config.rope is not None else 10_000.0)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Kind]]:
    """Name, shape (rows, columns) and type of every tensor, in the order of the file."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    yield "token_embd.weight", (config.vocab_size, hidden), Kind.Q4_0
    for layer_idx in range(config.num_hidden_layers):
        layer = f"blk.{layer_idx}"
        yield f"{layer}.attn_norm.weight", (hidden,), Kind.F32
        yield f"{layer}.attn_q.weight", (query, hidden), Kind.Q4_0
        yield f"{layer}.attn_k.weight", (key, hidden), Kind.Q4_0
        yield f"{layer}.attn_v.weight", (key, hidden), Kind.Q4_0
        yield f"{layer}.attn_output.weight", (hidden, query), Kind.Q4_0
        yield f"{layer}.ffn_norm.weight", (hidden,), Kind.F32
        yield f"{layer}.ffn_gate.weight", (inner, hidden), Kind.Q4_0
        yield f"{layer}.ffn_up.weight", (inner, hidden), Kind.Q4_0
        yield f"{layer}.ffn_down.weight", (hidden, inner), Kind.Q4_0
    yield "output_norm.weight", (hidden,), Kind.F32
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden), Kind.Q6_K


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Ones for a norm, else random blocks whose weights spread as a trained model's do."""
    if kind == Kind.F32:
        return np.ones(shape, np.float32)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = int(np.prod(shape, dtype=np.int64)) // block_size
    raw = np.frombuffer(rng.bytes(num_blocks * block_bytes), np.uint8).copy()
    if kind == Kind.Q4_0:
        raw.view(Q4_0_BLOCK)["scale"] = WEIGHT_SPREAD / NIBBLE_SPREAD
    else:
        blocks = raw.view(Q6_K_BLOCK)
        blocks["scales"] //= 2
        blocks["scale"] = WEIGHT_SPREAD / SIX_BIT_SPREAD / SCALE_SPREAD
    return raw


if __name__ == "__main__":
    write_q4_0(read_manifest(Path(sys.argv[1])).config, Path(sys.argv[2]))
