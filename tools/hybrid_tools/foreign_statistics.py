"""Statistics that others have published: PowerInfer's counts, Fiddler's order of experts, TEAL's histograms.

Everything here is read as data: sizes are checked before anything is unpacked, and nothing in a file is run.
"""

from __future__ import annotations

import hashlib
import re
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError, UnsupportedModel, UsageError
from hybrid_runtime.profiling.profile import LayerCounts, Profile, TextDigest
from hybrid_runtime.profiling.profile_file import read_profile, samples_path, write_counts
from hybrid_runtime.profiling.run import LOCK
from hybrid_runtime.profiling.samples import SampleShape
from hybrid_runtime.strict_json import parse_json_object, shown
from hybrid_runtime.tensor_files import write_tensors
from hybrid_tools.torch_files import read_torch_file

SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")
COUNT_BYTES = 8  # of the largest type that counts come in
SPARE_BYTES = 1 << 16  # of headers and names beside the values
LARGEST_COUNT = 1 << 48  # float64 holds sums over a model exactly
LARGEST_SQUARES = 1 << 62  # of a layer's neurons that fire, over all tokens
MOST_LAYERS = 1 << 12
MOST_EXPERTS = 1 << 12
MOST_BINS = 1 << 20
MOST_HISTOGRAMS = 1 << 14
MOST_UNPACKED_BYTES = 1 << 30  # of an archive's arrays together
LARGEST_JSON_BYTES = 1 << 26

_ACTIVATION_FILE = re.compile(r"activation_(\d+)(\.\w+)")
_HISTOGRAM = re.compile(r"layer_(\d+)\.((?:self_attn|mlp)\.h(?:1|1\.5|2))")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, slots=True)
class ExpertPopularity:
    """order: (layer, expert) of a whole model, the most popular first, each exactly once."""

    order: tuple[tuple[int, int], ...]

    @property
    def num_layers(self) -> int:
        """Layers, all with the same experts."""
        return 1 + max(layer_idx for layer_idx, _ in self.order)

    @property
    def num_experts(self) -> int:
        """Of one layer."""
        return len(self.order) // self.num_layers

    def places(self) -> np.ndarray:
        """int64 [L, E]: each expert's place in the whole order, 0 for the most popular."""
        places = np.empty((self.num_layers, self.num_experts), dtype=np.int64)
        for place, (layer_idx, expert_idx) in enumerate(self.order):
            places[layer_idx, expert_idx] = place
        return places

    def ranks(self) -> np.ndarray:
        """int64 [L, E]: each expert's place among those of its layer."""
        return self.places().argsort(axis=1).argsort(axis=1)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of one tensor. counts: int64 [B]; centers: float64 [B], ascending; the outermost bins hold the rest."""

    counts: np.ndarray
    centers: np.ndarray

    @property
    def num_values(self) -> int:
        """How many were counted."""
        return int(self.counts.sum())

    def magnitude_of(self, share: float) -> float:
        """The magnitude that this share of the values does not exceed, to one bin."""
        order = np.argsort(np.abs(self.centers), kind="stable")
        below = self.counts[order].cumsum()
        idx = int(np.searchsorted(below, share * self.num_values))
        return float(np.abs(self.centers[order[min(idx, len(order) - 1)]]))


@dataclass(frozen=True, slots=True)
class ActivationHistograms:
    """By tensor (self_attn.h1, mlp.h2, ...) one histogram a layer.

    TEAL's names: h1 is a block's input, h2 the input of o_proj or down_proj, mlp.h1.5 is SiLU(gate).
    """

    by_tensor: dict[str, tuple[Histogram, ...]]

    @property
    def num_layers(self) -> int:
        """The same for every tensor."""
        return len(next(iter(self.by_tensor.values())))


def read_powerinfer_statistics(
    folder: Path, config: ModelConfig, model: str, model_digest: str, num_tokens: int | None
) -> Profile:
    """The counts of activation_0, activation_1, ..., one file a layer, as a profile without pairs and samples.

    num_tokens: that were counted, which the files do not say; None: as many as the most frequent neuron fired, the
    fewest there can have been. `active_squares` is what it would be if neurons fired independently. Raises
    UnsupportedModel for mixtures, CheckpointError naming the file for anything but counts of this model's neurons.
    """
    paths = powerinfer_files(folder, config)
    layers = [_read_counts(path, config.intermediate_size) for path in paths]
    largest = max(int(counts.max()) for counts in layers)
    if largest == 0:
        raise CheckpointError(f"{folder}: no neuron of any layer fired; these are no counts of activations")
    if num_tokens is not None and num_tokens < largest:
        raise UsageError(
            f"{num_tokens} tokens: a neuron in {folder} fired {largest} times, which takes as many tokens at least"
        )
    total = num_tokens or largest
    most = LARGEST_SQUARES // config.intermediate_size**2
    if total > most:
        raise UsageError(
            f"{total} tokens: a profile of {config.intermediate_size} neurons a layer holds at most {most}"
        )
    digest = hashlib.sha256(torch.stack(layers).numpy().astype("<i8").tobytes()).hexdigest()
    return Profile(
        model=model,
        model_digest=model_digest,
        texts=(TextDigest(digest, total),),
        window=1,  # nobody knows, and a profile of known text must not be added to it
        watched=torch.zeros(0, dtype=torch.int64),
        layers=tuple(_layer_counts(counts, total) for counts in layers),
        held_out=torch.zeros(0, 1, dtype=torch.int32),
    )


def save_imported(profile: Profile, config: ModelConfig, folder: Path) -> Profile:
    """Leave the profile in the folder, in place of one that lies there, with a sample of no tokens."""
    key = profile.model_digest + "".join(f"{text.sha256} {text.num_tokens}" for text in profile.texts)
    data = f"data-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    shape = SampleShape.of(config)
    empty = {
        "priorities": torch.zeros(0, dtype=torch.int64),
        "inputs": torch.zeros(0, shape.hidden_size, dtype=torch.float16),
        "experts": torch.zeros(0, shape.num_slots, dtype=torch.int16),
        "active": torch.zeros(0, shape.num_slots, shape.active_bytes, dtype=torch.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            (folder / data).mkdir(exist_ok=True)
            for layer_idx in range(config.num_hidden_layers):
                write_tensors(samples_path(folder / data, layer_idx), empty, {})
            write_counts(folder, profile, 0, data)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run writes its profile here; wait for it") from error
    return read_profile(folder, config, profile.model_digest)


def read_expert_popularity(path: Path) -> ExpertPopularity:
    """Fiddler's order, {"order": [[layer, expert], ...]}. Raise CheckpointError for anything but each expert once."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path}: is larger than {LARGEST_JSON_BYTES} bytes; it is no order of experts")
    order = parse_json_object(path.read_bytes(), str(path)).get("order")
    if not isinstance(order, list) or not order:
        raise CheckpointError(f"{path}: order is {shown(order)}, expected a list of [layer, expert]")
    pairs = []
    for pair in order:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(each) is int for each in pair):
            raise CheckpointError(f"{path}: order holds {shown(pair)}, expected [layer, expert], two whole numbers")
        pairs.append((pair[0], pair[1]))
    layers, experts = (1 + max(each) for each in zip(*pairs, strict=True))
    if min(min(pair) for pair in pairs) < 0 or layers > MOST_LAYERS or experts > MOST_EXPERTS:
        raise CheckpointError(f"{path}: order names layer {layers - 1} and expert {experts - 1}; these are no indices")
    if len(set(pairs)) != len(pairs) or len(pairs) != layers * experts:
        raise CheckpointError(
            f"{path}: order has {len(pairs)} pairs, {len(set(pairs))} of them different, expected each of {layers} x "
            f"{experts} once"
        )
    return ExpertPopularity(tuple(pairs))


def read_histograms(path: Path) -> ActivationHistograms:
    """TEAL's histograms, gathered in one .npz with the names layer_LL.<tensor> and layer_LL.<tensor>_centers."""
    arrays = read_arrays(path, most_arrays=MOST_HISTOGRAMS, most_bytes=MOST_BINS * COUNT_BYTES)
    found: dict[str, dict[int, Histogram]] = {}
    for name, counts in arrays.items():
        if name.endswith("_centers") and name.removesuffix("_centers") in arrays:
            continue
        match = _HISTOGRAM.fullmatch(name)
        if match is None or f"{name}_centers" not in arrays:
            raise CheckpointError(
                f"{path}: holds {shown(name)}, expected layer_00.mlp.h1 and layer_00.mlp.h1_centers, and so on"
            )
        layers = found.setdefault(match[2], {})
        if int(match[1]) in layers:
            raise CheckpointError(f"{path}: has {match[2]} of layer {int(match[1])} twice")
        layers[int(match[1])] = _histogram(f"{path}: {name}", counts, arrays[f"{name}_centers"])
    num_layers = max(map(len, found.values()))
    for tensor, layers in found.items():
        wrong = sorted(set(range(num_layers)) ^ set(layers))
        if wrong:
            raise CheckpointError(f"{path}: lacks or adds {tensor} of layer {wrong[0]}; expected 0 to {num_layers - 1}")
    return ActivationHistograms(
        {tensor: tuple(found[tensor][idx] for idx in range(num_layers)) for tensor in sorted(found)}
    )


def _histogram(where: str, counts: np.ndarray, centers: np.ndarray) -> Histogram:
    if len(counts) != len(centers) or not len(counts):
        raise CheckpointError(f"{where}: has {len(counts)} counts and {len(centers)} centers, expected as many")
    if counts.dtype != np.int64 or counts.min() < 0 or counts.max() > LARGEST_COUNT or not counts.any():
        raise CheckpointError(f"{where}: holds what are no counts: expected whole numbers from 0, not all of them 0")
    centers = centers.astype(np.float64)
    if not np.isfinite(centers).all() or (np.diff(centers) < 0).any():
        raise CheckpointError(f"{where}_centers: are not ascending numbers")
    return Histogram(counts, centers)


def powerinfer_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The layers' files in the order of their numbers: 2 comes before 10. Raise CheckpointError naming a wrong one."""
    if config.num_experts:
        raise UnsupportedModel(f"{folder}: PowerInfer counted neurons of dense models, this one has experts")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _ACTIVATION_FILE.fullmatch(path.name)
        if match is None or match[2] not in SUFFIXES:
            continue
        layer_idx = int(match[1])
        if layer_idx in found:
            raise CheckpointError(f"{folder}: {found[layer_idx].name} and {path.name} are both of layer {layer_idx}")
        found[layer_idx] = path
    expected = range(config.num_hidden_layers)
    wrong = sorted(set(expected) ^ set(found))
    if wrong:
        names = ", ".join(f"activation_{idx}" for idx in wrong[:3])
        raise CheckpointError(
            f"{folder}: lacks or adds {names}; expected activation_0 to activation_{len(expected) - 1}, each as one of "
            f"{', '.join(SUFFIXES)}"
        )
    return [found[layer_idx] for layer_idx in expected]


def _read_counts(path: Path, num_neurons: int) -> torch.Tensor:
    """int64 [I]."""
    values = _read_values(path, num_neurons)
    if tuple(values.shape) != (num_neurons,):
        raise CheckpointError(
            f"{path}: has shape {tuple(values.shape)}, expected ({num_neurons},), one count a neuron; it is of another "
            "model"
        )
    if values.dtype == torch.bool or values.is_complex() or values.is_quantized:
        raise CheckpointError(f"{path}: holds {values.dtype}, expected whole numbers")
    if not values.is_floating_point():
        values = values.to(torch.int64)  # what uint64 has beyond comes out below 0
    else:
        values = values.double()
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{path}: holds NaN or Inf, expected counts; fetch it again")
        if (values != values.round()).any():
            raise CheckpointError(f"{path}: holds fractions, expected counts of firings")
    if (values < 0).any() or (values > LARGEST_COUNT).any():
        raise CheckpointError(f"{path}: holds a count below 0 or above {LARGEST_COUNT}; these are no counts of firings")
    return values.to(torch.int64)


def _read_values(path: Path, num_neurons: int) -> torch.Tensor:
    most_bytes = num_neurons * COUNT_BYTES
    if path.suffix == ".pt":
        values = read_torch_file(path, most_bytes)
        if not isinstance(values, torch.Tensor) or values.layout != torch.strided or values.device.type != "cpu":
            raise CheckpointError(f"{path}: holds {type(values).__name__}, expected one dense tensor of counts")
        return values.detach()
    size = path.stat().st_size
    if size > most_bytes + SPARE_BYTES:
        raise CheckpointError(f"{path}: is {size} bytes, expected at most {most_bytes + SPARE_BYTES}; not such a file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npy":
        with path.open("rb") as file:
            return torch.from_numpy(_read_array(file, str(path), most_bytes))
    arrays = read_arrays(path, most_arrays=1, most_bytes=most_bytes)
    return torch.from_numpy(*arrays.values())


def _read_safetensors(path: Path) -> torch.Tensor:
    """The file's size was checked, and its format has nothing compressed."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise CheckpointError(f"{path}: holds {len(names)} tensors, expected one")
            return torch.as_tensor(file.get_tensor(names[0])).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}; fetch it again") from error


def read_arrays(path: Path, most_arrays: int, most_bytes: int) -> dict[str, np.ndarray]:
    """Every array of an .npz by name. Raise CheckpointError for more arrays, or for a larger one.

    most_bytes: of one array. Sizes are those that the archive states, and no more than these is unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if not 1 <= len(members) <= most_arrays or len({member.filename for member in members}) < len(members):
                raise CheckpointError(
                    f"{path}: holds {len(members)} arrays, expected 1 to {most_arrays}, all different"
                )
            for member in members:
                if member.file_size > most_bytes + SPARE_BYTES:
                    raise CheckpointError(
                        f"{path}: {shown(member.filename)} unpacks to {member.file_size} bytes, expected at most "
                        f"{most_bytes + SPARE_BYTES}; not such a file"
                    )
            unpacked = sum(member.file_size for member in members)
            if unpacked > MOST_UNPACKED_BYTES:
                raise CheckpointError(f"{path}: unpacks to {unpacked} bytes, expected at most {MOST_UNPACKED_BYTES}")
            arrays = {}
            for member in members:
                with archive.open(member) as stream:
                    name = member.filename.removesuffix(".npy")
                    arrays[name] = _read_array(stream, f"{path}: {shown(name)}", most_bytes)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read as .npz: {error}; fetch it again") from error
    return arrays


def _read_array(stream: IO[bytes], where: str, most_bytes: int) -> np.ndarray:
    """One array in NumPy's format: numbers only, of which the stream must hold as many as the header says."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise CheckpointError(f"{where}: is of NumPy's format {version}, expected 1.0 or 2.0")
        shape, _, dtype = _HEADERS[version](stream)
    except (ValueError, SyntaxError, tokenize.TokenError, EOFError) as error:
        raise CheckpointError(f"{where}: has no header of NumPy's: {error}; fetch it again") from error
    if dtype.kind not in "iuf" or dtype.itemsize > COUNT_BYTES:
        raise CheckpointError(f"{where}: holds {dtype}, expected numbers of at most {COUNT_BYTES} bytes")
    if len(shape) != 1:
        raise CheckpointError(f"{where}: has shape {shape}, expected one dimension")
    num_bytes = shape[0] * dtype.itemsize
    if not 0 <= num_bytes <= most_bytes:
        raise CheckpointError(f"{where}: is {num_bytes} bytes, expected at most {most_bytes}; not such a file")
    values = stream.read(num_bytes + 1)
    if len(values) != num_bytes:
        raise CheckpointError(f"{where}: does not hold the {num_bytes} bytes that its header says; fetch it again")
    native = np.frombuffer(values, dtype=dtype)
    return native.astype(np.int64 if dtype.kind in "iu" else np.float64)


def _layer_counts(counts: torch.Tensor, num_tokens: int) -> LayerCounts:
    """counts: int64 [I]. The spread of how many neurons fire is unknown: as if each fired by itself."""
    frequencies = counts.double() / num_tokens
    variance = (frequencies * (1 - frequencies)).sum()
    mean_square = variance + frequencies.sum().square()
    return LayerCounts(
        fired=counts.unsqueeze(0),
        tokens=torch.tensor([num_tokens]),
        active_squares=(mean_square * num_tokens).round().to(torch.int64).unsqueeze(0),
        co_fired=torch.zeros(1, 0, 0, dtype=torch.int64),
        follows=torch.zeros(0, 0, dtype=torch.int64),
    )
