"""Short names for the checkpoints this runtime knows, and what their publishers say of them.

A row here says where a model lives, not that it fits or how it is computed: that is the family registry's business.
`models.md` is the same list for people; a test compares the two. Organisation `PowerInfer` was renamed `Tiiny`: the new
id is tried first, the former one when a mirror does not know the new one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

UNKNOWN_LICENCE = "see repo"


@dataclass(frozen=True, slots=True)
class Alias:
    """One short name: the repository behind it, and what to know before downloading it."""

    name: str
    repo_id: str
    former_repo_id: str | None
    licence: str
    parameters: str
    note: str


def _tiiny(name: str, model: str, licence: str, parameters: str, note: str) -> Alias:
    return Alias(name, f"Tiiny/{model}", f"PowerInfer/{model}", licence, parameters, note)


def _sparse_llm(name: str, model: str, licence: str, parameters: str, note: str) -> Alias:
    return Alias(name, f"SparseLLM/{model}", None, licence, parameters, note)


def _opt(size: str, parameters: str) -> Alias:
    note = "ReLU with biases, no gate; refused while its repository holds only pickles"
    return Alias(f"opt-{size}", f"facebook/opt-{size}", None, UNKNOWN_LICENCE, parameters, note)


_RELULLAMA_NOTE = "ReGLU; parts of this series were published as .bin pickles, which are refused"
_PROSPARSE_NOTE = "FATReLU, threshold 0.01 as its config says"

_ROWS = (
    _tiiny(
        "turbosparse-mixtral",
        "TurboSparse-Mixtral",
        "apache-2.0",
        "51.8B",
        "dReLU, 8 experts, embedded predictors; 103.6 GB to download",
    ),
    _tiiny(
        "turbosparse-mistral",
        "TurboSparse-Mistral-Instruct",
        UNKNOWN_LICENCE,
        "7.99B",
        "dReLU, embedded predictor that reads the residual before the norm",
    ),
    _tiiny("bamboo-7b", "Bamboo-base-v0_1", UNKNOWN_LICENCE, "7B", "dReLU, predictor in a separate repository"),
    _tiiny("bamboo-7b-dpo", "Bamboo-DPO-v0_1", UNKNOWN_LICENCE, "7B", "dReLU, predictor in a separate repository"),
    _sparse_llm("prosparse-7b", "prosparse-llama-2-7b", "llama2", "7B", _PROSPARSE_NOTE),
    _sparse_llm("prosparse-13b", "prosparse-llama-2-13b", UNKNOWN_LICENCE, "13B", _PROSPARSE_NOTE),
    _tiiny(
        "smallthinker-4b",
        "SmallThinker-4BA0.6B-Instruct",
        "apache-2.0",
        "4B",
        "ReGLU experts, 32 of which 4 are used; exact gate, no predictor",
    ),
    _tiiny(
        "smallthinker-21b",
        "SmallThinker-21BA3B-Instruct",
        UNKNOWN_LICENCE,
        "21B",
        "ReGLU experts, 64 of which 6 are used; exact gate, no predictor",
    ),
    _sparse_llm("relullama-7b", "ReluLLaMA-7B", "llama2", "7B", _RELULLAMA_NOTE),
    _sparse_llm("relullama-13b", "ReluLLaMA-13B", UNKNOWN_LICENCE, "13B", _RELULLAMA_NOTE),
    _sparse_llm("relullama-70b", "ReluLLaMA-70B", UNKNOWN_LICENCE, "70B", _RELULLAMA_NOTE),
    _tiiny(
        "sparseqwen2-7b",
        "SparseQwen2-7B",
        UNKNOWN_LICENCE,
        "7B",
        "dReLU, although its config says relu as for ReGLU",
    ),
    Alias(
        "minicpm-s-1b",
        "openbmb/MiniCPM-S-1B-sft-llama-format",
        None,
        UNKNOWN_LICENCE,
        "1B",
        "trained as FATReLU 0.03, although the config of this Llama-format copy says relu",
    ),
    _opt("125m", "125M"),
    _opt("1.3b", "1.3B"),
    _opt("2.7b", "2.7B"),
    _opt("6.7b", "6.7B"),
    _opt("13b", "13B"),
    _opt("30b", "30B"),
    _opt("66b", "66B"),
)

ALIASES: Mapping[str, Alias] = MappingProxyType({row.name: row for row in _ROWS})


def close_aliases(typed: str) -> list[str]:
    """Aliases that look like what was typed, best first; letters' case does not count."""
    return difflib.get_close_matches(typed.lower(), list(ALIASES), n=4, cutoff=0.5)
