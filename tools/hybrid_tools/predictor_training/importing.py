"""Predictors that others trained, into the folder where those of hybrid-predictors train would lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import filelock

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.errors import UsageError
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.predictor_files import (
    FORMAT_NAME,
    FORMAT_VERSION,
    LayerPredictors,
    PredictorHeader,
    write_header,
    write_layer,
)
from hybrid_runtime.store.reader import Store
from hybrid_tools.predictor_training.powerinfer import predictor_files, read_predictor, read_threshold
from hybrid_tools.predictor_training.ranks import layer_bytes
from hybrid_tools.predictor_training.run import LOCK


def import_powerinfer(store: Store, source: Path, folder: Path, row_format: RowFormat) -> PredictorHeader:
    """Read PowerInfer's folder layer by layer and leave its predictors in ours."""
    config, digest = store.manifest.config, store_digest(store)
    files = predictor_files(source, config)
    threshold = read_threshold(source)
    key = repr((digest, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files], row_format))
    data = f"data-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    layers = []
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            (folder / data).mkdir(exist_ok=True)
            for layer_idx, path in enumerate(files):
                fc1, fc2 = read_predictor(path, config)
                write_layer(folder / data, config, layer_idx, [(fc1, fc2)])
                layers.append(LayerPredictors(len(fc1), threshold, layer_bytes(config, row_format, len(fc1))))
            header = PredictorHeader(
                format=FORMAT_NAME,
                version=FORMAT_VERSION,
                model=store.manifest.model,
                model_digest=digest,
                source=f"PowerInfer, {source.name}",
                input="pre_norm",
                has_relu=True,
                row_kind=row_format.kind,
                row_group=row_format.group,
                layers=tuple(layers),
                perplexity=None,
                exact_perplexity=None,
                data=data,
            )
            write_header(folder, header)
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run trains predictors here; wait for it") from error
    return header
