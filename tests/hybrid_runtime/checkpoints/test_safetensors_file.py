"""Headers of safetensors files: what the library writes is read back equal, what contradicts itself is refused."""

import json
import math
import os
import struct
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hybrid_runtime.checkpoints.safetensors_file import MAX_HEADER_BYTES, read_safetensors_header
from hybrid_runtime.checkpoints.tensor_file import read_raw_rows, read_rows
from hybrid_runtime.errors import CheckpointError, UnsupportedModel

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_with(data_bytes: int = 8, **tensors: object) -> bytes:
    return file_of(json.dumps(tensors).encode(), bytes(data_bytes))


A = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EIGHT = bytes(8)
# name of the case -> (bytes of the file, what the message must say)
MALFORMED = {
    "empty file": (b"", "has 0"),
    "seven bytes": (bytes(7), "has 7"),
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "header length is 1000"),
    "length beyond the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100000000"),
    "length of 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", "at most 100000000"),
    "length zero": (file_of(b""), "header starts with"),
    "header starts with a blank": (file_of(b" {}"), "header starts with"),
    "a pickle": (b"PK\x03\x04" + bytes(100), "header length"),
    "not UTF-8": (file_of(b'{"\xff":' + A + b"}", EIGHT), "not UTF-8 at byte 2"),
    "not JSON": (file_of(b"{nothing}"), "not JSON"),
    "JSON cut short": (file_of(b'{"a":' + A, EIGHT), "not JSON"),
    "two objects": (file_of(b"{}{}"), "not JSON"),
    "nesting bomb of lists": (file_of(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "nested too deeply"),
    "nesting bomb of objects": (file_of(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "nested too deeply"),
    "value bomb": (file_of(b'{"a":[' + b"[]," * 8_000_000 + b"[]]}"), "JSON values, expected at most"),
    "a shape of a million": (file_with(a=entry(shape=(9,) * 1_000_000)), "1000000 dimensions"),
    "duplicate tensor": (file_of(b'{"a":' + A + b',"a":' + A + b"}", EIGHT), "'a' twice"),
    "duplicate field": (file_of(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', EIGHT), "twice"),
    "duplicate metadata": (file_of(b'{"__metadata__":{"x":"1","x":"2"}}'), "'x' twice"),
    "duplicate spelt differently": (file_of(b'{"a":' + A + b',"\\u0061":' + A + b"}", EIGHT), "'a' twice"),
    "metadata no object": (file_with(0, __metadata__=["x"]), "__metadata__ is a list"),
    "metadata value no string": (file_with(0, __metadata__={"x": 1}), "__metadata__ 'x' is a int"),
    "entry no object": (file_with(a=[1]), "tensor 'a' has fields"),
    "field missing": (file_with(a={"dtype": "F32", "shape": [2]}), "expected data_offsets, dtype and shape"),
    "field too many": (file_with(a={**entry(), "strides": [1]}), "expected data_offsets, dtype and shape"),
    "unknown dtype": (file_with(a=entry(dtype="F31")), "dtype 'F31' is unknown"),
    "dtype no string": (file_with(a=entry(dtype=7)), "dtype is a int"),
    "dtype unhashable": (file_with(a=entry(dtype=[])), "dtype is a list"),
    "negative size": (file_with(a=entry(shape=(-2,))), "holds -2"),
    "fractional size": (file_with(a=entry(shape=(2.0,))), "holds 2.0"),
    "boolean size": (file_with(a=entry(shape=(True,))), "holds True"),
    "size of 2^64": (file_with(a=entry(shape=(2**64,))), f"holds {2**64}"),
    "sizes that wrap 64 bits": (file_with(a=entry(shape=(2**62, 4, 2))), "span 8 bytes"),
    "size of 5000 digits": (file_of(b'{"a":{"shape":[1' + b"0" * 5000 + b"]}}"), "not JSON"),
    "NaN size": (file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT), "not JSON"),
    "nested shape": (file_with(a=entry(shape=([2],))), "holds a list of 1"),
    "shape no list": (file_with(a={**entry(), "shape": 2}), "shape is a int"),
    "17 dimensions": (file_with(a=entry(shape=(1,) * 16 + (2,))), "17 dimensions"),
    "shape smaller than the span": (file_with(a=entry(shape=(1,))), "expected 4 for F32"),
    "offsets reversed": (file_with(a=entry(begin=8, end=0)), "end before they begin"),
    "offsets negative": (file_with(a=entry(begin=-8, end=0)), "holds -8"),
    "one offset": (file_with(a={**entry(), "data_offsets": [8]}), "has 1 numbers"),
    "offsets beyond the file": (file_with(4, a=entry()), "has 4 bytes of data"),
    "offsets of 2^63": (file_with(a=entry(begin=2**63 - 8, end=2**63)), "data_offsets holds"),
    "overlap": (file_with(12, a=entry(), b=entry(begin=4, end=12)), "'b' begins at 4 and overlaps tensor 'a'"),
    "the same bytes twice": (file_with(8, a=entry(), b=entry()), "begins at 0 and overlaps"),
    "hole between tensors": (file_with(20, a=entry(), b=entry(begin=12, end=20)), "leaves a hole after tensor 'a'"),
    "hole at the start": (file_with(16, a=entry(begin=8, end=16)), "leaves a hole after the start"),
    "trailing byte": (file_with(9, a=entry()), "1 bytes trail after tensor 'a'"),
    "data without tensors": (file_of(b"{}", EIGHT), "8 bytes trail"),
    "half a surrogate pair": (file_of(b'{"\\ud800":' + A + b"}", EIGHT), "no Unicode text"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_refused_by_file_and_field_within_two_seconds(case, tmp_path):
    content, expected = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path)
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert len(message) < 1000
    message.encode()  # printable, whatever the names hold


def test_no_malformed_header_takes_more_than_500_mb(tmp_path):
    for number, (content, _) in enumerate(MALFORMED.values()):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    script = f"""
import resource
from pathlib import Path
from hybrid_runtime.checkpoints.safetensors_file import read_safetensors_header
from hybrid_runtime.errors import CheckpointError
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 500_000_000, resource.RLIM_INFINITY))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        read_safetensors_header(path)
    except CheckpointError:
        refused += 1
print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    refused, grown_kib = map(int, done.stdout.split())
    assert refused == len(MALFORMED)
    assert grown_kib < 500_000


def test_an_unknown_dtype_is_an_unsupported_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_with(1, a=entry(dtype="F4", shape=(2,), end=1)))
    with pytest.raises(UnsupportedModel, match="expected one of BOOL"):
        read_safetensors_header(path)


def test_what_the_library_writes_is_read_back_equal(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        if dtype is torch.bool
        else (torch.randn(3, 5, generator=generator) * 50).abs().to(dtype)
        for name, dtype in DTYPES.items()
    }
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "cube": torch.arange(24.0).view(2, 3, 4)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_safetensors_header(path)
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        assert header[name].shape == tuple(tensor.shape)
        loaded = read_rows(header[name])
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
    for name in DTYPES:
        assert header[name].dtype == name


def test_an_empty_file_of_no_tensors_has_none(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(b'{"__metadata__":{"format":"pt"}}   '))
    assert read_safetensors_header(path) == {}


def test_a_header_of_many_tensors_opens_fast(tmp_path):
    count = 50_000  # more than any published shard
    header = {f"model.layers.{i}.mlp.experts.7.w1.weight": entry("U8", (1,), i, i + 1) for i in range(count)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(json.dumps(header).encode(), bytes(count)))
    start = time.monotonic()
    assert len(read_safetensors_header(path)) == count
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_path_that_is_no_file_is_refused(what, tmp_path):
    path = tmp_path if what == "folder" else tmp_path / "absent"
    with pytest.raises(CheckpointError, match=r"cannot be opened|not a regular file"):
        read_safetensors_header(path)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_safetensors_header(path)


def sound_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "model.a": entry("F32", (2, 3), 0, 24),
        "model.b": entry("BF16", (4,), 24, 32),
        "model.c": entry("BOOL", (2,), 32, 34),
    }
    return file_of(json.dumps(header).encode(), bytes(34))


@settings(max_examples=400, deadline=2000)
@given(st.data())
def test_a_mutated_file_is_read_or_refused_but_never_crashes(tmp_path_factory, data):
    content = bytearray(sound_file())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        for info in read_safetensors_header(path).values():
            assert info.offset + info.num_bytes <= len(content)
            read_rows(info)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - most mutants are refused, some are sound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
def test_one_bad_element_is_refused_with_its_index(dtype, bad, tmp_path):
    weight = torch.full((7, 5), torch.finfo(dtype).min, dtype=dtype)
    weight[1] = torch.finfo(dtype).max
    weight[4, 2] = bad
    path = tmp_path / "model.safetensors"
    save_file({"layers.3.up_proj": weight, "sound": torch.ones(2)}, path)
    info = read_safetensors_header(path)["layers.3.up_proj"]
    for read in (read_rows, lambda info, start=0, stop=7: read_raw_rows(info, start, stop)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'layers\.3\.up_proj', element \(4, 2\)"):
            read(info)
        with pytest.raises(CheckpointError, match=r"element \(4, 2\)"):
            read(info, 4, 5)
        read(info, 0, 4)
        read(info, 5, 7)


def test_a_bad_element_behind_the_first_chunk_keeps_its_index(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_runtime.checkpoints.tensor_file.CHUNK_BYTES", 64)
    weight = torch.zeros(40, 10)
    weight[33, 7] = math.nan
    path = tmp_path / "model.safetensors"
    save_file({"w": weight}, path)
    with pytest.raises(CheckpointError, match=r"element \(33, 7\)"):
        read_rows(read_safetensors_header(path)["w"], 20)


def test_a_truth_value_of_two_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(json.dumps({"mask": entry("BOOL", (3,), 0, 3)}).encode(), b"\x00\x01\x02"))
    with pytest.raises(CheckpointError, match=r"'mask', element \(2,\): expected 0 or 1"):
        read_rows(read_safetensors_header(path)["mask"])


def test_an_8_bit_float_opens_but_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        read_rows(read_safetensors_header(path)["w"])


@pytest.mark.parametrize("chunk_bytes", [16, 1 << 20])
@pytest.mark.parametrize("shape", [(1,), (9,), (9, 5), (4, 3, 5)], ids=str)
def test_a_range_of_rows_is_a_slice_of_the_tensor(shape, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_runtime.checkpoints.tensor_file.CHUNK_BYTES", chunk_bytes)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    path = tmp_path / "model.safetensors"
    save_file({"before": torch.ones(3), "w": weight}, path)
    info = read_safetensors_header(path)["w"]
    for start in range(shape[0] + 1):
        for stop in range(start, shape[0] + 1):
            assert torch.equal(read_rows(info, start, stop), weight[start:stop])
            raw = read_raw_rows(info, start, stop)
            assert raw.shape == (stop - start, weight[0].numel() * 2)
            assert torch.equal(raw.view(torch.bfloat16).view(-1), weight[start:stop].reshape(-1))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4), (4, 4)])
def test_rows_that_are_not_there_are_the_callers_mistake(start, stop, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(3, 2)}, path)
    with pytest.raises(ValueError, match="'w' asked for, it has 3"):
        read_rows(read_safetensors_header(path)["w"], start, stop)


def test_a_file_cut_short_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100, 2)}, path)
    info = read_safetensors_header(path)["w"]
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(read_rows(info, 0, 99), torch.ones(99, 2))
    with pytest.raises(CheckpointError, match="cut short"):
        read_rows(info)


def test_reading_rows_maps_nothing_and_needs_little_more_than_the_result(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(32 << 10, 1 << 10, dtype=torch.bfloat16)}, path)
    script = f"""
import resource
from pathlib import Path
from hybrid_runtime.checkpoints.safetensors_file import read_safetensors_header
from hybrid_runtime.checkpoints.tensor_file import read_rows
info = read_safetensors_header(Path({str(path)!r}))["w"]
read_rows(info, 0, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weight = read_rows(info)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert {str(path)!r} not in Path("/proc/self/maps").read_text()
"""
    grown_kib = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert grown_kib < (64 + 16) << 10  # the tensor's 64 MiB, a chunk of 8 and as much for the allocator
