"""What cannot be stored is refused in words and leaves nothing; what changes between two runs is never mixed."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.demo import make_demo
from hybrid_runtime.errors import BudgetError, CheckpointError, UsageError
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.stores import load_store_tokenizer

from .converting import FORMATS, StopAfter, contents, converted, interrupt
from .synthetic import LLAMA, llama_shapes, random_tensors, write_llama, write_tensors


def write_broken(folder, tensor, value):
    """A bfloat16 model with one bad element in this tensor."""
    tensors = random_tensors(llama_shapes(LLAMA))
    tensors[tensor].view(-1)[-1] = value
    return write_tensors(folder, LLAMA, tensors)


BROKEN = [
    ("lm_head.weight", float("nan"), FORMATS[0], "found nan, expected a finite number"),
    ("model.norm.weight", float("inf"), FORMATS[0], "found inf, expected a finite number"),
    ("model.layers.2.mlp.down_proj.weight", float("-inf"), FORMATS[1], "found -inf, expected a finite number"),
    ("model.layers.2.mlp.up_proj.weight", 1e30, RowFormat("q4", 32), "cannot be written as q4 group 32: .*use bf16"),
    ("model.layers.2.mlp.down_proj.weight", 1e30, RowFormat("q8", 64), "cannot be written as q8 group 64: .*use bf16"),
    ("lm_head.weight", -1e30, RowFormat("q4", 128), "cannot be written as q8 group 128: .*use bf16"),
]


@pytest.mark.parametrize(
    ("tensor", "value", "row_format", "message"), BROKEN, ids=[f"{each[0]}={each[1]}" for each in BROKEN]
)
def test_a_weight_that_cannot_be_stored_is_named_and_nothing_is_left(tmp_path, tensor, value, row_format, message):
    model, folder = write_broken(tmp_path / "model", tensor, value), tmp_path / "store"
    older = converted(write_llama(tmp_path / "older"), tmp_path / "over")
    before = contents(older.folder)
    for destination in (folder, older.folder):
        with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '?{tensor}'?.*{message}"):
            converted(model, destination, row_format)
    assert contents(folder).keys() <= {".lock"}
    assert contents(older.folder) == before


def test_a_float64_vector_beyond_float32_is_named(tmp_path):
    tensors = random_tensors(llama_shapes(LLAMA), torch.float32)
    tensors["model.norm.weight"] = torch.full((LLAMA["hidden_size"],), 1e300, dtype=torch.float64)
    model = write_tensors(tmp_path / "model", LLAMA, tensors)
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight cannot be written as f32: .*NaN or Inf"):
        converted(model, tmp_path / "store")


def test_a_small_disk_is_refused_with_both_figures_before_anything_is_made(tmp_path, monkeypatch):
    model = write_llama(tmp_path / "model")
    older = converted(model, tmp_path / "older", FORMATS[1])
    before = contents(older.folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 << 20))
    for folder in (tmp_path / "deep" / "new", older.folder):
        with pytest.raises(
            BudgetError, match=r"the store needs 32\.\d\d MiB more, the disk has 20\.00 MiB free; .*another disk"
        ):
            converted(model, folder)
    assert not (tmp_path / "deep").exists()
    assert contents(older.folder) == before


def test_what_an_abandoned_conversion_holds_counts_as_free(tmp_path, monkeypatch):
    model, folder = write_llama(tmp_path / "model"), tmp_path / "store"
    abandoned = folder / "data-0123456789abcdef"
    abandoned.mkdir(parents=True)
    (abandoned / "journal.jsonl").touch()
    with (abandoned / "embed.bin").open("wb") as file:
        file.truncate(64 << 20)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    converted(model, folder).verify()
    assert not abandoned.exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_limit_met_in_the_middle_leaves_the_old_store_and_no_temporary(tmp_path, share):
    """RLIMIT_FSIZE fails a write at any byte, as a full disk does; Python ignores its signal."""
    model = write_llama(tmp_path / "model")
    whole = contents(converted(model, tmp_path / "whole").folder)
    store = converted(model, tmp_path / "store", FORMATS[1])
    before = contents(store.folder)
    largest = max((tmp_path / "whole").rglob("*.bin"), key=lambda path: path.stat().st_size).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), limits[1]))
    try:
        with pytest.raises(BudgetError, match=rf"cannot be written: {os.strerror(errno.EFBIG)}; free some disk"):
            converted(model, store.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(store.folder.rglob("*.tmp"))
    after = contents(store.folder)
    assert after | before == after
    open_store(store.folder).verify()
    converted(model, store.folder).verify()
    assert contents(store.folder) == whole


@pytest.fixture
def mount(tmp_path):
    """Mounts a tmpfs with these options on a folder, where this user may."""
    mounted = []

    def mount_tmpfs(options):
        folder = tmp_path / "mounted"
        folder.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(argv, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        mounted.append(folder)
        return folder

    yield mount_tmpfs
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_in_the_middle_keeps_what_is_finished(tmp_path, mount, monkeypatch):
    model = write_llama(tmp_path / "model", num_hidden_layers=6, hidden_size=256, intermediate_size=512, head_dim=64)
    disk = mount("size=8m")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)  # another program takes the space after the check
        with pytest.raises(BudgetError, match=f"cannot be written: {os.strerror(errno.ENOSPC)}; free some disk"):
            converted(model, disk / "store")
    parts = {path: path.stat().st_mtime_ns for path in disk.rglob("*.bin")}
    assert len(parts) >= 2
    assert not list(disk.rglob("*.tmp"))
    with pytest.raises(BudgetError, match=r"the store needs .* more, the disk has .* free"):
        converted(model, disk / "store")
    subprocess.run(["mount", "-o", "remount,size=128m", str(disk)], check=True)
    converted(model, disk / "store").verify()
    assert {path: path.stat().st_mtime_ns for path in parts} == parts


def test_a_read_only_folder_is_named(tmp_path, mount):
    model = write_llama(tmp_path / "model")
    folder = mount("ro,size=64m")
    with pytest.raises(UsageError, match=f"{folder}.*cannot be written: {os.strerror(errno.EROFS)}; choose another"):
        converted(model, folder / "store")


@pytest.mark.parametrize("kind", ["file", "below-a-file", "foreign-folder"])
def test_a_destination_that_is_not_ours_is_named_and_kept(tmp_path, kind):
    model = write_llama(tmp_path / "model")
    kept = tmp_path / "mine" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    folder = {"file": kept, "below-a-file": kept / "store", "foreign-folder": kept.parent}[kind]
    with pytest.raises(UsageError, match=f"^{re.escape(str(folder))}: .*(name a|choose another) folder"):
        converted(model, folder)
    assert kept.read_text() == "years of work"
    assert [path.name for path in kept.parent.iterdir()] == ["thesis.txt"]


def change_weights(model):
    write_llama(model, seed=1)


def change_time(model):
    os.utime(model / "model.safetensors", ns=(0, 0))


def change_config(model):
    (model / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 5e5}))


def change_size(model):
    write_llama(model, num_hidden_layers=4)


@pytest.mark.parametrize("change", [change_weights, change_time, change_config, change_size])
def test_a_changed_source_starts_anew(tmp_path, change):
    model, folder = write_llama(tmp_path / "model"), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        converted(model, folder, progress=StopAfter(60_000, interrupt))
    (started,) = folder.glob("data-*")
    assert list(started.glob("*.bin"))
    change(model)
    converted(model, folder).verify()
    assert contents(folder) == contents(converted(model, tmp_path / "clean").folder)
    assert not started.exists()


def test_a_source_that_changes_while_it_is_read_makes_no_store(tmp_path):
    model = write_llama(tmp_path / "model")
    store = converted(model, tmp_path / "store", FORMATS[1])
    before = contents(store.folder)
    progress = StopAfter(60_000, lambda: os.utime(model / "model.safetensors"))
    for folder in (tmp_path / "new", store.folder):
        with pytest.raises(CheckpointError, match="changed while it was converted; convert it again"):
            converted(model, folder, progress=progress)
    assert contents(tmp_path / "new").keys() == {".lock"}
    assert contents(store.folder) == before


def test_a_source_that_vanishes_keeps_what_is_finished(tmp_path):
    """A disk or a share that comes back: hours of work are not thrown away."""
    model, folder = write_llama(tmp_path / "model"), tmp_path / "store"
    weights, aside = model / "model.safetensors", tmp_path / "aside"
    progress = StopAfter(60_000, lambda: weights.exists() and weights.rename(aside))
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be"):
        converted(model, folder, progress=progress)
    parts = {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}
    assert parts
    aside.rename(weights)
    converted(model, folder).verify()
    assert {path: path.stat().st_mtime_ns for path in parts} == parts


def test_another_quantization_replaces_the_store(tmp_path):
    model, folder = write_llama(tmp_path / "model"), tmp_path / "store"
    for row_format in (FORMATS[0], RowFormat("q4", 64), RowFormat("q4", 32)):
        assert converted(model, folder, row_format).manifest.quantization.weights == row_format
        assert len(list(folder.glob("data-*"))) == 1
    assert contents(folder) == contents(converted(model, tmp_path / "clean", RowFormat("q4", 32)).folder)


def test_going_back_to_the_old_store_removes_what_was_begun(tmp_path):
    model, folder = write_llama(tmp_path / "model"), tmp_path / "store"
    converted(model, folder, FORMATS[1])
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        converted(model, folder, progress=StopAfter(60_000, interrupt))
    assert len(list(folder.glob("data-*"))) == 2
    converted(model, folder, FORMATS[1], StopAfter(0, interrupt))  # no weight is written
    assert contents(folder) == before
    assert len(list(folder.glob("data-*"))) == 1


def test_a_finished_store_is_not_written_again(tmp_path):
    model, folder = make_demo(tmp_path / "demo"), tmp_path / "store"
    converted(model, folder)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    converted(model, folder, progress=StopAfter(0, interrupt))
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before


def test_a_missing_part_alone_is_written_again(tmp_path):
    model, folder = write_llama(tmp_path / "model"), tmp_path / "store"
    store = converted(model, folder)
    before = contents(folder)
    gone, *kept = (store.data_folder / part.file for part in store.manifest.parts)
    times = {path: path.stat().st_mtime_ns for path in kept}
    gone.unlink()
    converted(model, folder).verify()
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == times


def test_a_tokenizer_that_came_later_is_added_without_converting_again(tmp_path):
    model, demo, folder = write_llama(tmp_path / "model", vocab_size=256), make_demo(tmp_path / "demo"), tmp_path / "s"
    converted(model, folder)
    shutil.copy(demo / "tokenizer.json", model)
    store = converted(model, folder, progress=StopAfter(0, interrupt))  # no weight is written
    assert load_store_tokenizer(store)[1] is None
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_store_tokenizer(converted(model, folder))[1] == "{{ messages[0].content }}"
    assert contents(folder) == contents(converted(model, tmp_path / "clean").folder)


def test_everything_is_synced_before_it_gets_its_name_and_the_manifest_is_last(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        events.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        real_fsync(descriptor)

    def renaming(real):
        def rename(source, target, **options):
            events.append(("rename", os.fspath(source), os.fspath(target)))
            real(source, target, **options)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming(real_rename))
    monkeypatch.setattr(os, "replace", renaming(real_replace))
    folder = tmp_path / "store"
    converted(write_llama(tmp_path / "model"), folder)
    renames = [(at, Path(event[1]), Path(event[2])) for at, event in enumerate(events) if event[0] == "rename"]
    renames = [each for each in renames if each[2].is_relative_to(folder)]
    assert {target.name for _, _, target in renames} >= {"embed.bin", "layer-00002.bin", "head.bin", "tokenizer"}
    for at, source, target in renames:
        assert ("sync", str(source)) in events[:at]
        assert ("sync", str(target.parent)) in events[at:]
    at, _, target = renames[-1]
    assert target == folder / "store.json"
    assert [event for event in events[at + 1 :] if event[0] == "sync"] == [("sync", str(folder))]
