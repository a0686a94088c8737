"""GGUF files that contradict themselves: each is refused by file and field, soon, and without taking memory."""

import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_runtime.checkpoints.gguf_file import open_gguf
from hybrid_runtime.checkpoints.tensor_file import read_raw_rows, read_rows
from hybrid_runtime.errors import CheckpointError, UnsupportedModel

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10
F32, F16, Q4_0, Q8_0, Q6_K, IQ2_XXS = 0, 1, 2, 8, 14, 16


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return u64(len(encoded)) + encoded


def key(name: str | bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + u32(value_type) + value


def tensor(name="t", dims=(8,), kind=F32, offset=0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(
    keys=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, num_keys=None, num_tensors=None, align=32
) -> bytes:
    num_keys = len(keys) if num_keys is None else num_keys
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    head = magic + u32(version) + u64(num_tensors) + u64(num_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data


def array(item_type: int, count: int, items: bytes = b"") -> bytes:
    return u32(item_type) + u64(count) + items


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(UINT8, 1, b"\x00")


ARCHITECTURE = key("general.architecture", STRING, text("llama"))
HALF_A_FILE = 1 << 40  # sparse: a length that the file's size does not refute
# name of the case -> (bytes of the file, what the message must say[, size to which the file is stretched])
MALFORMED = {
    "empty file": (b"", "magic needs 4 bytes"),
    "three bytes": (b"GGU", "magic needs 4 bytes"),
    "magic only": (b"GGUF", "version needs 4 bytes"),
    "no counts": (b"GGUF" + u32(3), "tensor count needs 8"),
    "another magic": (gguf(magic=b"GGUX"), "not a GGUF file"),
    "a format before GGUF": (gguf(magic=b"tjgg"), "a format before GGUF"),
    "a zip of pickles": (gguf(magic=b"PK\x03\x04"), "not a GGUF file"),
    "version 0": (gguf(version=0), "version 0"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0) + bytes(40), "version 1 of GGUF"),
    "version 4": (gguf(version=4), "version 4"),
    "big-endian version 3": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "big-endian version 1": (b"GGUF" + struct.pack(">III", 1, 0, 0), "big-endian"),
    "tensor count beyond the file": (gguf(num_tensors=1000), "tensor count is 1000"),
    "tensor count of 2^64-1": (gguf(num_tensors=2**64 - 1), f"tensor count is {2**64 - 1}"),
    "tensor count beyond the limit": (gguf(num_tensors=2**30), "expected at most 131072", HALF_A_FILE),
    "key count beyond the file": (gguf(num_keys=1000), "metadata count is 1000"),
    "key count of 2^63": (gguf(num_keys=2**63), f"metadata count is {2**63}"),
    "key count beyond the limit": (gguf(num_keys=2**30), "expected at most 65536", HALF_A_FILE),
    "one key missing": (gguf([ARCHITECTURE], num_keys=2, align=1), "metadata key 1 needs 8 bytes"),
    "one tensor missing": (gguf([ARCHITECTURE], num_tensors=1, align=1), "name of tensor 0 needs 8 bytes"),
    "tensor without a name": (gguf([], [tensor("")], bytes(64)), "tensor 0 has no name"),
    "key length beyond the file": (gguf([u64(2**40) + b"x" * 40]), "length of metadata key 0 is"),
    "key length of 2^64-1": (gguf([u64(2**64 - 1) + b"x" * 40]), "length of metadata key 0 is"),
    "key longer than 65535": (gguf([key("k" * 70_000, UINT8, b"\x00")]), "expected at most 65535"),
    "key without a name": (gguf([key("", UINT8, b"\x00")]), "without a name"),
    "key not UTF-8": (gguf([key(b"a\xff", UINT8, b"\x00")]), "metadata key 0 is not UTF-8 at its byte 1"),
    "duplicate key": (gguf([ARCHITECTURE, ARCHITECTURE]), "'general.architecture' is there twice"),
    "value type 13": (gguf([key("k", 13, bytes(8))]), "'k' has value type 13"),
    "value type 2^32-1": (gguf([key("k", 2**32 - 1, bytes(8))]), "'k' has value type 4294967295"),
    "truth value of 2": (gguf([key("k", BOOL, b"\x02")]), "truth value 2"),
    "truth values of 255": (gguf([key("k", ARRAY, array(BOOL, 2, b"\x01\xff"))]), "truth value 255"),
    "value cut short": (gguf([ARCHITECTURE], align=1)[:-2], "the 3 bytes left hold at most 3"),
    "string beyond the file": (gguf([key("k", STRING, u64(2**62))]), "length of 'k' is"),
    "string beyond the limit": (gguf([key("k", STRING, u64(2**39))]), "expected at most 67108864", HALF_A_FILE),
    "strings that add up": (
        gguf([key(f"k{i}", STRING, text(b"x" * (1 << 22))) for i in range(17)]),
        "header reaches byte",
    ),
    "string not UTF-8": (gguf([key("k", STRING, text(b"ab\xc3"))]), "'k' is not UTF-8 at its byte 2"),
    "array of 2^40": (gguf([key("k", ARRAY, array(UINT8, 2**40))]), "length of 'k' is 1099511627776"),
    "array of 2^61 doubles": (gguf([key("k", ARRAY, array(12, 2**61))]), "length of 'k' is"),
    "array beyond the limit": (gguf([key("k", ARRAY, array(UINT8, 2**38))]), "at most 4194304", HALF_A_FILE),
    "strings beyond the limit": (gguf([key("k", ARRAY, array(STRING, 2**30))]), "at most 4194304", HALF_A_FILE),
    "arrays that add up": (
        gguf([key(f"k{i}", ARRAY, array(UINT8, 2**20, bytes(2**20))) for i in range(5)]),
        "length of 'k4' is 1048576, expected at most 0",
    ),
    "array of unknown type": (gguf([key("k", ARRAY, array(99, 1))]), "'k' has value type 99"),
    "array of 2^40 arrays": (gguf([key("k", ARRAY, array(ARRAY, 2**40))]), "length of 'k' is"),
    "array nested too deeply": (gguf([key("k", ARRAY, nested(5))]), "nests arrays more than 4 deep"),
    "nesting bomb": (gguf([key("k", ARRAY, nested(300_000))]), "nests arrays more than 4 deep"),
    "string of an array beyond the file": (gguf([key("k", ARRAY, array(STRING, 1, u64(2**50)))]), "length of 'k'[0]"),
    "string of an array not UTF-8": (
        gguf([key("k", ARRAY, array(STRING, 3, text("a") + text(b"\xff") + text("c")))]),
        "'k'[1] is not UTF-8",
    ),
    "alignment 0": (gguf([key("general.alignment", UINT32, u32(0))]), "general.alignment is 0"),
    "alignment 24": (gguf([key("general.alignment", UINT32, u32(24))]), "general.alignment is 24"),
    "alignment 2^31": (gguf([key("general.alignment", UINT32, u32(2**31))]), "general.alignment is 2147483648"),
    "alignment negative": (gguf([key("general.alignment", INT32, u32(2**32 - 32))]), "general.alignment is -32"),
    "alignment as text": (gguf([key("general.alignment", STRING, text("32"))]), "general.alignment is '32'"),
    "alignment true": (gguf([key("general.alignment", BOOL, b"\x01")]), "general.alignment is True"),
    "5 dimensions": (gguf([], [tensor(dims=(1,) * 5)], bytes(64)), "has 5 dimensions"),
    "2^32-1 dimensions": (gguf([], [text("t") + u32(2**32 - 1) + bytes(64)]), "has 4294967295 dimensions"),
    "dimension 0": (gguf([], [tensor(dims=(8, 0))], bytes(64)), "expected none to be 0"),
    "dimension 2^63": (gguf([], [tensor(dims=(2**63,))], bytes(64)), "needs 36893488147419103232 bytes"),
    "dimensions that wrap 64 bits": (gguf([], [tensor(dims=(2**32, 2**32))], bytes(64)), f"needs {2**66} bytes"),
    "bytes that wrap 64 bits": (gguf([], [tensor(dims=(2**62, 1))], bytes(64)), f"needs {2**64} bytes"),
    "tensor name beyond the limit": (gguf([], [tensor("n" * 300)], bytes(64)), "expected at most 256"),
    "tensor name not UTF-8": (gguf([], [tensor(b"\xc0")], bytes(64)), "name of tensor 0 is not UTF-8"),
    "duplicate tensor": (gguf([], [tensor(), tensor(offset=32)], bytes(64)), "'t' is there twice"),
    "unnumbered type": (gguf([], [tensor(kind=999)], bytes(64)), "unknown (ggml type 999)"),
    "type that is not read": (gguf([], [tensor(dims=(256,), kind=IQ2_XXS)], bytes(96)), "IQ2_XXS (ggml type 16)"),
    "withdrawn type": (gguf([], [tensor(kind=4)], bytes(64)), "Q4_2 (withdrawn in 2023)"),
    "row of 31 in blocks of 32": (gguf([], [tensor(dims=(31, 32), kind=Q8_0)], bytes(2048)), "rows of 31"),
    "row of 128 in blocks of 256": (gguf([], [tensor(dims=(128, 2), kind=Q6_K)], bytes(2048)), "rows of 128"),
    "scalar in blocks": (gguf([], [tensor(dims=(), kind=Q4_0)], bytes(64)), "rows of 1,"),
    "offset unaligned": (gguf([], [tensor(offset=16)], bytes(64)), "multiple of the alignment 32"),
    "offset past the end": (gguf([], [tensor(offset=1 << 20)], bytes(64)), "at data offset 1048576"),
    "offset of 2^64-32": (gguf([], [tensor(offset=2**64 - 32)], bytes(64)), f"at data offset {2**64 - 32}"),
    "overlap": (gguf([], [tensor("a", (16,)), tensor("b", offset=32)], bytes(128)), "'b' has offset 32 and overlaps"),
    "the same bytes twice": (gguf([], [tensor("a"), tensor("b")], bytes(64)), "offset 0 and overlaps"),
    "hole": (gguf([], [tensor("a"), tensor("b", offset=64)], bytes(128)), "leaves a hole after tensor 'a'"),
    "hole at the start": (gguf([], [tensor(offset=32)], bytes(64)), "leaves a hole after the start"),
    "last tensor cut short": (gguf([], [tensor("a"), tensor("b", offset=32)], bytes(63)), "has 63 bytes of data"),
    "no data at all": (gguf([], [tensor(dims=(2,))], align=1), "needs 8 bytes at data offset 0"),
}  # fmt: skip


def write(path, content: bytes, size: int = 0):
    with path.open("wb") as file:
        file.write(content)
        file.truncate(max(size, len(content)))
    return path


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_file_and_field_within_two_seconds(case, tmp_path):
    content, expected, *size = MALFORMED[case]
    path = write(tmp_path / "model.gguf", content, *size)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert len(message) < 1000


def test_no_malformed_file_takes_more_than_500_mb(tmp_path):
    for number, (content, _, *size) in enumerate(MALFORMED.values()):
        write(tmp_path / f"{number}.gguf", content, *size)
    four_million_words = array(STRING, 1 << 22, text("word") * (1 << 22))
    write(tmp_path / "largest-allowed.gguf", gguf([key("k", ARRAY, four_million_words)]))
    script = f"""
import resource
from pathlib import Path
from hybrid_runtime.checkpoints.gguf_file import open_gguf
from hybrid_runtime.errors import CheckpointError
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 500_000_000, resource.RLIM_INFINITY))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        open_gguf(path)
    except CheckpointError:
        refused += 1
print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    refused, grown_kib = map(int, done.stdout.split())
    assert refused == len(MALFORMED)
    assert grown_kib < 500_000


def test_a_type_that_is_not_read_is_an_unsupported_model(tmp_path):
    path = write(tmp_path / "model.gguf", gguf([], [tensor(dims=(256,), kind=IQ2_XXS)], bytes(96)))
    with pytest.raises(UnsupportedModel, match=r"expected one of F32, F16, Q4_0, .*Q6_K"):
        open_gguf(path)


def test_powerinfers_placement_index_numbers_int32_as_18(tmp_path):
    ids = struct.pack("<8i", *range(8))
    content = gguf([ARCHITECTURE], [tensor("blk.0.gpu_bucket", (8,), 18)], ids, magic=b"PWRI")
    found = open_gguf(write(tmp_path / "model.gguf.generated.gpuidx", content))
    assert found.magic == "PWRI"
    assert read_rows(found.tensors["blk.0.gpu_bucket"]).tolist() == list(range(8))
    with pytest.raises(UnsupportedModel, match="IQ3_XXS"):
        open_gguf(write(tmp_path / "model.gguf", content.replace(b"PWRI", b"GGUF")))


def test_nested_arrays_and_every_value_type_are_read(tmp_path):
    words = array(STRING, 2, text("ab") + text("é"))
    keys = [
        key("u8", 0, b"\xff"),
        key("i8", 1, b"\xff"),
        key("u16", 2, b"\xff\xff"),
        key("i16", 3, b"\xff\xff"),
        key("u32", 4, u32(2**32 - 1)),
        key("i32", 5, u32(2**32 - 1)),
        key("f32", 6, struct.pack("<f", 0.5)),
        key("bool", 7, b"\x01"),
        key("string", 8, text("")),
        key("u64", 10, u64(2**64 - 1)),
        key("i64", 11, u64(2**64 - 1)),
        key("f64", 12, struct.pack("<d", 0.1)),
        key("bools", ARRAY, array(BOOL, 2, b"\x00\x01")),
        key("empty", ARRAY, array(STRING, 0)),
        key("nested", ARRAY, array(ARRAY, 2, words + array(INT32, 1, u32(7)))),
    ]
    metadata = open_gguf(write(tmp_path / "model.gguf", gguf(keys, version=2))).metadata
    assert metadata == {
        "u8": 255, "i8": -1, "u16": 65535, "i16": -1, "u32": 2**32 - 1, "i32": -1, "f32": 0.5, "bool": True,
        "string": "", "u64": 2**64 - 1, "i64": -1, "f64": 0.1, "bools": (False, True), "empty": (),
        "nested": (("ab", "é"), (7,)),
    }  # fmt: skip
    assert metadata["bool"] is True
    assert metadata["bools"][1] is True


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_any_power_of_two_aligns(alignment, tmp_path):
    offset = -(-32 // alignment) * alignment
    keys = [key("general.alignment", UINT32, u32(alignment))]
    data = bytes(offset) + struct.pack("<8f", *range(8))
    content = gguf(keys, [tensor("b", offset=offset), tensor("a")], data, align=alignment)
    found = open_gguf(write(tmp_path / "model.gguf", content))
    assert found.alignment == alignment
    assert read_rows(found.tensors["b"]).tolist() == list(range(8))


def sound_file() -> bytes:
    keys = [
        ARCHITECTURE,
        key("general.alignment", UINT32, u32(32)),
        key("tokens", ARRAY, array(STRING, 3, text("a") + text("bc") + text("é"))),
        key("nested", ARRAY, array(ARRAY, 1, array(FLOAT32, 2, bytes(8)))),
        key("flag", BOOL, b"\x01"),
    ]
    tensors = [tensor("a", (4, 2)), tensor("b", (32, 2), Q8_0, 32), tensor("c", (8,), F16, 128)]
    return gguf(keys, tensors, bytes(32 + 96 + 32))


def test_the_file_that_is_mutated_is_sound(tmp_path):
    found = open_gguf(write(tmp_path / "model.gguf", sound_file()))
    assert {name: info.shape for name, info in found.tensors.items()} == {"a": (2, 4), "b": (2, 32), "c": (8,)}
    assert [read_rows(info).shape for info in found.tensors.values()] == [(2, 4), (2, 32), (8,)]


@settings(max_examples=500, deadline=2000)
@given(st.data())
def test_a_mutated_file_is_read_or_refused_but_never_crashes(tmp_path_factory, data):
    content = bytearray(sound_file())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from([0, 1, 2, 7, 8, 9, 31, 127, 128, 255]) | st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = write(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(content))
    try:
        for info in open_gguf(path).tensors.values():
            assert info.offset + info.num_bytes <= len(content)
            read_rows(info)
            if len(info.shape) > 1:
                read_raw_rows(info, 0, info.shape[0])
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - most mutants are refused, some are sound
