"""Published GGUF files, read by this package and by the `gguf` package."""

import gguf
import numpy as np
import pytest
from real.data import shared_data

from hybrid_runtime.checkpoints.gguf_file import open_gguf
from hybrid_runtime.checkpoints.tensor_file import read_raw_rows, read_rows
from hybrid_runtime.errors import CheckpointError

MODELS, VOCABULARIES = "models/stories260K", "tokenizers/llamacpp-vocab"
VERSION_1 = "tinyllamas-stories-260k-f32.gguf"


@pytest.mark.parametrize("name", ["stories260K-f32.gguf", "stories260K-Q8_0.gguf", "stories260K-Q4_0.gguf"])
def test_every_tensor_equals_the_gguf_packages_reading(name):
    path = shared_data(f"{MODELS}/{name}")
    found, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert list(found.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = found.tensors[tensor.name]
        assert (info.dtype, info.offset, info.num_bytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        ours = read_rows(info).numpy()
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        np.testing.assert_array_equal(ours.astype(np.float32), expected)
        if len(info.shape) == 2:
            raw = read_raw_rows(info, 0, info.shape[0])
            assert raw.numpy().tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize(
    "name",
    [
        f"{MODELS}/stories260K-f32.gguf",
        f"{MODELS}/stories260K-Q8_0.gguf",
        f"{MODELS}/stories260K-Q4_0.gguf",
        f"{VOCABULARIES}/ggml-vocab-gpt-2.gguf",
        f"{VOCABULARIES}/ggml-vocab-llama-spm.gguf",
    ],
)
def test_every_key_equals_the_gguf_packages_reading(name):
    path = shared_data(name)
    found, theirs = open_gguf(path), gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.metadata.items()
    } == expected
    assert found.metadata["tokenizer.ggml.tokens"]


def test_a_file_of_version_1_is_refused_by_its_version():
    path = shared_data(f"{MODELS}/{VERSION_1}")
    with pytest.raises(CheckpointError, match=r"260k-f32\.gguf: version 1 of GGUF .*expected version 2 or 3; convert"):
        open_gguf(path)


def test_every_other_published_file_opens():
    paths = [path for path in sorted(shared_data(".").rglob("*.gguf")) if path.name != VERSION_1]
    assert paths
    for path in paths:
        assert open_gguf(path).metadata
