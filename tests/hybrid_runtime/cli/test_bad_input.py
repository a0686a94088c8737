"""Whatever is wrong with the model, the prompt or a flag: one line, exit code 2, soon, and no trace left."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hybrid_runtime.cli.run import main
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.stores import ModelRequest, convert_model

from ..model.conftest import one_thread  # noqa: F401, TID252  # a fixture
from ..small_models import NUM_TOKENS  # noqa: TID252  # absolute names are the runtime's

SHARDS = [f"model-{idx:05d}-of-00003.safetensors" for idx in (1, 2, 3)]


def test_the_sound_model_is_not_refused(sound, tmp_path, capsys):
    arguments = ["--model", str(sound), "--cache-dir", str(tmp_path), "--threads", "1", "--prompt", "Hello", "-n", "2"]
    assert main(arguments) == 0
    assert len(capsys.readouterr().out) > 1


def set_header(path, header, *, claimed=None):
    """A safetensors file with this header (bytes) in front of its tensors' bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + data[8 + length :])


def edit_header(path, edit):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    set_header(path, json.dumps(header).encode())


def first_tensor(header):
    return next(value for name, value in header.items() if name != "__metadata__")


def move_offsets(header):
    first_tensor(header)["data_offsets"] = [0, 1 << 60]


def overlap(header):
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    tensors[1]["data_offsets"] = tensors[0]["data_offsets"]


def huge_shape(header):
    first_tensor(header)["shape"] = [1 << 40, 1 << 40]


def unknown_dtype(header):
    first_tensor(header)["dtype"] = "Q3_X"


def truncate(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: keep(len(data)) if callable(keep) else keep])


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        config = {name: value for name, value in (config | changes).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def set_element(name, value):
    def edit(folder):
        for shard in SHARDS:
            tensors = load_file(folder / shard)
            if name in tensors:
                tensors[name].view(-1)[3] = value
                save_file(tensors, folder / shard, metadata={"format": "pt"})

    return edit


def edit_tokenizer(**changes):
    def edit(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def drop_from_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))


def grow_tokenizer(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = dict(tokenizer["added_tokens"][0], id=NUM_TOKENS, content="<one-too-many>")
    tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))


def shard(idx, action):
    return lambda folder: action(folder / SHARDS[idx])


MODELS = {
    "header-length-huge": (shard(0, lambda path: set_header(path, b"{}", claimed=1 << 62)), "header"),
    "header-length-zero": (shard(0, lambda path: set_header(path, b"", claimed=0)), "header"),
    "header-not-json": (shard(0, lambda path: set_header(path, b"{" * 500)), "header"),
    "header-deep": (shard(0, lambda path: set_header(path, b"[" * 100_000)), "header"),
    "header-not-utf8": (shard(0, lambda path: set_header(path, b'{"\xff": 1}')), "header"),
    "header-duplicate-key": (shard(0, lambda path: set_header(path, b'{"a": {}, "a": {}}')), "a"),
    "offsets-beyond-the-file": (shard(0, lambda path: edit_header(path, move_offsets)), "bytes"),
    "offsets-overlap": (shard(0, lambda path: edit_header(path, overlap)), SHARDS[0]),
    "shape-overflows": (shard(0, lambda path: edit_header(path, huge_shape)), SHARDS[0]),
    "dtype-unknown": (shard(0, lambda path: edit_header(path, unknown_dtype)), "Q3_X"),
    "shard-empty": (shard(1, lambda path: truncate(path, 0)), SHARDS[1]),
    "shard-of-7-bytes": (shard(1, lambda path: truncate(path, 7)), SHARDS[1]),
    "shard-of-8-bytes": (shard(1, lambda path: truncate(path, 8)), SHARDS[1]),
    "shard-half": (shard(1, lambda path: truncate(path, lambda size: size // 2)), SHARDS[1]),
    "shard-one-byte-short": (shard(2, lambda path: truncate(path, lambda size: size - 1)), SHARDS[2]),
    "shard-missing": (shard(1, Path.unlink), SHARDS[1]),
    "shard-is-a-folder": (shard(1, lambda path: (path.unlink(), path.mkdir())), SHARDS[1]),
    "shard-extra": (
        lambda folder: shutil.copy(folder / SHARDS[0], folder / "model-00004-of-00003.safetensors"),
        "00004",
    ),
    "index-lacks-a-tensor": (drop_from_index, "model.norm.weight"),
    "index-not-json": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json"),
    "nan-in-a-matrix": (set_element("model.layers.0.self_attn.q_proj.weight", float("nan")), "q_proj"),
    "inf-in-a-norm": (set_element("model.layers.1.input_layernorm.weight", float("inf")), "input_layernorm"),
    "nan-in-a-down-projection": (set_element("model.layers.1.mlp.down_proj.weight", float("nan")), "down_proj"),
    "nan-in-the-head": (set_element("lm_head.weight", float("-inf")), "lm_head"),
    "config-missing": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config-not-json": (lambda folder: (folder / "config.json").write_text("{]"), "config.json"),
    "config-is-a-list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "config-without-heads": (edit_config(num_attention_heads=...), "num_attention_heads"),
    "config-of-an-unknown-model": (edit_config(model_type="mamba3"), "mamba3"),
    "config-vocab-plus-1": (edit_config(vocab_size=NUM_TOKENS + 1), "config says"),
    "config-vocab-minus-1": (edit_config(vocab_size=NUM_TOKENS - 1), "config says"),
    "config-heads-do-not-divide": (edit_config(num_attention_heads=5), "num_attention_heads"),
    "config-kv-heads-do-not-divide": (edit_config(num_key_value_heads=3), "num_key_value_heads"),
    "config-heads-mismatch": (edit_config(num_attention_heads=8, num_key_value_heads=8), "config says"),
    "config-rope-0": (edit_config(rope_theta=0), "rope"),
    "config-rope-nan": (edit_config(rope_theta=float("nan")), "config.json"),
    "config-layers-too-many": (edit_config(num_hidden_layers=2000), "2000 layers"),
    "config-layers-negative": (edit_config(num_hidden_layers=-1), "num_hidden_layers"),
    "config-eps-zero": (edit_config(rms_norm_eps=0), "eps"),
    "config-eos-outside": (edit_config(eos_token_id=NUM_TOKENS + 7), "eos_token_id"),
    "config-eos-is-text": (edit_config(eos_token_id="</s>"), "eos_token_id"),
    "config-quantised": (edit_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "tokenizer-missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer-not-json": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "tokenizer-of-a-larger-model": (grow_tokenizer, "different models"),
    "tokenizer-eos-not-in-it": (edit_tokenizer(eos_token="<gone>"), "<gone>"),
    "tokenizer-bos-not-in-it": (edit_tokenizer(bos_token="<gone>"), "<gone>"),
    "template-not-utf8": (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja"),
}


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_local_experts"])
def test_config_of_a_billion(refused, broken, field):
    counts = {"num_local_experts": 4, "num_experts_per_tok": 2} | {field: 1 << 30}
    edit_config(model_type="mixtral", **counts)(broken)
    assert field in refused("--model", str(broken), "--prompt", "Hello")


@pytest.mark.parametrize("fault", MODELS)
def test_broken_folder(refused, broken, fault):
    act, named = MODELS[fault]
    act(broken)
    line = refused("--model", str(broken), "--prompt", "Hello")
    assert named in line


GGUFS = {
    "empty": (b"", "ggu"),
    "other-magic": (b"GGML" + bytes(60), "magic"),
    "version-1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version-99": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "99"),
    "tensors-huge": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0), "tensor"),
    "keys-huge": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62), "metadata"),
    "array-of-2-to-the-40": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 40),
        "",
    ),
    "string-beyond-the-file": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50), ""),
    "no-metadata": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture"),
    "half-a-header": (b"GGUF\x03\0\0", ""),
}


@pytest.mark.parametrize("fault", GGUFS)
def test_broken_gguf(refused, tmp_path, fault):
    data, named = GGUFS[fault]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    line = refused("--model", str(path), "--prompt", "Hello")
    assert "model.gguf" in line
    assert named in line


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_nan_is_found_whatever_it_is_converted_to(refused, broken, quant):
    set_element("model.layers.0.mlp.up_proj.weight", float("nan"))(broken)
    assert "up_proj" in refused("--model", str(broken), "--prompt", "Hello", "--quant", quant)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda store: (store / "store.json").write_text("{"), "store.json"),
        (lambda store: edit_json(store / "store.json", version=99), "99"),
        (lambda store: truncate(next(store.glob("data-*/layer-00001.bin")), 100), "layer-00001.bin"),
        (lambda store: next(store.glob("data-*/head.bin")).unlink(), "head.bin"),
        (lambda store: shutil.rmtree(next(store.glob("data-*/tokenizer"))), "tokenizer"),
        (
            lambda store: (
                (store / "store.json").unlink(),
                next(store.glob("data-*")).joinpath("journal.jsonl").touch(),
            ),
            "",
        ),
    ],
    ids=["manifest-broken", "version-unknown", "part-short", "part-missing", "no-tokenizer", "unfinished"],
)
def test_broken_store(refused, sound, tmp_path, act, named):
    store = tmp_path / "store"
    convert_model(ModelRequest(str(sound)), store, tmp_path, NoProgress())
    act(store)
    assert named in refused("--model", str(store), "--prompt", "Hello")


def unfinish(store):
    (store / "store.json").unlink()
    (next(store.glob("data-*")) / "journal.jsonl").touch()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read(refused, broken):
    (broken / SHARDS[0]).chmod(0)
    assert SHARDS[0] in refused("--model", str(broken), "--prompt", "Hello")


def test_prompt_without_tokens_in_a_model_without_a_beginning(refused, broken, tmp_path):
    edit_tokenizer(bos_token=None, add_bos_token=False)(broken)
    edit_config(bos_token_id=...)(broken)
    store = tmp_path / "store"
    convert_model(ModelRequest(str(broken)), store, tmp_path, NoProgress())
    assert "no tokens" in refused("--model", str(store), "--prompt", "")


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for", "template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "template"),
        ("{{ ''.__class__.__mro__ }}", "template"),
    ],
    ids=["syntax", "refusal", "endless", "escape"],
)
def test_bad_chat_template(refused, broken, tmp_path, template, named):
    (broken / "chat_template.jinja").write_text(template)
    store = tmp_path / "store"
    convert_model(ModelRequest(str(broken)), store, tmp_path, NoProgress())
    assert named in refused("--model", str(store), "--prompt", "Hello")
