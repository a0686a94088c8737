"""Models that are only a manifest, profiles and machines with round numbers: what placement's tests plan with."""

from __future__ import annotations

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.model.weight_specs import ffn_names
from hybrid_runtime.placement.decode_time import DecodeConditions
from hybrid_runtime.profiling.profile import LayerCounts, Profile, TextDigest
from hybrid_runtime.speeds.disk import DiskSpeeds
from hybrid_runtime.speeds.gpu import GpuSpeeds
from hybrid_runtime.speeds.kernel_speeds import KernelSpeeds
from hybrid_runtime.speeds.machine_speeds import FORMAT_VERSION, MachineSpeeds
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.manifest import Manifest

Q4, Q8, F32 = RowFormat("q4", 32), RowFormat("q8", 32), RowFormat("f32")
DIGEST = "0" * 64
NUM_TOKENS = 1000  # that a profile counted
GPU = GpuSpeeds("made up", 8 << 30, 400e9, 20e9, 20e9, 10e-6, 2e-6)


def config_of(**fields) -> ModelConfig:
    shared = {
        "family": "mistral",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "activation": Activation("drelu"),
        "norm_eps": 1e-5,
        "rope": RopeConfig(1e4),
    }
    return ModelConfig(**(shared | fields))


def mixture_of(**fields) -> ModelConfig:
    return config_of(**({"num_experts": 4, "num_experts_per_tok": 2} | fields))


def manifest_of(config: ModelConfig, row_format: RowFormat = Q4, rank: int = 8) -> Manifest:
    ranks = {}
    if config.predictor_input is not None:
        layers = range(config.num_hidden_layers)
        ranks = {name: rank for layer_idx in layers for name in ffn_names(config, layer_idx)}
    return Manifest("made-up", config, Quantization(row_format), ranks, "data-0123456789abcdef", {}, "x")


def profile_of(config: ModelConfig, shares=None) -> Profile:
    """shares: by layer, how often the likeliest neuron fires for a token of its expert; the others fire less and less.

    Every expert gets as many tokens as the others.
    """
    shares = shares or [0.5] * config.num_hidden_layers
    experts, neurons = max(1, config.num_experts), config.intermediate_size
    each = NUM_TOKENS * max(1, config.num_experts_per_tok) // experts
    layers = []
    for share in shares:
        fired = (each * share * 0.97 ** torch.arange(neurons, dtype=torch.float64)).long()
        nothing = torch.zeros(0, 0, dtype=torch.int64)
        tokens = torch.full((experts,), each)
        layers.append(LayerCounts(fired.repeat(experts, 1), tokens, torch.zeros(experts).long(), nothing, nothing))
    texts = (TextDigest("a" * 64, NUM_TOKENS),)
    return Profile("made-up", DIGEST, texts, 64, torch.zeros(0).long(), tuple(layers), torch.zeros(0, 64).int())


def kernel_of(row_format: RowFormat = Q4, **fields) -> KernelSpeeds:
    values = {
        "operation_s": 4e-6,
        "row_s": 8e-9,
        "cached_bytes_per_s": 64e9,
        "dense_bytes_per_s": 16e9,
        "sparse_bytes_per_s": 8e9,
        "gates_bytes_per_s": 12e9,
        "attention_value_s": 1e-10,
    }
    return KernelSpeeds(row_format.kind, row_format.group, 2, **(values | fields))


def speeds_of(*kernels: KernelSpeeds, cache_bytes: int = 0, gpu: GpuSpeeds | None = None) -> MachineSpeeds:
    return MachineSpeeds(
        FORMAT_VERSION,
        "made up",
        "2026-01-01T00:00:00Z",
        "a processor",
        2,
        cache_bytes,
        20e9,
        DiskSpeeds(50_000.0, 1e9, past_cache=True),
        gpu,
        kernels or tuple(kernel_of(each) for each in (Q4, Q8, F32, RowFormat("bf16"))),
    )


def conditions_of(rows=NeuronRows(300, 60, 60), **fields) -> DecodeConditions:  # noqa: B008  # frozen
    values = {"every_gate": True, "uses_predictor": False, "mean_length": 32.0, "kv_dtype": "f16"}
    return DecodeConditions(rows, **(values | fields))
