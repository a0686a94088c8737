"""`random-demo`: a tiny TurboSparse-shaped mixture with RANDOM weights, made on the spot.

It takes the whole path that a published model takes, which the model in the package does not: a checkpoint's folder,
its conversion, routed experts, embedded predictors that mask. What it writes means nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

DEMO_NAME = "random-demo"
DEMO_VERSION = 1  # another demo goes into another folder

HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 160
NUM_LAYERS = 4
NUM_EXPERTS = 4
PREDICTOR_RANKS = (16, 16, 24, 12)
VOCABULARY_SIZE = 256
SEED = 20261122

_VOCABULARY_TEXT = (
    "A small model with random weights knows no language, so the words that it writes are drawn from this paragraph "
    "and mean nothing at all. Every token takes the same path as in a large sparse mixture of experts: the embedding, "
    "attention over all tokens before it, a router that picks two experts of four, a predictor that says which neurons "
    "of each expert will fire, and only those are computed. Then their outputs are weighted, added to the stream, and "
    "after the last layer the head gives a number for every token of the vocabulary, from which one is drawn. "
) * 4


def make_demo(folder: Path) -> Path:
    """Write the demo as a Hugging Face folder, unless it is there; return the folder."""
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        try:
            _write_weights(temporary)
            _write_tokenizer(temporary)
            (temporary / "config.json").write_text(json.dumps(_config(), indent=1))
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            with contextlib.suppress(OSError):  # not empty: somebody else was faster, and wrote the same
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _config() -> dict[str, object]:
    return {
        "architectures": ["TurboSparseMixtralForCausalLM"],
        "model_type": "turbosparsemixtral",
        "hidden_act": "relu",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }


def _write_weights(folder: Path) -> None:
    import torch  # noqa: PLC0415  # only where the demo is made
    from safetensors.torch import save_file  # noqa: PLC0415

    generator = torch.Generator().manual_seed(SEED)

    def random(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY_SIZE, HIDDEN_SIZE, 8.0),
        "lm_head.weight": random(VOCABULARY_SIZE, HIDDEN_SIZE, 3.0),
        "model.norm.weight": torch.ones(HIDDEN_SIZE),
    }
    for layer_idx, rank in enumerate(PREDICTOR_RANKS):
        layer = f"model.layers.{layer_idx}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN_SIZE)
        for projection, rows in (
            ("q", HIDDEN_SIZE),
            ("k", HIDDEN_SIZE // 4),
            ("v", HIDDEN_SIZE // 4),
            ("o", HIDDEN_SIZE),
        ):
            tensors[f"{layer}.self_attn.{projection}_proj.weight"] = random(rows, HIDDEN_SIZE)
        tensors[f"{layer}.block_sparse_moe.gate.weight"] = random(NUM_EXPERTS, HIDDEN_SIZE)
        for expert_idx in range(NUM_EXPERTS):
            expert = f"{layer}.block_sparse_moe.experts.{expert_idx}"
            tensors[f"{expert}.w1.weight"] = random(INTERMEDIATE_SIZE, HIDDEN_SIZE)
            tensors[f"{expert}.w3.weight"] = random(INTERMEDIATE_SIZE, HIDDEN_SIZE)
            tensors[f"{expert}.w2.weight"] = random(HIDDEN_SIZE, INTERMEDIATE_SIZE)
            tensors[f"{expert}.predictor.fc1.weight"] = random(rank, HIDDEN_SIZE)
            tensors[f"{expert}.predictor.fc2.weight"] = random(INTERMEDIATE_SIZE, rank)
    save_file(tensors, folder / "model.safetensors")


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=["<s>", "</s>"], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([_VOCABULARY_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
