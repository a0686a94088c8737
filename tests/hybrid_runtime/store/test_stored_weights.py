"""A store packed again: lossless where the new format holds what the old one stood for, else rounded once more."""

import pytest
import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.stored_weights import StoredWeights
from hybrid_runtime.stores import ModelRequest, convert_model

from ..small_models import LLAMA, TURBOSPARSE, write_model  # noqa: TID252  # absolute names are the runtime's

Q8, Q4, F32 = (Quantization(RowFormat(*each)) for each in (("q8", 32), ("q4", 32), ("f32",)))


@pytest.fixture(scope="module", params=[LLAMA, TURBOSPARSE], ids=["llama", "turbosparse"])
def store(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    published = write_model(folder / "published", request.param)
    return convert_model(ModelRequest(str(published), "q8"), folder / "q8", folder / "cache", NoProgress())


def repacked(store, quantization, folder):
    return convert(Conversion(StoredWeights(store), folder, quantization, "again", lambda _: None))


def weights_of(store):
    return {name: weight for part in store.read_parts(store.manifest.parts) for name, weight in part.items()}


def values(weight):
    if isinstance(weight, torch.Tensor):
        return weight
    columns = weight.columns if isinstance(weight, PackedMatrix) else weight.hidden_size
    rows = weight.rows if isinstance(weight, PackedMatrix) else weight.data.flatten(0, 1)
    return dequantize_rows(rows, columns, weight.row_format)


def test_f32_of_a_q8_store_holds_exactly_what_q8_stands_for(store, tmp_path):
    before, after = weights_of(store), weights_of(repacked(store, F32, tmp_path / "f32"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(values(weight), values(before[name])), name


def test_same_format_gives_the_same_bytes(store, tmp_path):
    again = repacked(store, Q8, tmp_path / "q8")
    for part in store.manifest.parts:
        assert (again.data_folder / part.file).read_bytes() == (store.data_folder / part.file).read_bytes()
    again.verify()


def test_q4_of_a_q8_store_is_q4_of_its_values_and_its_finer_parts_are_kept(store, tmp_path):
    before, after = weights_of(store), weights_of(repacked(store, Q4, tmp_path / "q4"))
    formats = set()
    for name, weight in after.items():
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, before[name]), name
            continue
        rows = weight.data.flatten(0, 1) if isinstance(weight, Bundles) else weight.rows
        assert torch.equal(rows, quantize_rows(values(before[name]), weight.row_format)), name
        formats.add(weight.row_format.kind)
    assert formats >= {"q4", "q8"}  # embedding and head stay at 8 bits


def test_source_tells_stores_apart_and_one_store_from_itself_never(store, tmp_path):
    other = repacked(store, Q4, tmp_path / "q4")
    assert StoredWeights(store).fingerprint() == StoredWeights(store).fingerprint()
    assert StoredWeights(store).fingerprint() != StoredWeights(other).fingerprint()
    assert StoredWeights(store).largest_held_bytes == max(part.num_bytes for part in store.manifest.parts)
