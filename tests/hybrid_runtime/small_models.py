"""Whole published-looking folders, weights and tokenizer, small enough to make in a test; and a decoder that obeys."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .model.tiny_models import attention_shapes, random_tensors, write_folder

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # the printable characters that stand for the 256 bytes
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = ("Ġthe", "Ġa", "Hello", "Ġworld", "Ġonce", "ing", "er", "Ġand")
PIECES = tuple(dict.fromkeys(word[:end] for word in WORDS for end in range(2, len(word) + 1)))  # on the way to a word
VOCABULARY = {text: idx for idx, text in enumerate((*SPECIALS, *BYTES, *PIECES))}
NUM_TOKENS = len(VOCABULARY)
BOS, EOS, IM_END = 0, 1, 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
TURBOSPARSE = LLAMA | {
    "architectures": ["TurboSparseMixtralForCausalLM"],
    "model_type": "turbosparsemixtral",
    "hidden_act": "relu",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "sliding_window": None,
}
RANKS = (3, 8)  # of the predictors: published ones differ from layer to layer


def write_tokenizer(folder: Path, *, add_bos: bool = True, template: str | None = None) -> None:
    """Byte-level BPE: every byte is a token, so that one character may take four."""
    merges = [(piece[:-1], piece[-1]) for piece in PIECES]
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer_idx in range(config["num_hidden_layers"]):
        layer = f"model.layers.{layer_idx}"
        shapes |= attention_shapes(layer, hidden, heads, kv_heads, head_dim)
        if "num_local_experts" in config:
            shapes |= mixture_shapes(f"{layer}.block_sparse_moe", config, RANKS[layer_idx % 2])
        else:
            shapes |= {f"{layer}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def mixture_shapes(moe: str, config: dict, rank: int) -> dict[str, tuple[int, ...]]:
    """One layer of TurboSparse-Mixtral, by its published names."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    shapes = {f"{moe}.gate.weight": (config["num_local_experts"], hidden)}
    for expert_idx in range(config["num_local_experts"]):
        expert = f"{moe}.experts.{expert_idx}"
        shapes |= {f"{expert}.w1.weight": (intermediate, hidden), f"{expert}.w3.weight": (intermediate, hidden)}
        shapes |= {f"{expert}.w2.weight": (hidden, intermediate)}
        shapes |= {f"{expert}.predictor.fc1.weight": (rank, hidden)}
        shapes |= {f"{expert}.predictor.fc2.weight": (intermediate, rank)}
    return shapes


def write_model(folder: Path, config: dict = LLAMA, *, num_shards=1, add_bos=True, template=None, seed=0) -> Path:
    """A Hugging Face folder with random weights, the head sharp enough for greedy text to be stable and to go on."""
    tensors = random_tensors(llama_shapes(config), seed)
    tensors["lm_head.weight"] *= 3
    tensors["lm_head.weight"][: len(SPECIALS)] = 0  # logits of 0, where the highest is about 9
    write_folder(folder, config, tensors, num_shards)
    write_tokenizer(folder, add_bos=add_bos, template=template)
    return folder


def write_pre_norm_model(folder: Path) -> Path:
    """A dense dReLU model whose predictors read the stream before a norm that changes it much."""
    config = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
    write_model(folder, config)
    generator = torch.Generator().manual_seed(1)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for layer_idx in range(config["num_hidden_layers"]):
        layer = f"model.layers.{layer_idx}"
        tensors[f"{layer}.mlp.predictor.fc1.weight"] = torch.randn(8, 32, generator=generator)
        tensors[f"{layer}.mlp.predictor.fc2.weight"] = torch.randn(48, 8, generator=generator)
        tensors[f"{layer}.post_attention_layernorm.weight"] = 3 * torch.randn(32, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return folder


class ScriptedDecoder:
    """Stands in for a Decoder: after position p it is certain of script[p]. Remembers what it was asked to compute."""

    most_tokens_one_by_one = 0

    def __init__(self, config, script) -> None:
        self.config = config
        self.script = list(script)
        self.batches: list[int] = []

    def forward(self, tokens, cache, *, all_logits=False, prompt_end=0):
        positions = range(cache.length, cache.length + len(tokens))
        logits = torch.full((len(tokens), self.config.vocab_size), -10.0)
        for row, position in enumerate(positions):
            expected = self.script[position] if position < len(self.script) else 5
            if expected is KeyboardInterrupt:
                raise KeyboardInterrupt
            if math.isnan(expected):
                logits[row] = math.nan
            else:
                logits[row, expected] = 10.0
        self.batches.append(len(tokens))
        cache.length += len(tokens)
        return logits if all_logits else logits[-1:]
