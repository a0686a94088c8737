"""A profile's run: which windows are counted, what it holds, and that an interrupted one goes on to the same files."""

from __future__ import annotations

import json
import weakref
from importlib import import_module
from types import SimpleNamespace

import filelock
import pytest
import torch

from hybrid_runtime.errors import BudgetError, CheckpointError, NumericsError, UsageError
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.profiling import run as module
from hybrid_runtime.profiling.counting import FiringCounter
from hybrid_runtime.profiling.profile import LAYER_FIELDS, empty_layers, watched_neurons
from hybrid_runtime.profiling.profile_file import read_profile
from hybrid_runtime.profiling.run import (
    LOCK,
    RAW_SAMPLES,
    STATE,
    WORK,
    ProfileRequest,
    make_profile,
    profiling_bytes,
)
from hybrid_runtime.profiling.samples import SampleFile, SampleShape, WindowSampler
from hybrid_runtime.profiling.windows import token_windows
from hybrid_runtime.tensor_files import read_metadata

from .conftest import SAMPLE_BYTES, WINDOW, Heard, text_of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some fifteen windows."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(text_of(11, 14))
    return path


@pytest.fixture(scope="module")
def whole(small, text, tmp_path_factory):
    """The files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    request = ProfileRequest((text,), None, WINDOW, SAMPLE_BYTES)
    make_profile(small.store, small.sequence, small.tokenizer, request, folder, lambda _: None)
    return files_of(folder)


@pytest.fixture
def make(small, text, tmp_path, monkeypatch):
    """Profile the text into tmp_path/name."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # costs most of the time, and no process sees the difference

    def make(name, *, num_tokens=None, sample_bytes=SAMPLE_BYTES, on_window=lambda _: None, progress=None, **options):
        request = ProfileRequest((text,), num_tokens, options.pop("window", WINDOW), sample_bytes, **options)
        inputs = (small.store, small.sequence, small.tokenizer, request)
        return make_profile(*inputs, tmp_path / name, on_window, progress)

    return make


def files_of(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del found[LOCK]
    return found


def raise_interrupt(*_):
    raise KeyboardInterrupt


class Interrupt:
    """Ctrl-C before the at-th call of a function, or after it."""

    def __init__(self, function, at, *, after=False):
        self.function, self.left, self.after = function, at, after

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.function(*arguments, **options)
        if self.left == 0:
            raise KeyboardInterrupt
        return result

    def __get__(self, instance, owner):
        return lambda *arguments, **options: self(instance, *arguments, **options)


def test_counts_are_those_of_every_window_but_the_held_out_ones(small, text, make, monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT_EVERY", 3)
    monkeypatch.setattr(module, "MOST_HELD_OUT", 3)
    profile, was_there = make("profile")
    assert not was_there
    windows = list(token_windows([text], small.tokenizer, WINDOW))
    held_out = [2, 5, 8]
    assert len(windows) > 12
    assert torch.equal(profile.held_out, torch.stack([windows[idx] for idx in held_out]).int())
    counted = [tokens for idx, tokens in enumerate(windows) if idx not in held_out]
    assert profile.num_tokens == len(counted) * WINDOW
    watched = watched_neurons(small.config)
    layers = empty_layers(small.config, len(watched))
    counter = FiringCounter(small.config, layers, watched, lambda *_: None)
    for tokens in counted:
        cache = KvCache(small.config, WINDOW, small.sequence.cache.dtype)
        small.sequence.decoder.forward(tokens, cache, prompt_end=WINDOW, observer=counter)
        counter.finish()
    for ours, theirs in zip(layers, profile.layers, strict=True):
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in LAYER_FIELDS)


@pytest.mark.parametrize(("num_tokens", "counted"), [(WINDOW, 1), (WINDOW + 1, 2), (7 * WINDOW, 7)])
def test_as_many_windows_are_counted_as_the_tokens_need(make, monkeypatch, num_tokens, counted):
    monkeypatch.setattr(module, "HELD_OUT_EVERY", 3)
    told = []
    profile, _ = make("profile", num_tokens=num_tokens, on_window=told.append)
    assert profile.num_tokens == counted * WINDOW
    assert len(profile.held_out) == (counted - 1) // 2
    held_out = [(2 * idx + 2) * WINDOW for idx in range(len(profile.held_out))]
    assert told == sorted([idx * WINDOW for idx in range(counted + 1)] + held_out)


def test_no_window_and_no_rows_are_held_when_the_next_is_computed(make, monkeypatch):
    """So that memory does not grow with the text."""
    windows, samplers = [], []

    def watched_windows(*arguments):
        for tokens in token_windows(*arguments):
            windows.append(weakref.ref(tokens))
            yield tokens

    class WatchedSampler(WindowSampler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            samplers.append(weakref.ref(self))

    monkeypatch.setattr(module, "token_windows", watched_windows)
    monkeypatch.setattr(module, "WindowSampler", WatchedSampler)
    alive = []
    make(
        "profile",
        on_window=lambda _: alive.append([sum(r() is not None for r in refs) for refs in (windows, samplers)]),
    )
    assert len(samplers) > 10
    assert max(count for count, _ in alive) <= 2
    assert max(count for _, count in alive) <= 1


def test_state_does_not_grow_with_the_text(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0)
    monkeypatch.setattr(module, "HELD_OUT_EVERY", 10**9)
    sizes = []

    def look(_):
        if (tmp_path / "profile" / WORK / STATE).exists():
            sizes.append([(tmp_path / "profile" / WORK / name).stat().st_size for name in (STATE, RAW_SAMPLES)])

    make("profile", on_window=look)
    full = [size for size in sizes if size[0] > sizes[0][0]] or sizes
    assert len(full) > 8
    assert max(state for state, _ in full) - min(state for state, _ in full) < 64  # digits of the counts
    assert len({raw for _, raw in sizes}) == 1


MOMENTS = {
    "before-a-window": ("hybrid_runtime.profiling.run._Run._after", 9, False),
    "after-a-window": ("hybrid_runtime.profiling.run._Run._after", 9, True),
    "in-a-batch": ("hybrid_runtime.profiling.counting.FiringCounter.see_neurons", 21, False),
    "before-rows": ("hybrid_runtime.profiling.samples.SampleFile.write", 11, False),
    "between-rows": ("hybrid_runtime.profiling.samples.SampleFile.write", 11, True),
    "before-the-state": ("hybrid_runtime.profiling.run.write_tensors", 5, False),
    "after-the-state": ("hybrid_runtime.profiling.run.write_tensors", 5, True),
    "before-the-counts": ("hybrid_runtime.profiling.run.write_counts", 1, False),
    "after-the-counts": ("hybrid_runtime.profiling.run.write_counts", 1, True),
    "syncing": ("hybrid_runtime.profiling.samples.SampleFile.sync", 4, False),
    "tokenizing": ("hybrid_runtime.profiling.windows._pieces", 1, False),
}


@pytest.mark.parametrize(("where", "at", "after"), MOMENTS.values(), ids=MOMENTS)
def test_interrupted_anywhere_it_ends_with_the_same_bytes(make, whole, tmp_path, monkeypatch, where, at, after):
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0)
    path, name = where.rsplit(".", 1)
    owner = {"_Run": module._Run, "FiringCounter": FiringCounter, "SampleFile": SampleFile}.get(path.rsplit(".", 1)[1])
    function = import_module(path).__dict__[name] if owner is None else owner.__dict__[name]
    with monkeypatch.context() as patch:
        patch.setattr(where, Interrupt(function, at, after=after))
        with pytest.raises(KeyboardInterrupt):
            make("ended")
    told = []
    make("ended", on_window=told.append)
    assert files_of(tmp_path / "ended") == whole
    if where.endswith("_after"):
        assert told[0] == 8 * WINDOW  # what was counted was saved by the interruption
        assert told[1:]


def test_finished_profile_is_found_again_and_restart_makes_it_again(make, tmp_path):
    made, _ = make("profile")
    before = files_of(tmp_path / "profile")
    told = []
    found, was_there = make("profile", on_window=told.append)
    assert was_there
    assert told == []
    assert found.texts == made.texts
    assert not make("profile", restarts=True)[1]
    assert files_of(tmp_path / "profile") == before


def test_what_else_is_in_the_folder_is_left_alone(make, tmp_path, monkeypatch):
    """The folder is the user's choice: one with a work folder of his own, too."""
    folder = tmp_path / "mine"
    own = [folder / name / "thesis" for name in (WORK, "data-2024", "data-0123456789abcdefg", "samples")]
    for path in own:
        path.parent.mkdir(parents=True)
        path.write_text("years of work")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_counts", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            make("mine")
    make("mine", restarts=True)
    make("mine", num_tokens=WINDOW, restarts=True)
    make("mine")
    assert all(path.read_text() == "years of work" for path in own)
    assert [path.name for path in (folder / WORK).iterdir()] == ["thesis"]
    assert len(list(folder.glob("data-*"))) == 3


def interrupted(make, monkeypatch, at=5):
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_after", Interrupt(module._Run._after, at))
        with pytest.raises(KeyboardInterrupt):
            make("profile")


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing", "folder"])
def test_rows_of_another_length_are_refused_by_name(make, tmp_path, monkeypatch, change):
    interrupted(make, monkeypatch)
    raw = tmp_path / "profile" / WORK / RAW_SAMPLES
    data = raw.read_bytes()
    raw.unlink()
    if change == "folder":
        raw.mkdir()
    elif change != "missing":
        raw.write_bytes({"shorter": data[:-1], "longer": data + b"\0", "empty": b""}[change])
    with pytest.raises(
        CheckpointError, match=r"samples\.raw: (has \d+ bytes, expected \d+|is missing); give --restart"
    ):
        make("profile")
    if change != "folder":
        make("profile", restarts=True)


def test_state_that_is_not_one_is_refused_by_name(make, tmp_path, monkeypatch):
    interrupted(make, monkeypatch)
    state = tmp_path / "profile" / WORK / STATE
    run = json.loads(read_metadata(state, "")["run"])
    assert (run["windows"], run["counted"]) == (4, 4 * WINDOW)
    data = state.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"\xff" * 100, data[:8] + b"{" * (len(data) - 8)):
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.safetensors: .*; give --restart to begin anew"):
            make("profile")
    make("profile", restarts=True)


def test_other_settings_do_not_go_on_with_an_unfinished_run(make, monkeypatch):
    interrupted(make, monkeypatch)
    for options in ({"window": 2 * WINDOW}, {"num_tokens": 5 * WINDOW}, {"sample_bytes": SAMPLE_BYTES + 1}):
        with pytest.raises(UsageError, match=r"holds an unfinished profile of another .*; give --restart"):
            make("profile", **options)
    told = []
    make("profile", on_window=told.append)
    assert told[0] == 4 * WINDOW


def test_a_sample_larger_than_the_disk_is_refused_before_any_window(make, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a window was computed")

    disk = SimpleNamespace(free=30_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_after", never)
        with pytest.raises(BudgetError, match=r"large: the sample takes .*, the disk has .* free; make room"):
            make("large", sample_bytes=1 << 20)
    make("large", sample_bytes=1 << 20, num_tokens=WINDOW)  # of few tokens it is small
    make("profile")
    disk.free = 0
    assert make("profile")[1]  # what is there needs no room


def test_an_unfinished_run_needs_no_room_for_what_it_has(make, whole, tmp_path, monkeypatch):
    """Neither for the raw rows, nor for those that were sorted already."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_counts", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            make("profile")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    make("profile")
    assert files_of(tmp_path / "profile") == whole


def test_steps_beside_the_windows_are_told(small, make):
    heard, layers = Heard(), small.config.num_hidden_layers
    make("profile", progress=heard)
    make("profile", progress=heard)
    assert [step[0] for step in heard.steps] == [
        *("looking at the text", "writing the sample"),
        *("looking at the text", "checking the profile that is there"),
    ]
    assert all(total == done for _, total, _, done in heard.steps)
    assert heard.steps[1][1:] == heard.steps[3][1:] == [layers, "layers", layers]
    assert not heard.running


def test_two_runs_at_once_are_refused(make, tmp_path):
    (tmp_path / "profile").mkdir()
    with (
        filelock.FileLock(tmp_path / "profile" / LOCK),
        pytest.raises(UsageError, match="another run writes its profile here; wait for it"),
    ):
        make("profile")


def test_nan_ends_the_run_and_keeps_what_was_saved(make, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0)
    forward, calls = Decoder.forward, []

    def damaged(*arguments, **options):
        calls.append(arguments)
        return forward(*arguments, **options) * (torch.nan if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", damaged)
        with pytest.raises(NumericsError, match="computed NaN or Inf in window 3 of the text"):
            make("ended")
    told = []
    make("ended", on_window=told.append)
    assert told[0] == 3 * WINDOW
    assert files_of(tmp_path / "ended") == whole


def test_a_full_disk_in_the_middle_is_said_and_the_run_goes_on(make, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0)
    sync, calls = SampleFile.sync, []

    def full(file):
        calls.append(file)
        if len(calls) == 6:
            raise BudgetError("no room")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFile, "sync", full)
        with pytest.raises(BudgetError):
            make("ended")
    told = []
    make("ended", on_window=told.append)
    assert told[0] == 5 * WINDOW
    assert files_of(tmp_path / "ended") == whole


def test_requests_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--tokens 31: is less than one window of 32 \(see --window\)"):
        ProfileRequest((tmp_path / "a",), 31, 32, 0)
    with pytest.raises(UsageError, match="--text: a file is named twice"):
        ProfileRequest((tmp_path / "a", tmp_path / "b" / ".." / "a"), None, 32, 0)


def test_memory_reckoned_is_at_least_what_lasts(small, make):
    """Counts, and a layer of the sample."""
    sample_bytes = 1 << 20
    request = ProfileRequest((), None, WINDOW, sample_bytes)
    profile, _ = make("profile")
    counts = sum(getattr(layer, name).nbytes for layer in profile.layers for name in LAYER_FIELDS)
    shape = SampleShape.of(small.config)
    layer = shape.raw_bytes(shape.rows_in(sample_bytes)) // shape.num_layers
    assert profiling_bytes(small.config, request) > 3 * counts + 2 * layer
    few = profiling_bytes(small.config, ProfileRequest((), WINDOW, WINDOW, sample_bytes))
    assert few < 3 * counts + 2 * layer + 5 * counts  # of few tokens no more are held


def test_profile_of_the_run_is_the_one_in_the_folder(small, make, tmp_path):
    profile, _ = make("profile")
    found = read_profile(tmp_path / "profile", small.config)
    assert found.texts == profile.texts
    assert all(
        torch.equal(getattr(ours, name), getattr(theirs, name))
        for ours, theirs in zip(found.layers, profile.layers, strict=True)
        for name in LAYER_FIELDS
    )
