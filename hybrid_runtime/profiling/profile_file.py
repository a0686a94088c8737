"""A profile on disk: a folder whose profile.json, written last, names the data that belongs to it.

profile.json                          what was profiled, on what; the data folder, and its files' digests
data-<id>/counts.safetensors          `LayerCounts` of every layer, the watched neurons, held-out tokens
data-<id>/samples-<layer>.safetensors the layer's part of the sample (samples.py)
work/                                 an unfinished run (run.py)
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.profiling.profile import LAYER_FIELDS, LayerCounts, Profile, TextDigest
from hybrid_runtime.profiling.samples import SampleShape
from hybrid_runtime.strict_json import parse_json_object
from hybrid_runtime.tensor_files import Expected, read_tensors, write_tensors
from hybrid_runtime.typed_json import from_json
from hybrid_runtime.whole_files import write_whole

FORMAT_NAME = "hybrid-runtime profile"
FORMAT_VERSION = 1
PROFILE = "profile.json"
PROFILE_FOLDER = "profile"
COUNTS = "counts.safetensors"
REMEDY = "run hybrid-profile again"
DATA_NAME = re.compile(r"data-[0-9a-f]{16}")
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Header:
    """profile.json. num_samples: tokens of the sample; data: name of the folder; counts_sha256: of its counts.

    samples_sha256: of each layer's part of the sample; none in profiles that were made before there were any.
    """

    format: str
    version: int
    model: str
    model_digest: str
    texts: tuple[TextDigest, ...]
    window: int
    num_samples: int
    data: str
    counts_sha256: str
    samples_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """One layer's part of the sample: priorities int64 [n], ascending; the tokens' inputs float16 [n, H]; for each of
    their k experts which one it was, int16 [n, k], and which of its neurons fired, uint8 [n, k, ceil(I / 8)].
    """

    priorities: torch.Tensor
    inputs: torch.Tensor
    experts: torch.Tensor
    active: torch.Tensor

    def of_expert(
        self, expert_idx: int, num_neurons: int, most: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [m, H] and bool [m, num_neurons] of the tokens that went there; of the first `most` of them."""
        tokens, slots = (each[:most] for each in (self.experts == expert_idx).nonzero(as_tuple=True))
        bits = self.active[tokens, slots].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1  # [m, I / 8, 8]
        return self.inputs[tokens].float(), bits.flatten(1)[:, :num_neurons].bool()


def write_counts(folder: Path, profile: Profile, num_samples: int, data: str) -> None:
    """Make the profile the folder's: counts, then profile.json, then away with what it no longer names.

    The samples lie in the data's folder already.
    """
    tensors = {"watched": profile.watched, "held_out": profile.held_out}
    write_tensors(folder / data / COUNTS, tensors | layer_tensors(profile.layers), {})
    header = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "model": profile.model,
        "model_digest": profile.model_digest,
        "texts": [{"sha256": text.sha256, "num_tokens": text.num_tokens} for text in profile.texts],
        "window": profile.window,
        "num_samples": num_samples,
        "data": data,
        "counts_sha256": _sha256(folder / data / COUNTS),
        "samples_sha256": [_sha256(samples_path(folder / data, idx)) for idx in range(len(profile.layers))],
    }
    write_whole(folder / PROFILE, (json.dumps(header, indent=1) + "\n").encode())
    remove_other_data(folder, data)


def remove_other_data(folder: Path, data: str) -> None:
    """Away with data that profile.json does not name; whatever else is in the folder is not ours."""
    for other in folder.glob("data-*"):
        if other.name != data and DATA_NAME.fullmatch(other.name):
            shutil.rmtree(other, ignore_errors=True)


def has_profile(folder: Path) -> bool:
    """Whether a profile was finished here."""
    return (folder / PROFILE).is_file()


def read_header(folder: Path) -> Header:
    """Raise CheckpointError for a folder without a profile, or with another version's."""
    path = folder / PROFILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {PROFILE}; {REMEDY}")
    values = parse_json_object(path.read_bytes(), str(path), remedy=REMEDY)
    if values.get("format") != FORMAT_NAME or values.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: is {values.get('format')!r} version {values.get('version')!r}, expected {FORMAT_NAME!r} version "
            f"{FORMAT_VERSION}; {REMEDY}"
        )
    try:
        header = from_json(Header, {"samples_sha256": [], **values}, PROFILE)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    if not DATA_NAME.fullmatch(header.data):
        raise CheckpointError(f"{path}: data is {header.data!r}, expected data-<16 hex digits>; {REMEDY}")
    if min([header.window, *(text.num_tokens for text in header.texts)], default=0) < 1 or header.num_samples < 0:
        raise CheckpointError(f"{path}: a count of tokens is below 1; {REMEDY}")
    return header


def read_profile(folder: Path, config: ModelConfig, model_digest: str | None = None) -> Profile:
    """The counts. Raise CheckpointError for files that are damaged, or of another model.

    model_digest: of the store that the profile must be of; None: any of the same shape.
    """
    header = read_header(folder)
    path = folder / header.data / COUNTS
    if model_digest is not None and header.model_digest != model_digest:
        raise CheckpointError(
            f"{folder / PROFILE}: is of {header.model}, store {header.model_digest[:12]}, expected "
            f"{model_digest[:12]}; the model was converted anew since: {REMEDY}"
        )
    if not path.is_file() or _sha256(path) != header.counts_sha256:
        raise CheckpointError(f"{path}: is missing or not as {PROFILE} has it; {REMEDY}")
    expected: Expected = {
        "watched": ((None,), torch.int64),
        "held_out": ((None, header.window), torch.int32),
        **expected_layers(config, None),
    }
    tensors = read_tensors(path, expected, REMEDY)
    profile = Profile(
        header.model,
        header.model_digest,
        header.texts,
        header.window,
        tensors["watched"],
        layers_of(tensors, config.num_hidden_layers),
        tensors["held_out"],
    )
    _check_counts(path, profile, config)
    return profile


def _check_counts(path: Path, profile: Profile, config: ModelConfig) -> None:
    """Raise CheckpointError for numbers that no text can have given."""
    watched, held_out = profile.watched, profile.held_out
    if not bool(((watched >= 0) & (watched < config.intermediate_size)).all()):
        raise CheckpointError(f"{path}: watched names neurons outside 0 to {config.intermediate_size - 1}; {REMEDY}")
    if not bool(((held_out >= 0) & (held_out < config.vocab_size)).all()):
        raise CheckpointError(f"{path}: held_out has tokens outside 0 to {config.vocab_size - 1}; {REMEDY}")
    passes = profile.num_tokens * (config.num_experts_per_tok if config.num_experts else 1)
    for layer_idx, layer in enumerate(profile.layers):
        if layer.co_fired.shape[1:] != (len(watched), len(watched)):
            raise CheckpointError(
                f"{path}: layers.{layer_idx}.co_fired has shape {tuple(layer.co_fired.shape)}, expected pairs of "
                f"{len(watched)} watched neurons; {REMEDY}"
            )
        if int(layer.tokens.sum()) != passes:
            raise CheckpointError(
                f"{path}: layers.{layer_idx}.tokens sum to {int(layer.tokens.sum())}, expected {passes}; {REMEDY}"
            )
        for name in LAYER_FIELDS:
            counts = getattr(layer, name)
            if counts.numel() and int(counts.min()) < 0:
                raise CheckpointError(f"{path}: layers.{layer_idx}.{name} has a count below 0; {REMEDY}")
        if bool((layer.fired > layer.tokens.unsqueeze(1)).any()):
            raise CheckpointError(
                f"{path}: layers.{layer_idx}.fired is more often than its expert got tokens; {REMEDY}"
            )


def samples_path(data_folder: Path, layer_idx: int) -> Path:
    """Where a layer's part of the sample lies."""
    return data_folder / f"samples-{layer_idx:05d}.safetensors"


def read_samples(folder: Path, config: ModelConfig, layer_idx: int) -> LayerSamples:
    """One layer's part of the sample, in memory. Raise CheckpointError for files that are not as profile.json says."""
    header = read_header(folder)
    shape, count = SampleShape.of(config), header.num_samples
    expected: Expected = {
        "priorities": ((count,), torch.int64),
        "inputs": ((count, shape.hidden_size), torch.float16),
        "experts": ((count, shape.num_slots), torch.int16),
        "active": ((count, shape.num_slots, shape.active_bytes), torch.uint8),
    }
    path = samples_path(folder / header.data, layer_idx)
    if header.samples_sha256 and path.is_file():
        digest = header.samples_sha256[layer_idx] if layer_idx < len(header.samples_sha256) else None
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: is not as {PROFILE} has it; {REMEDY}")
    samples = LayerSamples(**read_tensors(path, expected, REMEDY))
    experts, priorities = samples.experts, samples.priorities
    if not bool(((experts >= 0) & (experts < max(1, config.num_experts))).all()):
        raise CheckpointError(f"{path}: experts are outside 0 to {max(1, config.num_experts) - 1}; {REMEDY}")
    if not bool((priorities[1:] >= priorities[:-1]).all()):
        raise CheckpointError(f"{path}: priorities do not ascend; {REMEDY}")
    if not bool(samples.inputs.isfinite().all()):
        raise CheckpointError(f"{path}: inputs are not finite; {REMEDY}")
    return samples


def layer_tensors(layers: tuple[LayerCounts, ...]) -> dict[str, torch.Tensor]:
    """The counts by the names that they have in a file."""
    return {f"layers.{idx}.{name}": getattr(layer, name) for idx, layer in enumerate(layers) for name in LAYER_FIELDS}


def expected_layers(config: ModelConfig, num_watched: int | None) -> Expected:
    """What layer_tensors makes for this model; num_watched None: any number."""
    experts, neurons = max(1, config.num_experts), config.intermediate_size
    last = config.num_hidden_layers - 1
    shapes: dict[str, tuple[int | None, ...]] = {
        "fired": (experts, neurons),
        "tokens": (experts,),
        "active_squares": (experts,),
        "co_fired": (experts, num_watched, num_watched),
    }
    return {
        f"layers.{idx}.{name}": (shapes.get(name, follows), torch.int64)
        for idx in range(config.num_hidden_layers)
        for follows in [(experts, experts) if config.num_experts and idx < last else (0, 0)]
        for name in LAYER_FIELDS
    }


def layers_of(tensors: dict[str, torch.Tensor], num_layers: int) -> tuple[LayerCounts, ...]:
    """The inverse of layer_tensors."""
    return tuple(
        LayerCounts(*(tensors[f"layers.{layer_idx}.{name}"] for name in LAYER_FIELDS))
        for layer_idx in range(num_layers)
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
