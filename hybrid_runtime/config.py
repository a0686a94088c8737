"""What a decoder is made of, as one description that every family's config.json is translated into.

Field names are config.json's where it has one. The description is complete: nothing after it asks for a model's name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from hybrid_kernels.activation import Activation
from hybrid_kernels.routing.reference import ROUTER_SCORES, RouterScore
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.typed_json import from_json

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "factors"]
NormKind = Literal["rms", "layer"]
StreamPoint = Literal["layer_input", "pre_norm", "post_norm"]
"""Where a layer's stream is tapped: before the attention's norm, before the FFN's norm, after the FFN's norm."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions: theta and the scaling variant, with Hugging Face's parameter names."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn, longrope
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    short_factor: tuple[float, ...] = ()  # longrope; factors
    long_factor: tuple[float, ...] = ()  # longrope

    def __post_init__(self) -> None:
        """Raise CheckpointError for numbers that no rotation can have."""
        if self.kind not in get_args(RopeKind):
            raise CheckpointError(f"rope scaling {self.kind!r} is not one of {', '.join(get_args(RopeKind))}")
        if not self.theta > 0 or not self.factor > 0:
            raise CheckpointError(f"rope theta {self.theta} and factor {self.factor} must be above 0")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are counts of values; windows are in tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    activation: Activation
    norm_eps: float
    norm: NormKind = "rms"
    rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()  # per layer whether positions rotate; empty = all
    sliding_windows: tuple[int | None, ...] = ()  # per layer; empty = none
    learned_position_offset: int | None = None  # OPT adds a learned vector of row position + offset
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0  # 0: one dense FFN a layer
    num_experts_per_tok: int = 0
    router_score: RouterScore = "softmax"
    router_input: StreamPoint = "post_norm"
    normalize_expert_weights: bool = True
    predictor_input: StreamPoint | None = None  # None: no embedded predictor
    predictor_is_part_of_model: bool = False  # TurboSparse masks with it; elsewhere it only saves work
    predictor_threshold: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        """Raise CheckpointError when the numbers contradict each other."""
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rope is not None and self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd, rotary positions need pairs")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise CheckpointError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts {self.num_experts}"
            )
        if not self.norm_eps > 0:
            raise CheckpointError(f"the norms' eps is {self.norm_eps}, expected a number above 0")
        if self.router_score not in ROUTER_SCORES:
            raise CheckpointError(f"router score {self.router_score!r} is not one of {', '.join(ROUTER_SCORES)}")
        self._check_layouts()

    def _check_layouts(self) -> None:
        for name in ("rope_layers", "sliding_windows"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_hidden_layers:
                raise CheckpointError(
                    f"{name} lists {len(getattr(self, name))} layers, num_hidden_layers is {self.num_hidden_layers}"
                )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise CheckpointError(f"a sliding window in {self.sliding_windows} is below 1")

    def rotates(self, layer_idx: int) -> bool:
        """Whether this layer's queries and keys carry rotary positions."""
        return self.rope is not None and (not self.rope_layers or self.rope_layers[layer_idx])

    def window(self, layer_idx: int) -> int | None:
        """How many tokens back this layer sees, its own included; None = all."""
        return self.sliding_windows[layer_idx] if self.sliding_windows else None

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; `from_json` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_json(values: object) -> ModelConfig:
        """Raise ValueError for a field that is missing, unknown or of another type, CheckpointError for bad numbers."""
        return from_json(ModelConfig, values, "config")


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
