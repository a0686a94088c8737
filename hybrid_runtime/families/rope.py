"""Rotary-position settings out of config.json: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`."""

from __future__ import annotations

from hybrid_runtime.config import RopeConfig
from hybrid_runtime.errors import UnsupportedModel
from hybrid_runtime.families.raw_config import RawConfig

DEFAULT_THETA = 10000.0


def parse_rope(raw: RawConfig, default_theta: float = DEFAULT_THETA) -> RopeConfig:
    """Raise UnsupportedModel for a scaling variant that is not known, CheckpointError for broken numbers."""
    scaling = raw.section("rope_scaling") or raw.section("rope_parameters")
    theta = raw.number("rope_theta", default_theta)
    partial = raw.number("partial_rotary_factor", 1.0)
    if scaling is not None:
        theta = scaling.number("rope_theta", theta)
        partial = scaling.number("partial_rotary_factor", partial)
    if partial != 1.0:
        raise UnsupportedModel(f"{raw.file}: partial_rotary_factor {partial} is not supported, only 1.0")
    if not theta > 0:
        raise raw.error("rope_theta", theta, "a number above 0")
    if scaling is None:
        return RopeConfig(theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    match kind:
        case "default":
            return _default(scaling, theta)
        case "linear":
            return RopeConfig(theta, "linear", factor=_positive(scaling, "factor"))
        case "llama3":
            return _llama3(raw, scaling, theta)
        case "yarn":
            return _yarn(raw, scaling, theta)
        case "longrope":
            return _longrope(raw, scaling, theta)
        case _:
            known = "default, linear, llama3, yarn, longrope"
            raise UnsupportedModel(f"{scaling.file}: rope_type {kind!r} is not supported (known: {known})")


def _default(scaling: RawConfig, theta: float) -> RopeConfig:
    nested = [key for key, value in scaling.values.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedModel(f"{scaling.file}: {', '.join(nested)}: settings by layer type are not supported")
    return RopeConfig(theta)


def _llama3(raw: RawConfig, scaling: RawConfig, theta: float) -> RopeConfig:
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    if not high > low:
        raise scaling.error("high_freq_factor", high, f"a number above low_freq_factor {low}")
    return RopeConfig(
        theta,
        "llama3",
        factor=_positive(scaling, "factor"),
        original_max_position_embeddings=_trained_length(raw, scaling),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(raw: RawConfig, scaling: RawConfig, theta: float) -> RopeConfig:
    if not theta > 1:
        raise raw.error("rope_theta", theta, "a number above 1 with yarn, which divides by its logarithm")
    trained = _trained_length(raw, scaling)
    return RopeConfig(
        theta,
        "yarn",
        factor=_factor(raw, scaling, trained),
        original_max_position_embeddings=trained,
        beta_fast=_positive(scaling, "beta_fast", 32.0),
        beta_slow=_positive(scaling, "beta_slow", 1.0),
        truncate=scaling.boolean("truncate", default=True),
        attention_factor=_positive(scaling, "attention_factor") if scaling.has("attention_factor") else None,
        mscale=scaling.number("mscale", 0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0),
    )


def _longrope(raw: RawConfig, scaling: RawConfig, theta: float) -> RopeConfig:
    trained = _trained_length(raw, scaling)
    if trained < 2:
        raise scaling.error("original_max_position_embeddings", trained, "at least 2 with longrope")
    short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
    for key, factors in (("short_factor", short), ("long_factor", long)):
        if not all(each > 0 for each in factors):
            raise scaling.error(key, factors, "numbers above 0")
    return RopeConfig(
        theta,
        "longrope",
        factor=_factor(raw, scaling, trained),
        original_max_position_embeddings=trained,
        attention_factor=_positive(scaling, "attention_factor") if scaling.has("attention_factor") else None,
        short_factor=short,
        long_factor=long,
    )


def _trained_length(raw: RawConfig, scaling: RawConfig) -> int:
    """Phi-3 writes it beside the section, and there it has priority; older checkpoints mean max_position_embeddings."""
    key = "original_max_position_embeddings"
    if raw.has(key):
        return raw.integer(key)
    return scaling.integer(key, raw.integer("max_position_embeddings", 2048))


def _factor(raw: RawConfig, scaling: RawConfig, trained: int) -> float:
    if scaling.has("factor"):
        return _positive(scaling, "factor")
    return raw.integer("max_position_embeddings") / trained


def _positive(raw: RawConfig, key: str, default: float | None = None) -> float:
    value = raw.number(key, default)
    if not value > 0:
        raise raw.error(key, value, "a number above 0")
    return value
