"""A batch's bundles are those of the store, wherever they are and however many."""

from __future__ import annotations

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.tiers.layout import DISK, GPU, RAM
from hybrid_runtime.tiers import bundles as bundles_module

from ..model import published_models as models  # noqa: TID252
from ..model.tiny_models import load, write_folder  # noqa: TID252
from .tiered_models import plan_of, random_tiers, spread


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tensors = models.turbosparse_mixtral_tensors(shift=0.4, seed=3)
    original = write_folder(folder / "original", models.TURBOSPARSE_MIXTRAL, tensors)
    return load(original, folder / "store", RowFormat("q4", 32))


@pytest.mark.parametrize("gathered_bytes", [1, 4000, 1 << 24])
@pytest.mark.parametrize("read_bytes", [1, 4096, 1 << 22])
def test_gathered_bundles_are_the_stores(model, monkeypatch, gathered_bytes, read_bytes):
    monkeypatch.setattr(bundles_module, "GATHERED_BYTES", gathered_bytes)
    monkeypatch.setattr(bundles_module, "READ_BYTES", max(read_bytes, 3 * 64 * 20))
    weights = spread(model.store, 5)
    generator = torch.Generator().manual_seed(2)
    for layer, plain in zip(weights.layers, model.weights.layers, strict=True):
        for ffn, expected in zip(layer.experts, plain.experts, strict=True):
            neurons = torch.rand(ffn.bundles.num_neurons, generator=generator).lt(0.4).nonzero().squeeze(1)
            seen = []
            for some, block in ffn.tiered_bundles.gathered(neurons):
                assert torch.equal(block.data, expected.plain_bundles.data[some])
                seen.append(some)
            assert torch.equal(torch.cat(seen), neurons)


def test_loaded_bytes_are_those_of_the_plan(model):
    manifest = model.store.manifest
    for seed in range(4):
        merges, tiers = random_tiers(manifest, seed)
        plan = plan_of(manifest, merges, tiers)
        weights = spread(model.store, seed, points_and_tiers=(merges, tiers))
        assert weights.tiering.gpu_bytes == plan.neuron_bytes["gpu"]
        for layer, of_layer in zip(weights.layers, tiers, strict=True):
            block = layer.experts[0].tiered_bundles
            for data, tier in ((block.hot, GPU), (block.ram, RAM)):
                assert len(data) == int((of_layer == tier).sum())
            assert sum(int((ffn.tiered_bundles.homes == DISK).sum()) for ffn in layer.experts) == int(
                (of_layer == DISK).sum()
            )
