"""Which family a checkpoint belongs to. A new family is one file beside this one and one line here."""

from __future__ import annotations

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError, UnsupportedModel
from hybrid_runtime.families.activations import find_activation
from hybrid_runtime.families.bamboo import BAMBOO
from hybrid_runtime.families.family import Family
from hybrid_runtime.families.llama import LLAMA
from hybrid_runtime.families.mistral import MISTRAL
from hybrid_runtime.families.mixtral import MIXTRAL, TURBOSPARSE_MIXTRAL
from hybrid_runtime.families.opt import OPT
from hybrid_runtime.families.qwen2 import QWEN2
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.smallthinker import SMALLTHINKER
from hybrid_runtime.model.rope_frequencies import rope_frequencies

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, MIXTRAL, TURBOSPARSE_MIXTRAL, QWEN2, BAMBOO, SMALLTHINKER, OPT)


def find_family(raw: RawConfig) -> tuple[Family, str]:
    """The family and the model_type; raise UnsupportedModel naming the types that are known."""
    model_type = raw.text("model_type", "")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family, model_type
    known = ", ".join(sorted(each for family in FAMILIES for each in family.model_types))
    raise UnsupportedModel(f"{raw.file}: model_type {model_type!r} is not supported (supported: {known})")


def parse_config(raw: RawConfig, *, repo_id: str = "", ffn_activation: str | None = None) -> ModelConfig:
    """Read a published config.json. repo_id: "org/name" where known; ffn_activation: the caller's override."""
    family, model_type = find_family(raw)
    hidden_act = raw.text(family.activation_key, family.default_hidden_act)
    activation = find_activation(raw, model_type, hidden_act, repo_id, ffn_activation)
    try:
        config = family.parse(raw, activation)
        if config.rope is not None:  # the one setting whose numbers meet head_dim only in arithmetic
            for num_positions in (1, config.rope.original_max_position_embeddings + 1):
                rope_frequencies(config.rope, config.head_dim, num_positions)
    except ArithmeticError as error:
        raise CheckpointError(f"{raw.file}: the rotary positions' numbers cannot be computed with: {error}") from error
    except CheckpointError as error:
        if str(error).startswith(raw.file):
            raise
        raise type(error)(f"{raw.file}: {error}") from error  # ModelConfig knows keys, not files
    return config
