"""Profiles of one model over several texts as one: counts add up, samples become a sample of all the texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch

from hybrid_runtime.errors import UsageError
from hybrid_runtime.profiling.profile import Profile, merged
from hybrid_runtime.profiling.profile_file import (
    read_header,
    read_profile,
    read_samples,
    samples_path,
    write_counts,
)
from hybrid_runtime.profiling.run import LOCK
from hybrid_runtime.profiling.samples import SampleShape, require_disk
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.reader import Store
from hybrid_runtime.tensor_files import write_tensors


def merge_profiles(
    store: Store, sources: Sequence[Path], folder: Path, sample_bytes: int, progress: Progress | None = None
) -> Profile:
    """Leave in folder, which may be one of the sources, the profile over all their texts.

    Raises UsageError for profiles that cannot be added up, CheckpointError for folders that hold none, BudgetError
    without room on the disk.
    """
    progress = progress or NoProgress()
    config, digest = store.manifest.config, store_digest(store)
    if len({path.resolve() for path in sources}) < 2:
        raise UsageError("--merge: name at least two folders, each once")
    total = merged({str(source): read_profile(source, config, digest) for source in sources})
    shape = SampleShape.of(config)
    _require_samples(sources, shape.rows_in(sample_bytes))
    kept = _kept(store, sources, shape.rows_in(sample_bytes))
    key = "".join(read_header(source).data for source in sources) + str(len(kept))
    data = f"data-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            require_disk(folder, shape, len(kept), copies=1)
            (folder / data).mkdir(exist_ok=True)
            progress.start(f"merging {len(sources)} profiles", config.num_hidden_layers, "layers")
            for layer_idx in range(config.num_hidden_layers):
                layers = [read_samples(source, config, layer_idx) for source in sources]
                tensors = {
                    name: torch.cat([getattr(layer, name) for layer in layers])[kept]
                    for name in ("priorities", "inputs", "experts", "active")
                }
                write_tensors(samples_path(folder / data, layer_idx), tensors, {})
                progress.advance(1)
            write_counts(folder, total, len(kept), data)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run writes its profile here; wait for it") from error
    finally:
        progress.done()
    return read_profile(folder, config, digest)


def _require_samples(sources: Sequence[Path], most: int) -> None:
    """Raise UsageError where some have a sample and some none: of the latter's tokens nothing is known to choose from.

    most: tokens that the merged sample may have.
    """
    without = [source for source in sources if read_header(source).num_samples == 0]
    if most and 0 < len(without) < len(sources):
        raise UsageError(
            f"--merge {without[0]}: has no sample of its tokens, so the merged profile could have none; leave it out, "
            "profile its text again with --samples, or give --samples 0 to add up the counts alone"
        )


def _kept(store: Store, sources: Sequence[Path], most: int) -> torch.Tensor:
    """Which tokens of all samples, side by side, make a uniform sample of all texts: int64 indices by priority.

    A sample that left tokens out holds every token of its text below its own largest priority, and says nothing of
    those above; so the smallest of these bounds holds for all.
    """
    config = store.manifest.config
    samples = [read_samples(source, config, 0).priorities for source in sources]
    profiles = [read_profile(source, config) for source in sources]
    bounds = [
        int(priorities[-1]) if len(priorities) else -1
        for priorities, profile in zip(samples, profiles, strict=True)
        if len(priorities) < profile.num_tokens
    ]
    together = torch.cat(samples)
    order = together.argsort(stable=True)
    if bounds:
        order = order[together[order] <= min(bounds)]
    return order[:most]
