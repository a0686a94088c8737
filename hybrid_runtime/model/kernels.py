"""Which kernels a model needs, so that all are compiled together, before the weights are read."""

from __future__ import annotations

from hybrid_kernels.linear.batch import HIDDEN
from hybrid_kernels.native.kernel_names import Kernel, kernel
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.store.layout import F32, Quantization

_ALWAYS = ("run_program", "work_until_closed", "attend", "sum_shares")


def needed_kernels(
    config: ModelConfig,
    quantization: Quantization,
    predictor_rows: RowFormat | None = None,
    *,
    tiered: bool = False,
) -> set[Kernel]:
    """Every kernel that prefill and decoding can come to. predictor_rows: of predictors that were trained; tiered:
    whether neurons are spread over tiers.
    """
    weights, outer = quantization.weights, quantization.finer
    needed = {kernel(name) for name in _ALWAYS}
    needed |= {kernel("begin_token", outer), kernel("project", outer), kernel("project", weights)}
    needed |= {kernel("run_neurons", weights)}
    if tiered:
        needed |= {kernel("split_neurons"), kernel("run_down", weights)}
    if config.num_experts:
        needed |= {kernel("route"), kernel("project", F32)}
    if predictor_rows is not None:
        needed.add(kernel("project", predictor_rows))
    for row_format in {weights, outer, predictor_rows} - {None}:
        assert row_format is not None
        if row_format.is_quantized:
            needed |= {kernel("quantize_batch", row_format), kernel("multiply_batch", row_format)}
        elif row_format.kind == "bf16":
            needed.add(kernel("unpack_matrix", row_format))
    if weights.is_quantized:
        needed |= {kernel("quantize_batch", HIDDEN), kernel("multiply_down", weights)}
    elif weights.kind == "f32" and (config.predictor_input is not None or predictor_rows is not None):
        needed.add(kernel("unpack_matrix", weights))
    return needed
