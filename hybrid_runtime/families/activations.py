"""Which activation a checkpoint really computes.

`hidden_act` alone misleads: "relu" is ReLU-GLU in ReluLLaMA, dReLU in Bamboo and TurboSparse, and "silu" is ReLU in
Sakana's SparseLM. So the table is keyed on (model_type, hidden_act); known repository ids overrule it; and the caller's
`--ffn-activation` overrules both. A pair that stands for two different models is refused until one of those decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import get_args

from hybrid_kernels.activation import Activation
from hybrid_kernels.activation_kinds import ActivationKind
from hybrid_runtime.errors import UnsupportedModel, UsageError
from hybrid_runtime.families.raw_config import RawConfig

_LLAMA_LIKE: dict[str, ActivationKind] = {
    "silu": "silu_glu",
    "swish": "silu_glu",
    "relu": "relu_glu",
    "relu2": "relu2_glu",
    "gelu": "gelu_glu",
    "gelu_pytorch_tanh": "gelu_tanh_glu",
    "fatrelu": "fatrelu",
}

ACTIVATIONS: Mapping[tuple[str, str], ActivationKind] = MappingProxyType(
    {("llama", name): kind for name, kind in _LLAMA_LIKE.items()}
    | {("mistral", name): kind for name, kind in _LLAMA_LIKE.items()}
    | {("mixtral", name): kind for name, kind in _LLAMA_LIKE.items()}
    | {("qwen2", name): kind for name, kind in _LLAMA_LIKE.items() if name != "relu"}
    | {
        ("sparsellama", "fatrelu"): "fatrelu",
        ("sparsellama", "relu"): "relu_glu",
        ("llama_sparse_relu", "silu"): "relu_glu",  # its code hard-codes ReLU whatever its config says
        ("llama_sparse_relu", "relu"): "relu_glu",
        ("arcee", "relu2"): "relu2",
        ("bamboo", "relu"): "drelu",
        ("turbosparsemixtral", "relu"): "drelu",
        ("smallthinker", "relu"): "relu_glu",
        ("opt", "relu"): "relu",
        ("opt", "gelu"): "gelu",
    }
)

REPO_ACTIVATIONS: Mapping[tuple[str, str, str], Activation] = MappingProxyType(
    {
        ("qwen2", "relu", "sparseqwen2-7b"): Activation("drelu"),
        ("llama", "relu", "minicpm-s-1b-sft-llama-format"): Activation(
            "fatrelu", 0.03
        ),  # its config lost the threshold
    }
)
"""By (model_type, hidden_act, last part of the repository id in lower case): the owner PowerInfer is now Tiiny."""

SPARSE_NAMES = re.compile(
    r"relu-?llama|prosparse|sparse-?qwen|sparse-?lm|minicpm-s\b|turbo-?sparse|bamboo", re.IGNORECASE
)
"""Models whose GGUF, if made by llama.cpp, says nothing of their activation."""

_AMBIGUOUS: Mapping[tuple[str, str], str] = MappingProxyType(
    {("qwen2", "relu"): "drelu (SparseQwen2) or relu_glu (stock Qwen2 code)"}
)


def find_activation(raw: RawConfig, model_type: str, hidden_act: str, repo_id: str, override: str | None) -> Activation:
    """Raise UnsupportedModel when nothing decides, UsageError for an override that does not fit the family."""
    if override is not None:
        return _overridden(override, model_type)
    known_model = REPO_ACTIVATIONS.get((model_type, hidden_act, repo_id.rsplit("/", 1)[-1].lower()))
    if known_model is not None:
        return known_model
    kind = ACTIVATIONS.get((model_type, hidden_act))
    if kind is None:
        meaning = _AMBIGUOUS.get((model_type, hidden_act))
        known = ", ".join(sorted(act for kind_of, act in ACTIVATIONS if kind_of == model_type))
        raise UnsupportedModel(
            f"{raw.file}: hidden_act {hidden_act!r} of model_type {model_type!r} "
            + (f"can mean {meaning}" if meaning else f"is not known (known: {known})")
            + "; say which with --ffn-activation"
        )
    threshold = raw.number("hidden_act_param") if kind == "fatrelu" else 0.0
    if threshold < 0:
        raise raw.error("hidden_act_param", threshold, "a number from 0")
    return Activation(kind, threshold)


def parse_activation(text: str) -> Activation:
    """`silu_glu`, `drelu`, `fatrelu:0.01`, ...; raise UsageError for anything else."""
    kind, _, threshold = text.partition(":")
    if kind not in get_args(ActivationKind) or (threshold and kind != "fatrelu"):
        raise UsageError(
            f"--ffn-activation {text!r} is not one of {', '.join(get_args(ActivationKind))} (fatrelu takes :THRESHOLD)"
        )
    if kind == "fatrelu" and not threshold:
        raise UsageError("--ffn-activation fatrelu needs its threshold, as in fatrelu:0.01")
    try:
        return Activation(kind, float(threshold) if threshold else 0.0)  # type: ignore[arg-type]  # checked above
    except ValueError as error:
        raise UsageError(f"--ffn-activation {text!r}: {error}") from error


def _overridden(override: str, model_type: str) -> Activation:
    activation = parse_activation(override)
    is_gated = model_type not in ("opt", "arcee")
    if activation.is_gated != is_gated:
        raise UsageError(
            f"--ffn-activation {override}: {model_type} has {'a' if is_gated else 'no'} gate_proj, "
            f"{activation.kind} needs {'one' if activation.is_gated else 'none'}"
        )
    return activation


def refuse_silent_guess(file: str, names: Iterable[object], override: str | None) -> None:
    """Raise UnsupportedModel for a GGUF file whose name is a sparse model's: computing SiLU would be silently wrong."""
    if override is not None:
        return
    for name in names:
        if isinstance(name, str) and SPARSE_NAMES.search(name):
            raise UnsupportedModel(
                f"{file}: {name!r} names a model with a sparse activation, which a GGUF file does not record; "
                "say it with --ffn-activation (relu_glu, drelu, fatrelu:0.01, ...)"
            )
