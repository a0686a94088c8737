"""A token's steps: in their order, with what is launched recorded after it was done some times."""

import pytest
import torch

from hybrid_kernels.team import Team
from hybrid_runtime.gpu.device import GpuDevice
from hybrid_runtime.gpu.steps import WARM_UPS, Steps


class PretendedGpu(GpuDevice):
    """Records by remembering; told what was done."""

    def __init__(self, done, *, replays=True):
        super().__init__(torch.device("cuda"), replays)
        self.done = done
        self.pools, self.recorded_in = 0, []

    def mark(self):
        self.done.append("mark")

    def wait(self, mark):
        self.done.append("wait")

    def new_pool(self):
        self.pools += 1
        return self.pools

    def recorded(self, work, pool):
        self.recorded_in.append(pool)
        before = list(self.done)
        work()
        recorded = self.done[len(before) :]
        self.done[:] = before  # recording does nothing
        return lambda: self.done.append(f"replayed {recorded}")


@pytest.fixture
def done():
    return []


def steps_of(done, **options):
    steps = Steps(PretendedGpu(done, **options), Team(1))
    for name in ("a", "b"):
        steps.launch(lambda name=name: done.append(name))
    steps.mark()
    steps.launch(lambda: done.append("c"))
    steps.wait()
    steps.host(lambda: done.append("host"))
    steps.launch(lambda: done.append("d"))
    steps.end()
    return steps


AS_WRITTEN = ["a", "b", "mark", "c", "wait", "host", "d"]
REPLAYED = ["replayed ['a', 'b']", "mark", "replayed ['c']", "wait", "host", "replayed ['d']"]


def ran(steps, done):
    done.clear()
    steps.run()
    return list(done)


def test_pieces_are_replayed_after_some_runs(done):
    steps = steps_of(done)
    assert [ran(steps, done) for _ in range(WARM_UPS + 2)] == [AS_WRITTEN] * WARM_UPS + [REPLAYED] * 2
    steps.record_again()
    assert ran(steps, done) == REPLAYED
    assert steps._device.recorded_in == [1] * 3 + [2] * 3, "a pool is gone with the last of what is recorded in it"


def test_eager_stays_eager(done):
    steps = steps_of(done, replays=False)
    assert [ran(steps, done) for _ in range(WARM_UPS + 2)] == [AS_WRITTEN] * (WARM_UPS + 2)


def test_times_are_told_by_step(done):
    steps = steps_of(done)
    steps.run()
    assert [label for label, _, _ in steps.timeline()] == steps.labels()
    assert steps.labels() == ["launches", "mark", "launches", "wait for the GPU", "host", "launches"]
    starts = [start for _, start, _ in steps.timeline()]
    assert starts == sorted(starts)
    first = steps.ticks_by_label()
    steps.run()
    assert all(steps.ticks_by_label()[label] > count for label, count in first.items())
    steps.reset_ticks()
    assert steps.ticks_by_label() == {}
