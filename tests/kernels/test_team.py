"""Teams of threads: programs compute the same with any number of threads, and neither running nor closing hangs."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.native.load import KernelLibrary
from hybrid_kernels.native.state_layout import AHEAD, AHEAD_BYTES, AHEAD_STRIDE
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.reference import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.team import MOST_THREADS, Beginning, Operation, Team

from .kernel_calls import decode_ffn, nan_floats, project, project_operation

F32 = RowFormat("f32")
THREADS = pytest.mark.parametrize("num_threads", [1, 2, 4, 7], ids=lambda number: f"{number} threads")
pytestmark = pytest.mark.timeout(120)  # a hang is what these tests are about


@pytest.fixture(scope="module")
def library():
    """One for all teams here: loading kernels is a third of what making a team takes."""
    return KernelLibrary()


@pytest.fixture
def team_of(library):
    made = []

    def make(num_threads):
        made.append(Team(num_threads, library))
        return made[-1]

    yield make
    for each in made:
        each.close()


def chain(team, length=6, size=24, **options):
    """A program whose every operation reads what all workers wrote in the one before; its input, output and answer."""
    matrices = torch.randint(-2, 3, (length, size, size)).float()
    x = torch.randint(-2, 3, (size,)).float()
    vectors = [x.numpy(), *(nan_floats(size) for _ in range(length))]
    operations, kept, expected = [], [x, vectors], x
    for idx, dense in enumerate(matrices):
        weight = PackedMatrix(quantize_rows(dense / 8, F32), size, F32)  # an eighth: exact, and the product stays small
        operation, own = project_operation(
            team, vectors[idx], [(weight, None)], [vectors[idx + 1]], [None], columns=size, rows_per_task=1, **options
        )
        beginning = Beginning(weight.rows.data_ptr(), weight.rows.stride(0), 4096)
        operations.append(replace(operation, beginning=beginning if options else None))
        kept.append(own)
        expected = dense / 8 @ expected
    return team.program(operations), kept, vectors, expected


@THREADS
def test_an_operation_sees_what_all_workers_wrote_before_its_barrier(team_of, num_threads):
    """A thousand times: a barrier that lets one through too early shows as NaN or an old value."""
    team = team_of(num_threads)
    program, kept, vectors, expected = chain(team)
    for _ in range(1000 if num_threads <= 2 else 300):
        for vector in vectors[1:]:
            vector.fill(np.nan)
        team.run(program)
        assert np.array_equal(vectors[-1], expected.numpy())
    del kept


@THREADS
def test_workers_may_begin_with_the_tasks_of_their_own_numbers(team_of, num_threads):
    """Those are prefetched before the barrier, beyond the rows too; there are fewer tasks than workers, or more."""
    team = team_of(num_threads)
    for size in (1, 3, 24):
        program, kept, vectors, expected = chain(team, size=size, num_static=num_threads)
        for _ in range(50):
            for vector in vectors[1:]:
                vector.fill(np.nan)
            team.run(program)
            assert np.array_equal(vectors[-1], expected.numpy())
        del kept


def test_a_beginning_belongs_to_the_operation_before(team_of):
    """Prefetching changes no result, so one place off would not show otherwise."""
    program, kept, *_ = chain(team_of(2), length=3, num_static=2)
    beginnings = [operation.beginning for operation in program.operations]
    wanted = [[each.address, each.stride, each.num_bytes] for each in beginnings[1:]] + [[0, 0, 0]]
    assert program.words[:, [AHEAD, AHEAD_STRIDE, AHEAD_BYTES]].tolist() == wanted
    del kept


def test_thousands_of_empty_programs_do_not_hang(team_of):
    team = team_of(2)
    program = team.program([])
    for _ in range(5000):
        team.run(program)


def test_programs_take_turns(team_of):
    """A team is given another program between two runs of one, of another length."""
    team = team_of(3)
    long, short = chain(team, length=7), chain(team, length=1)
    for _ in range(200):
        for program, _, vectors, expected in (long, short):
            vectors[-1].fill(np.nan)
            team.run(program)
            assert np.array_equal(vectors[-1], expected.numpy())


@THREADS
def test_closing_right_after_a_run_does_not_hang(library, num_threads):
    before = threading.active_count()
    for _ in range(100 if num_threads <= 2 else 25):
        team = Team(num_threads, library)
        program, _kept, vectors, expected = chain(team, length=1, size=8)
        team.run(program)
        team.close()
        assert np.array_equal(vectors[-1], expected.numpy())
    assert threading.active_count() == before


def test_closing_at_once_and_twice_does_not_hang(library):
    for _ in range(100):
        team = Team(2, library)
        team.close()
        team.close()


def test_closing_after_the_workers_fell_asleep_does_not_hang(library):
    team = Team(4, library)
    time.sleep(0.05)
    team.close()


def test_a_team_that_nobody_holds_ends_its_threads(library):
    before = threading.active_count()
    team = Team(3, library)
    assert threading.active_count() == before + 2
    del team
    assert threading.active_count() == before


def test_threads_at_once_wait_for_each_other(team_of):
    team = team_of(2)
    programs = [chain(team, length=3) for _ in range(3)]
    faults = []

    def use(program, vectors, expected):
        for _ in range(200):
            vectors[-1].fill(np.nan)
            team.run(program)
            if not np.array_equal(vectors[-1], expected.numpy()):
                faults.append(vectors[-1].copy())

    users = [threading.Thread(target=use, args=(program, vectors, answer)) for program, _, vectors, answer in programs]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
        assert not user.is_alive()
    assert faults == []


def test_a_team_outlives_the_thread_that_made_it(library):
    made = []
    maker = threading.Thread(target=lambda: made.append(Team(2, library)))
    maker.start()
    maker.join()
    program, _kept, vectors, expected = chain(made[0])
    made[0].run(program)
    assert np.array_equal(vectors[-1], expected.numpy())
    made[0].close()


def test_workers_sleep_while_nothing_is_computed(team_of):
    team = team_of(4)
    program, *_ = chain(team)
    team.run(program)
    time.sleep(0.05)  # they are awake for some microseconds after a program
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.01  # 3 workers, woken ten times a second by their time-out


@pytest.mark.parametrize("row_format", [F32, RowFormat("q8", 32), RowFormat("q4", 32)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(team_of, row_format, random_matrix, random_bundles):
    weight, bundles, x = (
        random_matrix(150, 200, row_format),
        random_bundles(300, 200, row_format, gated=True),
        torch.randn(200),
    )
    active = torch.rand(1, 300) < 0.4
    few = torch.arange(300)[None] % 37 == 0  # fewer than there are shares
    experts = {"chosen": [1, 0], "weights": [0.7, 0.3]}
    other = random_bundles(300, 200, row_format, gated=True)
    expected = None
    for num_threads in (1, 2, 4, 7):
        team = team_of(num_threads)
        found = (
            project(team, x, weight),
            *(decode_ffn(team, x, [bundles], Activation("drelu"), active=a)[0] for a in (None, active)),
            decode_ffn(team, x, [bundles], Activation("drelu"), active=few, num_shares=32)[0],
            decode_ffn(team, x, [bundles, other], Activation("drelu"), active=active.expand(2, -1), **experts)[0],
        )
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ticks_tell_what_a_program_spent_by_label(team_of):
    team = team_of(2)
    program, *_ = chain(team)
    assert program.ticks_by_label() == {"project": 0}
    team.run(program)
    once = program.ticks_by_label()["project"]
    team.run(program)
    assert 0 < once < program.ticks_by_label()["project"]
    program.reset_ticks()
    assert program.ticks_by_label() == {"project": 0}


def test_seconds_in_compiled_code_add_up(team_of):
    team = team_of(2)
    program, *_ = chain(team)
    assert team.kernel_s == 0
    team.run(program)
    once = team.kernel_s
    team.run(program)
    assert 0 < once < team.kernel_s < 10


def test_an_operation_keeps_its_arguments_alive(team_of):
    """A program holds addresses: of arrays that nobody else holds, too."""
    team = team_of(2)
    program = team.program(
        [
            Operation(kernel("read_memory"), "read", np.array([0, 0, sums.ctypes.data], dtype=np.int64))
            for sums in [np.zeros(16, dtype=np.int64)]
        ]
    )
    assert program.operations[0].arguments.ctypes.data == program.words[0, 1]


@pytest.mark.parametrize("num_threads", [0, -1, MOST_THREADS + 1])
def test_a_number_of_threads_that_no_machine_has_is_refused(num_threads):
    with pytest.raises(ValueError, match=rf"{num_threads} threads: expected 1 to {MOST_THREADS}"):
        Team(num_threads)


def test_a_process_with_a_team_ends_by_itself():
    """Workers are daemons, and a team that is still held is closed at exit."""
    program = "from hybrid_kernels.team import Team; team = Team(3); print('ready')"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (ran.returncode, ran.stdout) == (0, "ready\n"), ran.stderr


EXITS_A_THREAD = """
import ctypes, sys, threading, time
import numpy as np
from hybrid_kernels.native import state_layout
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.team import Operation, Team, WorkerGoneError

num_threads, victim = int(sys.argv[1]), int(sys.argv[2])
team = Team(num_threads)
libc = ctypes.CDLL(None)

@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)
def end_thread(result, error, arguments, worker, counter):
    if worker == victim:
        libc.syscall(60, 0)  # exit: this thread alone, in the middle of an operation
    return 0

words = np.zeros(8, dtype=np.int64)
program = team.program([Operation(kernel("sum_shares"), label, words) for label in ("ends", "after")])
program.words[:, state_layout.FUNCTION] = ctypes.cast(end_thread, ctypes.c_void_p).value
started_s = time.perf_counter()
try:
    team.run(program)
except WorkerGoneError as error:
    print(f"{time.perf_counter() - started_s:.2f}", error, flush=True)
try:
    team.run(program)
except WorkerGoneError:
    print("and runs nothing any more", flush=True)
team.close()
print("closed", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which thread is gone")
@pytest.mark.parametrize(("num_threads", "victim"), [(2, 1), (3, 2)])
def test_a_worker_that_ends_mid_program_is_an_error_within_two_seconds(num_threads, victim):
    command = [sys.executable, "-c", EXITS_A_THREAD, str(num_threads), str(victim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert float(lines[0].split()[0]) < 2
    assert "has ended while it computed" in lines[0]
    assert lines[1:] == ["and runs nothing any more", "closed"]
    assert done.returncode == 0, done.stderr
