"""Checkpoints of any size for the tests of conversion, written tensor by tensor so that none is held in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

LLAMA = {
    "model_type": "llama",
    "hidden_act": "relu",
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 36,
    "ffn_dim": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 36,
}
BLOCK_VALUES = 1 << 20


def llama_shapes(config):
    """Published name -> shape of a dense Llama, layer by layer."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer_idx in range(config["num_hidden_layers"]):
        layer = f"model.layers.{layer_idx}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (query, hidden),
            f"{layer}.self_attn.k_proj.weight": (key, hidden),
            f"{layer}.self_attn.v_proj.weight": (key, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def opt_shapes(config):
    """Published name -> shape of an OPT: ungated, with biases and learned positions."""
    hidden, inner, decoder = config["hidden_size"], config["ffn_dim"], "model.decoder"
    shapes = {
        f"{decoder}.embed_tokens.weight": (config["vocab_size"], hidden),
        f"{decoder}.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    for layer_idx in range(config["num_hidden_layers"]):
        layer = f"{decoder}.layers.{layer_idx}"
        matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        matrices |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{name}.weight": (hidden,), f"{layer}.{name}.bias": (hidden,)}
    return shapes | {f"{decoder}.final_layer_norm.{name}": (hidden,) for name in ("weight", "bias")}


def random_tensors(shapes, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_tensors(folder, config, tensors):
    """A small Hugging Face folder in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_llama(folder, seed=0, dtype=torch.bfloat16, **settings):
    config = LLAMA | settings
    return write_tensors(folder, config, random_tensors(llama_shapes(config), dtype, seed))


def write_large_llama(folder, shard_bytes, **settings):
    """A sharded bfloat16 Llama of any size; every tensor is another window of one block of random values."""
    config = LLAMA | settings
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    block = torch.randn(BLOCK_VALUES * 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards, size = [{}], 0
    for name, shape in llama_shapes(config).items():
        if size > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = shape
        size += math.prod(shape) * 2
    weight_map = {}
    for shard_idx, shapes in enumerate(shards):
        file = f"model-{shard_idx + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shapes, block.view(torch.int16).numpy())
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write_shard(path: Path, shapes, block: np.ndarray) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        stop = position + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor_idx, shape in enumerate(shapes.values()):
            left = math.prod(shape)
            window = block[(tensor_idx * 7919) % BLOCK_VALUES :]
            while left:
                count = min(left, BLOCK_VALUES)
                file.write(window[:count].data)
                left -= count


def largest_tensor_bytes(**settings):
    return max(math.prod(shape) for shape in llama_shapes(LLAMA | settings).values()) * 2


def write_large_gguf(path, hidden_size, intermediate_size):
    """A one-layer GGUF whose FFN is Q4_0, every block alike; the bytes of its largest tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_block_count(1)
    writer.add_head_count(32)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    block = gguf.quants.quantize(np.random.default_rng(0).standard_normal((1, 32), dtype=np.float32), q4_0)
    matrices = {f"blk.0.attn_{name}": (hidden_size, hidden_size) for name in ("q", "k", "v", "output")}
    matrices |= {f"blk.0.ffn_{name}": (intermediate_size, hidden_size) for name in ("gate", "up")}
    matrices |= {"blk.0.ffn_down": (hidden_size, intermediate_size), "token_embd": (64, hidden_size)}
    for name, (rows, columns) in matrices.items():
        blocks = np.broadcast_to(block.reshape(1, -1), (rows * columns // 32, block.size)).reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=q4_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden_size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hidden_size * intermediate_size // 32 * block.size
