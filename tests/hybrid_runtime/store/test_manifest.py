"""store.json is written back equal, and whatever it cannot be is refused, naming the file and the field."""

import pytest

from hybrid_runtime.errors import IncompleteStore, StoreError
from hybrid_runtime.store.manifest import FORMAT_VERSION, LARGEST_MANIFEST_BYTES, MANIFEST, is_store, read_manifest
from hybrid_runtime.store.reader import open_store

from .small_store import CONFIGS, DATA, FORMATS, damage, write_store

FIELDS = ["config", "data", "group", "model", "quant", "ranks", "sha256", "source"]


def refusal(folder) -> str:
    """The message with which the store is refused; every one names the manifest."""
    with pytest.raises(StoreError) as caught:
        open_store(folder)
    message = str(caught.value)
    assert str(folder / MANIFEST) in message
    assert "\n" not in message
    assert not isinstance(caught.value, IncompleteStore)
    return message


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_manifest_is_read_back_equal(tmp_path, name, row_format):
    manifest, _ = write_store(tmp_path, name, row_format)
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path).parts == manifest.parts


def test_is_store_tells_stores_finished_or_not(tmp_path):
    assert not is_store(tmp_path)
    assert not is_store(tmp_path / "absent")
    (tmp_path / DATA).mkdir()
    assert not is_store(tmp_path)
    (tmp_path / DATA / "journal.jsonl").touch()
    assert is_store(tmp_path)
    write_store(tmp_path / "finished")
    assert is_store(tmp_path / "finished")


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, 99, "1", [1], {}])
def test_an_unknown_version_is_refused_by_name(tmp_path, version):
    write_store(tmp_path)
    damage(tmp_path, version=version)
    message = refusal(tmp_path)
    assert f"format version {version!r}, this program reads {FORMAT_VERSION}; convert it again" in message


def test_a_newer_version_with_other_fields_is_called_by_its_version(tmp_path):
    write_store(tmp_path)
    damage(tmp_path, version=7, config={"new": 1}, extra=1, group=None)
    assert "format version 7" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["format", "version"])
def test_a_manifest_without_its_own_name_or_version_is_refused(tmp_path, field):
    write_store(tmp_path)
    damage(tmp_path, **{field: None})
    assert f"{field} {'is ' if field == 'format' else ''}None" in refusal(tmp_path)


def test_another_programs_json_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text('{"model_type": "llama"}')
    assert "format is None, expected 'hybrid-runtime store'" in refusal(tmp_path)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
    write_store(tmp_path)
    damage(tmp_path, **{field: None})
    assert f"fields ['{field}'] do not belong to version {FORMAT_VERSION}" in refusal(tmp_path)


def test_a_field_too_many_is_named(tmp_path):
    write_store(tmp_path)
    damage(tmp_path, compression="zstd")
    assert "fields ['compression'] do not belong" in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        "../x",
        "..",
        "",
        "/etc",
        "data-",
        "data-0123",
        "data-0123456789ABCDEF",
        f"{DATA}/",
        f"../{DATA}",
        f"{DATA}\n",
        3,
        [],
    ],
)
def test_a_data_folder_elsewhere_is_refused(tmp_path, data):
    write_store(tmp_path / "store")
    damage(tmp_path / "store", data=data)
    assert f"data is {data!r}, expected data-<16 hex digits>" in refusal(tmp_path / "store")


@pytest.mark.parametrize("length", [0, 1, 100, -2, -30])
def test_a_truncated_manifest_is_refused(tmp_path, length):
    write_store(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text[:length])
    assert "is not JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[]", "is a JSON list, expected an object"),
        (b"null", "is a JSON NoneType, expected an object"),
        (b"{'format': 1}", "is not JSON"),
        (b'{"version": NaN}', "NaN is no JSON number"),
        (b'{"\xff": 1}', "is not UTF-8 at byte 2"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 3_000_000, "JSON values, expected at most"),
    ],
    ids=["list", "null", "quotes", "NaN", "bytes", "deep", "bomb"],
)
def test_what_is_no_json_object_is_refused(tmp_path, text, words):
    (tmp_path / MANIFEST).write_bytes(text)
    assert words in refusal(tmp_path)


def test_a_key_twice_is_refused_by_name(tmp_path):
    write_store(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"group": 32', '"group": 32, "group": 64'))
    message = refusal(tmp_path)
    assert "group" in message
    assert "twice in one object" in message


def test_a_manifest_beyond_any_size_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(LARGEST_MANIFEST_BYTES + 1)  # a hole: takes no disk
    assert f"is {LARGEST_MANIFEST_BYTES + 1} bytes, expected at most {LARGEST_MANIFEST_BYTES}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "digests",
    [
        [],
        "x",
        {"head.bin": "0" * 63},
        {"head.bin": "0" * 65},
        {"head.bin": "G" * 64},
        {"head.bin": "A" * 64},
        {"head.bin": 0},
    ],
)
def test_what_is_no_digest_is_refused(tmp_path, digests):
    write_store(tmp_path)
    damage(tmp_path, sha256=digests)
    assert "sha256 does not hold digests" in refusal(tmp_path)


@pytest.mark.parametrize("ranks", [[], "x", {"a": 0}, {"a": -1}, {"a": 1.5}, {"a": "5"}, {"a": True}, {"a": 1 << 24}])
def test_what_is_no_rank_is_refused(tmp_path, ranks):
    write_store(tmp_path)
    damage(tmp_path, ranks=ranks)
    assert "ranks are not whole numbers above 0" in refusal(tmp_path)


@pytest.mark.parametrize("rank", [200, 4096])
def test_another_rank_contradicts_the_size_of_the_part(tmp_path, rank):
    write_store(tmp_path, "experts")
    damage(tmp_path, ranks={**CONFIGS["experts"][1], "layers.0.mlp.experts.0": rank})
    with pytest.raises(StoreError, match=r"layer-00000\.bin: has \d+ bytes, expected \d+"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant": "q5"}, "row kind 'q5' is not one of"),
        ({"quant": ["q4"]}, "row kind ['q4'] is not one of"),
        ({"quant": "f32"}, "a f32 row has no groups, found group 32"),
        ({"group": 0}, "group 0 of a q4 row is not one of"),
        ({"group": 33}, "group 33 of a q4 row is not one of"),
        ({"group": 32.0}, "group 32.0 is not a whole number"),
        ({"group": "32"}, "group '32' is not a whole number"),
        ({"group": True}, "group True is not a whole number"),
    ],
    ids=str,
)
def test_a_quantisation_that_no_kernel_reads_is_refused(tmp_path, changes, words):
    write_store(tmp_path)
    damage(tmp_path, **changes)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": []}, "config is list, expected an object"),
        ({"config": 3}, "config is int, expected an object"),
        ({"config__hidden_size": None}, "config lacks ['hidden_size'] and has unknown []"),
        ({"config__hidden_sise": 36}, "config lacks [] and has unknown ['hidden_sise']"),
        ({"config__activation__threshold": None}, "config.activation lacks ['threshold'] and has unknown []"),
        ({"config__activation": "relu"}, "config.activation is str, expected an object"),
        ({"config__activation__kind": "swish"}, "config.activation.kind is 'swish', expected one of"),
        ({"config__activation__threshold": 0.5}, "relu_glu has no threshold, found 0.5"),
        ({"config__rope": []}, "config.rope is list, expected an object"),
        ({"config__rope__kind": "ntk"}, "config.rope.kind is 'ntk', expected one of"),
        ({"config__rope__theta": 0}, "rope theta 0"),
        ({"config__hidden_size": 0}, "hidden_size is 0, expected at least 1"),
        ({"config__num_hidden_layers": -1}, "num_hidden_layers is -1, expected at least 1"),
        ({"config__num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"config__head_dim": 9}, "head_dim 9 is odd"),
        ({"config__num_experts": 2}, "num_experts_per_tok 0 is not between 1 and num_experts 2"),
        ({"config__norm_eps": 0}, "the norms' eps is 0"),
        ({"config__router_score": "x"}, "config.router_score is 'x', expected one of"),
        ({"config__sliding_windows": [4]}, "sliding_windows lists 1 layers, num_hidden_layers is 2"),
        ({"config__sliding_windows": [4, 0]}, "a sliding window in (4, 0) is below 1"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_is_refused(tmp_path, changes, words):
    write_store(tmp_path)
    damage(tmp_path, **changes)
    assert words in refusal(tmp_path)


WRONG_TYPES = [
    ("hidden_size", "36"),
    ("hidden_size", 36.0),
    ("hidden_size", [36]),
    ("num_hidden_layers", 2.0),
    ("num_attention_heads", "4"),
    ("vocab_size", True),
    ("intermediate_size", {}),
    ("norm_eps", "1e-5"),
    ("norm", "batch"),
    ("tie_word_embeddings", "no"),
    ("eos_token_ids", 2),
    ("sliding_windows", 4),
    ("predictor_input", "somewhere"),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=str)
def test_a_config_of_wrong_types_is_refused_by_field(tmp_path, field, value):
    write_store(tmp_path)
    damage(tmp_path, **{f"config__{field}": value})
    assert field in refusal(tmp_path)


@pytest.mark.parametrize("num_layers", [3, 10**9])
def test_a_number_of_layers_that_contradicts_the_parts_costs_nothing(tmp_path, num_layers):
    write_store(tmp_path)
    damage(tmp_path, config__num_hidden_layers=num_layers)
    assert f"num_hidden_layers {num_layers} means {num_layers + 2}" in refusal(tmp_path)


@pytest.mark.parametrize("version", [2.0, True, "2", None, 1])
def test_a_version_is_the_whole_number_or_refused(tmp_path, version):
    write_store(tmp_path)
    damage(tmp_path, version=version)
    assert f"format version {version!r}, this program reads 2" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size"])
def test_another_size_in_the_config_contradicts_the_parts(tmp_path, field):
    write_store(tmp_path)
    damage(tmp_path, **{f"config__{field}": 3})
    with pytest.raises(StoreError, match=r"\.bin: (is missing|has \d+ bytes, expected \d+); convert the model again"):
        open_store(tmp_path)
