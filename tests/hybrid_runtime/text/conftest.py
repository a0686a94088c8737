"""Two small vocabularies, as GGUF metadata: an SPM one with byte fallback and a byte-level BPE one."""

from __future__ import annotations

import pytest

from hybrid_runtime.text.load import tokenizer_from_gguf
from hybrid_runtime.text.piece_text import byte_of_character

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@pytest.fixture
def spm_metadata():
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "é",
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "▁w",
        "or",
        "▁wor",
        "ld",
    ]
    entries += [(word, -float(idx), NORMAL) for idx, word in enumerate(reversed(words))]
    entries += [("<|im_start|>", 0.0, CONTROL), ("<|im_end|>", 0.0, CONTROL), ("<tool>", 0.0, USER_DEFINED)]
    texts, scores, types = (list(column) for column in zip(*entries, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture
def bpe_metadata():
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w", "o r"]
    texts = list(byte_of_character()) + [merge.replace(" ", "") for merge in merges]
    types = [NORMAL] * len(texts) + [CONTROL, CONTROL, USER_DEFINED]
    texts += ["<|endoftext|>", "<|im_end|>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": texts.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": texts.index("<|endoftext|>"),
    }


@pytest.fixture(params=["spm", "bpe"])
def tokenizer(request, spm_metadata, bpe_metadata):
    metadata = {"spm": spm_metadata, "bpe": bpe_metadata}[request.param]
    return tokenizer_from_gguf(metadata, file=f"{request.param}.gguf")


@pytest.fixture
def spm(spm_metadata):
    return tokenizer_from_gguf(spm_metadata, file="spm.gguf")


@pytest.fixture
def bpe(bpe_metadata):
    return tokenizer_from_gguf(bpe_metadata, file="bpe.gguf")
