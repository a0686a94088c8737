"""Everything that decides a training run's result, as one frozen description that is written beside it.

Two runs with the same recipe and text on the same kind of CPU give the same weights. What only decides how the run is
shown or how often it is saved is not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from hybrid_kernels.activation import Activation
from hybrid_kernels.activation_kinds import ActivationKind
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.errors import UsageError
from hybrid_tools.training.initial import family_of

FfnActivation = Literal["swiglu", "relu", "drelu", "fatrelu"]
DType = Literal["f32", "bf16"]
KINDS: dict[FfnActivation, ActivationKind] = {
    "swiglu": "silu_glu",
    "relu": "relu_glu",
    "drelu": "drelu",
    "fatrelu": "fatrelu",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A new model's sizes, in config.json's words. num_experts 0: one dense network a layer (llama)."""

    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    num_experts: int = 0
    num_experts_per_tok: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError naming the option that makes no sense."""
        for name, flag in _COUNTS.items():
            if getattr(self, name) < 1:
                raise UsageError(f"{flag} {getattr(self, name)}: expected at least 1")
        if self.num_experts < 0:
            raise UsageError(f"--experts {self.num_experts}: expected 0 (dense) or more")
        if not 0 < self.rope_theta < math.inf:
            raise UsageError(f"--rope-theta {self.rope_theta}: expected a number above 0")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UsageError(
                f"--hidden-size {self.hidden_size} is not an even multiple of --heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"--heads {self.num_attention_heads} is not a multiple of --kv-heads {self.num_key_value_heads}"
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UsageError(
                f"--experts-per-token {self.num_experts_per_tok}: expected 1 to {self.num_experts}, which is --experts"
            )

    def config(self, activation: Activation, vocab_size: int, bos_id: int | None, eos_id: int) -> ModelConfig:
        """The decoder of this shape."""
        return ModelConfig(
            family=family_of(activation, is_mixture=self.num_experts > 0),
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            activation=activation,
            norm_eps=self.norm_eps,
            rope=RopeConfig(self.rope_theta),
            tie_word_embeddings=self.tie_word_embeddings,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok if self.num_experts else 0,
            bos_token_id=bos_id,
            eos_token_ids=(eos_id,),
        )


@dataclass(frozen=True, slots=True)
class Optimisation:
    """How the weights move. total_tokens: targets read over the whole run; batch_tokens: of one step.

    l1: the largest weight of the mean L1 norm of a routed expert's hidden vector (ProSparse, arXiv 2402.13516); it
    rises along half a cosine from l1_start to l1_end, both shares of the run, and stays.
    """

    total_tokens: int
    batch_tokens: int = 4096
    seq_len: int = 256
    micro_batch: int = 16  # sequences computed at once; it decides the order of sums, so it is part of the recipe
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05  # of the largest
    warmup: float = 0.03  # share of the run
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    balance: float = 0.01
    l1: float = 0.0
    l1_start: float = 0.1
    l1_end: float = 0.6
    dtype: DType = "f32"

    def __post_init__(self) -> None:
        """Raise UsageError naming the option that makes no sense."""
        for names, is_good, expected in _CHECKS:
            for name in names:
                value = getattr(self, name)
                if not (math.isfinite(value) and is_good(value)):
                    raise UsageError(f"--{_FLAGS.get(name, name.replace('_', '-'))} {value}: expected {expected}")
        if self.batch_tokens % self.seq_len:
            raise UsageError(f"--batch-tokens {self.batch_tokens} is not a multiple of --seq-len {self.seq_len}")
        if self.num_sequences % self.micro_batch:
            raise UsageError(
                f"--micro-batch {self.micro_batch} does not divide the {self.num_sequences} sequences of a step"
            )
        if self.l1_start > self.l1_end:
            raise UsageError(f"--l1-start {self.l1_start} is after --l1-end {self.l1_end}")
        if self.dtype not in get_args(DType):
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(get_args(DType))}")

    @property
    def num_sequences(self) -> int:
        """Sequences of a step."""
        return self.batch_tokens // self.seq_len

    @property
    def num_steps(self) -> int:
        """Steps of the run; the last is whole."""
        return max(1, -(-self.total_tokens // self.batch_tokens))


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run. source: digest of the weights that it continues, or nothing; corpus: of the text; vocabulary: of the
    tokenizer's files.
    """

    config: ModelConfig
    optimisation: Optimisation
    seed: int
    source: str
    corpus: str
    vocabulary: str
    num_threads: int  # sums are added in another order by another number of threads
    device: str
    torch_version: str

    def to_json(self) -> dict[str, object]:
        """Plain values, nested as the dataclasses are."""
        return asdict(self)

    def differences(self, other: Mapping[str, object]) -> list[str]:
        """What another recipe's JSON says differently: `optimisation.learning_rate: 0.001, now 0.002`."""
        return list(_differences("", other, self.to_json()))


def activation_of(name: FfnActivation, threshold: float) -> Activation:
    """Raise UsageError for a threshold that the activation does not have."""
    if name != "fatrelu" and threshold:
        raise UsageError(f"--fatrelu-threshold {threshold}: --activation {name} has no threshold")
    if name == "fatrelu" and not 0 < threshold < math.inf:
        raise UsageError("--activation fatrelu needs --fatrelu-threshold above 0, for example 0.01")
    return Activation(KINDS[name], threshold)


_COUNTS = {
    "hidden_size": "--hidden-size",
    "intermediate_size": "--intermediate-size",
    "num_hidden_layers": "--layers",
    "num_attention_heads": "--heads",
    "num_key_value_heads": "--kv-heads",
    "max_position_embeddings": "--context",
}
_FLAGS = {"total_tokens": "tokens", "learning_rate": "lr", "final_learning_rate": "final-lr"}
_CHECKS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("total_tokens", "batch_tokens", "seq_len", "micro_batch"), lambda value: value >= 1, "at least 1"),
    (("learning_rate", "clip"), lambda value: value > 0, "a number above 0"),
    (("weight_decay", "balance", "l1"), lambda value: value >= 0, "a number from 0"),
    (("final_learning_rate", "warmup", "l1_start", "l1_end"), lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    (("beta1", "beta2"), lambda value: 0 <= value < 1, "a number from 0 to below 1"),
)


def _differences(where: str, old: object, new: object) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            each
            for key in sorted(old.keys() | new.keys())
            for each in _differences(f"{where}.{key}" if where else key, old.get(key), new.get(key))
        ]
    plain = list(new) if isinstance(new, tuple) else new
    return [] if old == plain else [f"{where}: {old!r}, now {plain!r}"]
