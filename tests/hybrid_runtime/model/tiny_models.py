"""Builders for the golden tests: random weights that make every term matter, and the way from files to our logits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.weights import DecoderWeights, load_weights
from hybrid_runtime.store.blocks import CheckpointWeights
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.reader import Store

PROMPT, STEPS = 40, 16
TOLERANCE = 1e-4  # float32 sums of at most a few hundred terms in another order, over three layers; logits are near 1
TELLING = 1e-2  # what a control that leaves something out must change at least
F32 = RowFormat("f32")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint after the whole way: opened, converted, read back."""

    checkpoint: Checkpoint
    store: Store
    weights: DecoderWeights

    @property
    def config(self) -> ModelConfig:
        return self.store.manifest.config


def load(path, folder, row_format=F32, **options) -> Loaded:
    """path: what a user would name; folder: where the store may go."""
    checkpoint = open_checkpoint(path, **options)
    store = convert(Conversion(CheckpointWeights(checkpoint), folder, Quantization(row_format), "tiny", lambda _: None))
    store.verify()
    return Loaded(checkpoint, store, load_weights(store))


def logits_of(loaded, tokens, *, mode=None, chunk=None, config=None, weights=None, cache_dtype="f32"):
    """[len(tokens), V]: the prompt in chunks (None: at once), then one token at a time from the cache."""
    config = config or loaded.config
    decoder = Decoder(config, weights or loaded.weights, choose_predictor_mode(config, mode))
    cache = KvCache(config, len(tokens), cache_dtype)
    prompt = tokens[:PROMPT]
    chunks = [
        decoder.forward(part, cache, all_logits=True, prompt_end=len(prompt)) for part in prompt.split(chunk or PROMPT)
    ]
    steps = [decoder.forward(token.view(1), cache) for token in tokens[PROMPT:]]
    return torch.cat(chunks + steps)


def difference(loaded, tokens, expected, *, num_steps=STEPS, **options):
    """Between our logits of the prompt and num_steps cached steps, and the first of the expected ones."""
    length = PROMPT + num_steps
    return largest_difference(logits_of(loaded, tokens[:length], **options), expected[:length])


def largest_difference(found, expected):
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return (found - expected).abs().max().item()


def random_tokens(vocab_size, seed=7):
    return torch.randint(vocab_size, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomize(named_tensors, seed=0):
    """Fill with values under which attention is uneven, biases and norms count, and activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_tensors:
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.5
        elif tensor.dim() == 1:
            values = 1 + 0.3 * values
        elif "embed" not in name:
            values *= (2.0 if re.search(r"\.[qk]_proj|\bgate\.weight|router", name) else 1.0) / tensor.shape[-1] ** 0.5
        tensor.copy_(values)


def random_tensors(shapes, seed=0):
    """shapes: published name -> shape; the tensors, randomized."""
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    randomize(tensors.items(), seed)
    return tensors


def write_folder(folder, config, tensors, num_shards=1):
    """A Hugging Face folder; shards are cut after equal numbers of tensors, in the order given: mid-layer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map = {}
    for shard_idx in range(num_shards):
        file = f"model-{shard_idx + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard_idx * per_shard : (shard_idx + 1) * per_shard]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def attention_shapes(layer, hidden, heads, kv_heads, head_dim):
    """Llama's names of one layer's norms and attention."""
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    shapes = {f"{layer}.self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()}
    return shapes | {
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
    }


def without_biases(weights, *names):
    """The decoder's weights with the biases of some projections left out."""
    layers = tuple(
        replace(layer, **{name: replace(getattr(layer, name), bias=None) for name in names}) for layer in weights.layers
    )
    return replace(weights, layers=layers)


def a_folder(path: Path, name: str) -> Path:
    folder = path / name
    folder.mkdir()
    return folder
