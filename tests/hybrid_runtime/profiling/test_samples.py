"""The sample: uniform, the same however it comes about, and no larger than was asked."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hybrid_runtime.errors import BudgetError
from hybrid_runtime.model.observer import FfnPass
from hybrid_runtime.profiling.profile_file import LayerSamples, read_samples
from hybrid_runtime.profiling.samples import (
    FILE_HEADER_BYTES,
    LARGEST_FLOAT16,
    Reservoir,
    SampleFile,
    SampleShape,
    WindowSampler,
    require_disk,
    token_priorities,
)

from .conftest import WINDOW, text_of

SHAPE = SampleShape(num_layers=2, hidden_size=3, num_neurons=11, num_slots=2)


@pytest.mark.parametrize("num_slots", [0, 1, 7, 100, 1000])
@pytest.mark.parametrize("window", [1, 13, 250])
def test_reservoir_keeps_the_smallest_priorities_whatever_the_windows(num_slots, window):
    priorities = np.random.default_rng(3).permutation(500).astype(np.int64)
    reservoir, held = Reservoir(num_slots), {}  # slot to token
    for start in range(0, 500, window):
        reservoir, taken = reservoir.take(priorities[start : start + window])
        assert len(set(taken.values())) == len(taken)
        held |= {slot: start + idx for idx, slot in taken.items()}
    assert np.array_equal(np.sort(reservoir.priorities()), np.arange(min(num_slots, 500)))
    assert [priorities[held[slot]] for slot in range(len(held))] == reservoir.priorities().tolist()


def test_reservoir_that_is_read_back_goes_on_with_the_same_slots():
    priorities = np.random.default_rng(4).permutation(400).astype(np.int64)
    reservoir = Reservoir(20)
    for start in range(0, 400, 50):
        part = priorities[start : start + 50]
        again, taken = Reservoir(20, reservoir.priorities().copy()).take(part)
        reservoir, expected = reservoir.take(part)
        assert taken == expected
        assert np.array_equal(again.priorities(), reservoir.priorities())


def test_priorities_are_the_windows_own_and_uniform():
    tokens = torch.arange(50_000) % 97
    priorities = token_priorities(tokens, 3)
    assert priorities.dtype == np.int64
    assert priorities.min() >= 0
    assert np.array_equal(priorities, token_priorities(tokens.clone(), 3))
    assert not np.array_equal(priorities, token_priorities(tokens, 4))
    assert not np.array_equal(priorities[1:], token_priorities(tokens[1:], 3))
    shares = np.histogram(priorities / 2.0**63, bins=10, range=(0, 1))[0] / len(priorities)
    assert np.abs(shares - 0.1).max() < 5 * (0.1 * 0.9 / len(priorities)) ** 0.5  # five standard deviations


def test_a_window_in_two_batches_is_written_by_slot(tmp_path):
    file = SampleFile(tmp_path / "raw", SHAPE, 4)
    sampler = WindowSampler(file, {1: 3, 4: 0})  # token to slot
    generator = torch.Generator().manual_seed(0)
    actives = torch.rand(2, 2, 6, 11, generator=generator) > 0.5  # layer, expert, token
    inputs = torch.randn(2, 6, 3, generator=generator)
    inputs[0, 1] = torch.tensor([1e6, -1e6, 0.5])
    for start, stop in ((0, 4), (4, 6)):
        sampler.begin_batch(start)
        for layer_idx in range(2):
            for expert_idx in range(2):
                tokens = torch.arange(stop - start)
                ffn = FfnPass(layer_idx, 5 + expert_idx, tokens, inputs[layer_idx, start:stop])
                sampler.see(ffn, actives[layer_idx, expert_idx, start:stop])
    sampler.write()
    for layer_idx in range(2):
        rows = file.read(layer_idx, 4)
        for token, slot in ((1, 3), (4, 0)):
            expected = inputs[layer_idx, token].clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().numpy()
            assert np.array_equal(rows["inputs"][slot], expected)
            assert rows["experts"][slot].tolist() == [5, 6]
            bits = np.unpackbits(rows["active"][slot], axis=1, bitorder="little")[:, :11]
            assert np.array_equal(bits.astype(bool), actives[layer_idx, :, token].numpy())
        assert not rows[1].tobytes().strip(b"\0")  # nobody's slot
    samples = LayerSamples(
        torch.zeros(4), *(torch.from_numpy(rows[name].copy()) for name in ("inputs", "experts", "active"))
    )
    _, active = samples.of_expert(6, 11)
    assert torch.equal(active, actives[1, 1, [4, 1]])


def test_a_disk_that_takes_no_more_is_named(tmp_path, monkeypatch):
    file = SampleFile(tmp_path / "raw", SHAPE, 4)

    class Full:
        def seek(self, place):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(BudgetError, match="raw: could not be written: No space left on device; make room"):
        file.write(0, [0], np.zeros(1, dtype=SHAPE.row))
    with pytest.raises(BudgetError, match="raw: could not be written: Input/output error"):
        file.sync()


def test_a_write_that_takes_a_part_goes_on_with_the_rest(tmp_path, monkeypatch):
    file = SampleFile(tmp_path / "raw", SHAPE, 4)
    raw = file._file

    class Slow:
        seek = raw.seek

        def write(self, data):
            return raw.write(data[:3])

    rows = np.frombuffer(np.random.default_rng(0).bytes(2 * SHAPE.row.itemsize), dtype=SHAPE.row)
    monkeypatch.setattr(file, "_file", Slow())
    file.write(1, [0, 1], rows)
    monkeypatch.undo()
    assert file.read(1, 2).tobytes() == rows.tobytes()


@pytest.mark.parametrize("copies", [1, 2])
def test_a_sample_that_the_disk_has_no_room_for_is_refused_with_one_that_it_has(tmp_path, monkeypatch, copies):
    free = 100 << 20
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    num_tokens = SHAPE.rows_in(free // copies) + 1000
    with pytest.raises(BudgetError, match=r"the disk has 100\.00 MiB free; make room, give at most") as refused:
        require_disk(tmp_path, SHAPE, num_tokens, copies=copies)
    (most,) = re.findall(r"at most --samples (\d+)M", str(refused.value))
    assert int(most) == 100 // copies
    require_disk(tmp_path, SHAPE, SHAPE.rows_in(int(most) << 20), copies=copies)
    require_disk(tmp_path, SHAPE, num_tokens, copies=copies, held_bytes=1 << 20)


@pytest.mark.parametrize("sample_bytes", [0, 100, 5000, 20_000])
def test_samples_on_disk_are_within_what_was_asked(small, sample_bytes):
    """With all that is in the files, but for the headers of empty ones."""
    name = f"samples-{sample_bytes}"
    folder = small.profile(name, text_of(9, 20), sample_bytes=sample_bytes)
    sizes = [path.stat().st_size for path in folder.rglob("samples-*")]
    layers = small.config.num_hidden_layers
    count = len(read_samples(folder, small.config, 0).priorities)
    assert len(sizes) == layers
    assert sum(sizes) <= max(sample_bytes, layers * FILE_HEADER_BYTES)
    row_bytes = layers * (SampleShape.of(small.config).row.itemsize + 8)
    assert sample_bytes - layers * FILE_HEADER_BYTES < (count + 1) * row_bytes  # and not one fewer than fit
    assert count < 20 * WINDOW


def test_header_of_a_sample_is_never_longer_than_is_reckoned(tmp_path):
    """Of shapes with as many digits as disks have bytes."""
    empty = {
        "priorities": torch.zeros(10**7, 0, 10**7, dtype=torch.int64),
        "inputs": torch.zeros(10**9, 0, 10**5, dtype=torch.float16),
        "experts": torch.zeros(10**9, 0, 10**3, dtype=torch.int16),
        "active": torch.zeros(10**9, 0, 10**5, dtype=torch.uint8),
    }
    save_file(empty, tmp_path / "samples")
    offsets = 4 * 2 * 12  # digits of each tensor's place in the file, which are not seen here
    assert (tmp_path / "samples").stat().st_size + offsets <= FILE_HEADER_BYTES
