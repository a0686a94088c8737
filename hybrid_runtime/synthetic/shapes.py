"""The shapes of published models, as frozen descriptions: nothing here needs a checkpoint or a network.

Sizes of TurboSparse, Bamboo, ReluLLaMA, ProSparse, SmallThinker and SparseQwen2 are those of the published
configurations that the family registry is tested with, firing shares those of their papers. Rows marked "not read" come
from what is generally known of the model: its config.json has not been seen here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from hybrid_kernels.activation import Activation
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.errors import UsageError
from hybrid_runtime.model.weight_specs import ffn_names

SILU_GLU = Activation("silu_glu")
RELU_GLU = Activation("relu_glu")
DRELU = Activation("drelu")


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's sizes. layer_ranks: width of the predictors of each layer; empty where it embeds none.

    active: the published share of neurons that fire for a token; None where the activation leaves no exact zeros.
    """

    name: str
    config: ModelConfig
    active: float | None = None
    layer_ranks: tuple[int, ...] = ()

    def predictor_ranks(self) -> dict[str, int]:
        """By the FFN's prefix, as a store's manifest keeps them."""
        return {
            ffn: rank for layer_idx, rank in enumerate(self.layer_ranks) for ffn in ffn_names(self.config, layer_idx)
        }

    def with_layers(self, num_layers: int) -> Shape:
        """The first layers alone, each with its true shape."""
        config = replace(
            self.config,
            num_hidden_layers=num_layers,
            rope_layers=self.config.rope_layers[:num_layers],
            sliding_windows=self.config.sliding_windows[:num_layers],
        )
        return Shape(self.name, config, self.active, self.layer_ranks[:num_layers])


def find_shape(name: str) -> Shape:
    """The shape of a model by its short name; raise UsageError naming those that are known."""
    shape = SHAPES.get(name.lower())
    if shape is None:
        close = difflib.get_close_matches(name.lower(), list(SHAPES), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"--like {name}: {hint}known shapes are {', '.join(SHAPES)}")
    return shape


def _llama_like(**fields: Any) -> ModelConfig:
    """What most rows share; hidden_size is divided among the heads."""
    shared: dict[str, Any] = {
        "family": "llama",
        "activation": SILU_GLU,
        "norm_eps": 1e-5,
        "rope": RopeConfig(1e4),
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**(shared | fields))


def _opt(**fields: Any) -> ModelConfig:
    """LayerNorm, biases, learned positions, no gate."""
    return _llama_like(
        **{
            **fields,
            "family": "opt",
            "activation": Activation("relu"),
            "norm": "layer",
            "rope": None,
            "max_position_embeddings": 2048,
            "learned_position_offset": 2,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
        },
    )


_MISTRAL_7B: Mapping[str, Any] = MappingProxyType(
    {
        "family": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_windows": (4096,) * 32,
    }
)
_MIXTRAL_8X7B: Mapping[str, Any] = MappingProxyType(
    {
        **_MISTRAL_7B,
        "family": "mixtral",
        "rope": RopeConfig(1e6),
        "sliding_windows": (),
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
)
_LLAMA_2_7B: Mapping[str, Any] = MappingProxyType(  # not read
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    }
)
_LLAMA_2_13B: Mapping[str, Any] = MappingProxyType(  # not read
    {
        **_LLAMA_2_7B,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }
)
_PROSPARSE = Activation("fatrelu", 0.01)
_TINY: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
)

# Published: 40,320 in sum, and 1536 in layer 0. How the other 38,784 lie is not known: two multiples of 64 that sum so.
_TURBOSPARSE_MISTRAL_RANKS = (1536, *(1280,) * 17, *(1216,) * 14)
_TURBOSPARSE_MIXTRAL_RANKS = (*(896,) * 2, *(1024,) * 11, 1088, *(1024,) * 13, *(1088,) * 4, 1344)

_SHAPES = (
    Shape(
        "turbosparse-mistral",
        _llama_like(
            **{**_MISTRAL_7B, "family": "bamboo", "vocab_size": 32064, "activation": DRELU},
            predictor_input="pre_norm",
            predictor_is_part_of_model=True,
        ),
        active=0.10,
        layer_ranks=_TURBOSPARSE_MISTRAL_RANKS,
    ),
    Shape(
        "turbosparse-mixtral",
        _llama_like(
            **{**_MIXTRAL_8X7B, "family": "turbosparsemixtral", "vocab_size": 57024, "activation": DRELU},
            predictor_input="post_norm",
            predictor_is_part_of_model=True,
        ),
        active=0.15,
        layer_ranks=_TURBOSPARSE_MIXTRAL_RANKS,
    ),
    Shape("bamboo-7b", _llama_like(**{**_MISTRAL_7B, "family": "bamboo", "activation": DRELU}), active=0.10),
    Shape("mistral-7b", _llama_like(**_MISTRAL_7B)),  # not read; Bamboo, which has its sizes, was
    Shape("mixtral-8x7b", _llama_like(**_MIXTRAL_8X7B)),  # not read; TurboSparse-Mixtral was
    Shape("llama-2-7b", _llama_like(**_LLAMA_2_7B)),
    Shape("llama-2-13b", _llama_like(**_LLAMA_2_13B)),
    Shape(
        "relullama-7b",
        _llama_like(**{**_LLAMA_2_7B, "activation": RELU_GLU, "max_position_embeddings": 2048}),
        active=0.30,
    ),
    Shape("prosparse-llama-2-7b", _llama_like(**{**_LLAMA_2_7B, "activation": _PROSPARSE}), active=0.107),
    Shape("prosparse-llama-2-13b", _llama_like(**{**_LLAMA_2_13B, "activation": _PROSPARSE}), active=0.112),
    Shape(
        "sparseqwen2-7b",
        _llama_like(
            family="qwen2",
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32768,  # not read
            activation=DRELU,
            qkv_bias=True,
        ),
        active=0.10,  # not published; as Bamboo's
    ),
    Shape(
        "smallthinker-4b",
        _llama_like(
            family="smallthinker",
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=768,
            num_hidden_layers=32,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_position_embeddings=32768,  # not read
            activation=RELU_GLU,
            rope=RopeConfig(1.5e6),
            norm_eps=1e-6,  # not read
            num_experts=32,
            num_experts_per_tok=4,
            router_score="topk_sigmoid",
            router_input="layer_input",
            tie_word_embeddings=True,
        ),
        active=0.40,
    ),
    Shape(
        "opt-6.7b",  # not read
        _opt(
            vocab_size=50272,
            hidden_size=4096,
            intermediate_size=16384,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        ),
        active=0.03,
    ),
    Shape(
        "tinyllama-1.1b",  # not read
        _llama_like(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        ),
    ),
    Shape(
        "stories260k",
        _llama_like(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=128,
        ),
    ),
    # No published models: the paths of the TurboSparse models, and of two whose gate or up projection decides.
    Shape(
        "tiny-turbosparse",
        _llama_like(**_TINY, activation=DRELU, predictor_input="pre_norm", predictor_is_part_of_model=True),
        active=0.12,
        layer_ranks=(192, 256, 320),
    ),
    Shape(
        "tiny-turbosparse-mixture",
        _llama_like(
            **_TINY,
            activation=DRELU,
            predictor_input="post_norm",
            predictor_is_part_of_model=True,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        active=0.15,
        layer_ranks=(192, 256, 320),
    ),
    Shape("tiny-prosparse", _llama_like(**_TINY, activation=_PROSPARSE), active=0.11),
    Shape("tiny-opt", _opt(**{**_TINY, "num_key_value_heads": 8}), active=0.05),
)

SHAPES: Mapping[str, Shape] = MappingProxyType({shape.name: shape for shape in _SHAPES})
