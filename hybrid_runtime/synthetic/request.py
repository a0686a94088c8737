"""From what a user asks for to a synthetic store; what cannot be is refused by the option's name before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.errors import UsageError
from hybrid_runtime.progress import Progress
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.manifest import MANIFEST, read_manifest
from hybrid_runtime.store.reader import Store
from hybrid_runtime.stores import asked_quantization
from hybrid_runtime.synthetic.firing_rates import GATED_SKEW, UNGATED_SKEW, skew_limits
from hybrid_runtime.synthetic.shapes import Shape, find_shape
from hybrid_runtime.synthetic.vocabulary import synthetic_tokenizer
from hybrid_runtime.synthetic.weights import SOURCE_PREFIX, Firing, SyntheticWeights

SMALLEST_ACTIVE, LARGEST_ACTIVE = 0.005, 0.9
LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class SyntheticRequest:
    """like: a name of shapes.py. scale: share of its layers; num_layers: their number, instead.

    active: share of neurons that fire for a token, None: the model's published one. skew: share of neurons that makes
    80 % of all firings, None: what PowerInfer's paper found for such a model. quant, group: as of a conversion.
    """

    like: str
    scale: float | None = None
    num_layers: int | None = None
    active: float | None = None
    skew: float | None = None
    quant: str = "q4"
    group: int | None = None
    seed: int = 0


def make_synthetic(request: SyntheticRequest, folder: Path, progress: Progress) -> Store:
    """Write the store, or go on where the same request was interrupted. Raise UsageError before any work.

    An older synthetic store in the folder is replaced, a converted one is not.
    """
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        if not found.source.startswith(SOURCE_PREFIX):
            raise UsageError(f"{folder}: holds {found.model}, which is not synthetic; choose another folder")
    return convert(plan_synthetic(request, folder), progress)


def plan_synthetic(request: SyntheticRequest, folder: Path) -> Conversion:
    """What make_synthetic will write, and where."""
    published = find_shape(request.like)
    shape = published.with_layers(_num_layers(request, published))
    quantization = asked_quantization(request.quant, request.group)
    firing = _firing(request, shape)
    if firing is not None:
        _refuse_wide_group(quantization, shape)
    if not 0 <= request.seed <= LARGEST_SEED:
        raise UsageError(f"--seed {request.seed}: expected a whole number from 0 to {LARGEST_SEED}")
    source = SyntheticWeights(shape, quantization, firing, request.seed)
    return Conversion(source, folder, quantization, _name(shape, published), synthetic_tokenizer(shape.config).save)


def _name(shape: Shape, published: Shape) -> str:
    num_layers, of = shape.config.num_hidden_layers, published.config.num_hidden_layers
    return f"synthetic-{shape.name}" + (f"-{num_layers}-of-{of}-layers" if num_layers != of else "")


def _num_layers(request: SyntheticRequest, published: Shape) -> int:
    most = published.config.num_hidden_layers
    if request.num_layers is not None:
        if request.scale is not None:
            raise UsageError("--layers and --scale both say how many layers there are; give one of them")
        if not 1 <= request.num_layers <= most:
            raise UsageError(f"--layers {request.num_layers}: {published.name} has {most}; expected 1 to {most}")
        return request.num_layers
    scale = 1.0 if request.scale is None else request.scale
    if not 0 < scale <= 1:
        raise UsageError(f"--scale {scale}: expected a share of the layers, above 0 and up to 1")
    return max(1, round(scale * most))


def _firing(request: SyntheticRequest, shape: Shape) -> Firing | None:
    if shape.active is None:
        for option, value in (("--active", request.active), ("--skew", request.skew)):
            if value is not None:
                raise UsageError(
                    f"{option} {value}: {shape.name} computes {shape.config.activation.kind}, which leaves no exact "
                    "zeros, so every neuron fires; leave it out"
                )
        return None
    active = shape.active if request.active is None else request.active
    if not SMALLEST_ACTIVE <= active <= LARGEST_ACTIVE:
        raise UsageError(
            f"--active {active}: expected the share of neurons that fire for a token, "
            f"{SMALLEST_ACTIVE} to {LARGEST_ACTIVE}"
        )
    default_skew = GATED_SKEW if shape.config.activation.is_gated else UNGATED_SKEW
    skew = default_skew if request.skew is None else request.skew
    lowest, highest = (
        math.ceil(skew_limits(active)[0] * 1000) / 1000,
        math.floor(skew_limits(active)[1] * 1000) / 1000,
    )
    if not lowest <= skew <= highest:
        raise UsageError(
            f"--skew {skew}: where {active} of all neurons fire for a token, the share that makes 80 % of all firings "
            f"is between {lowest} (most uneven) and {highest} (all alike); choose one there, or another --active"
        )
    return Firing(active, skew)


def _refuse_wide_group(quantization: Quantization, shape: Shape) -> None:
    """The planted bias takes a group for itself: with nothing else in the row, every token would choose alike."""
    group = quantization.weights.group
    sizes = {"hidden_size": shape.config.hidden_size}
    if shape.layer_ranks:
        sizes["predictor rank"] = min(shape.layer_ranks)
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size < 2 * group:
        raise UsageError(f"--group {group}: too wide for {shape.name}, whose {name} is {size}; choose a smaller one")
