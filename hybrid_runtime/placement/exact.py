"""The best placement, found and proven by HiGHS as a mixed-integer linear program.

Every layer has one block of variables a merge point, with a switch that is 1 for the block which counts. A group is in
tier t of a block with x[t] in {0, 1}; the last tier of the block, the rest, gets what x leaves of the switch. So every
row is the switch times `everything in the rest` plus, group by group, what another tier changes. Blocks with a switch
of their own, instead of one set of variables and large constants, make the relaxation nearly as good as the answer:
a layer that is half on the GPU pays half the sync.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from hybrid_runtime.errors import BudgetError
from hybrid_runtime.placement.filling import fill_free_ram
from hybrid_runtime.placement.greedy import place_greedily
from hybrid_runtime.placement.problem import (
    MERGE_POINTS,
    LayerGroups,
    Load,
    MergePoint,
    Placement,
    PlacementProblem,
    Tier,
    load,
    no_placement,
    place_layer,
    require_room,
    sync_s,
    violations,
)

if TYPE_CHECKING:
    import highspy

RELATIVE_GAP: Final = 1e-3  # the costs are measured, and vary by more than that from run to run
TIME_LIMIT_S: Final = 8.0
LARGEST_TOTAL: Final = 1e4  # the objective's unit is chosen so, because HiGHS rounds at 1e-6 of whatever unit it gets
ROUNDING: Final = 1e-6  # of the objective: the bound that HiGHS reports is as exact as its tolerances


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement, and how good it is known to be.

    gap: share of its time per token that a better placement could save at most. is_optimal: gap is within what was
    asked for. status: HiGHS's own last word. found_by: greedy where HiGHS found nothing better in its time. greedy_s:
    the greedy answer's time, None where it found none.
    """

    placement: Placement
    is_optimal: bool
    gap: float
    status: str
    found_by: Literal["highs", "greedy"]
    solve_s: float
    greedy_s: float | None


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer at one merge point, as columns. switch: 1 where it counts; time: the slower side's, scaled.

    moved: a column per group for every tier but the rest.
    """

    position: int
    merge: MergePoint
    switch: int
    time: int
    moved: Mapping[Tier, list[int]]
    rest: Tier


@dataclass(slots=True)
class _Program:
    """A mixed-integer linear program under construction: every column is at least 0, rows are sparse."""

    costs: list[float] = field(default_factory=list)
    uppers: list[float] = field(default_factory=list)
    integers: list[bool] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)

    def add_time(self) -> int:
        """A column for a time that the objective adds up."""
        return self._add_column(cost=1.0, upper=math.inf, integer=False)

    def add_choice(self, cost: float = 0.0) -> int:
        """A column that is 0 or 1."""
        return self._add_column(cost=cost, upper=1.0, integer=True)

    def add_row(self, terms: Mapping[int, float], lower: float = -math.inf, upper: float = math.inf) -> None:
        """Lower <= sum of column times coefficient <= upper."""
        self.rows.append(({column: value for column, value in terms.items() if value}, lower, upper))

    def _add_column(self, *, cost: float, upper: float, integer: bool) -> int:
        self.costs.append(cost)
        self.uppers.append(upper)
        self.integers.append(integer)
        return len(self.costs) - 1


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What HiGHS came back with. values: of all columns, None where it found none; bound: no solution costs less."""

    status: str
    is_infeasible: bool
    values: list[float] | None
    bound: float


def place_exactly(
    problem: PlacementProblem, *, relative_gap: float = RELATIVE_GAP, time_limit_s: float = TIME_LIMIT_S
) -> Solution:
    """The placement with the least expected time per token, to within relative_gap or as near as time_limit_s allows.

    The same problem gives the same placement, in whatever order its groups come, unless the time limit ends the search.
    Raise BudgetError where nothing fits.
    """
    start = time.perf_counter()
    require_room(problem)
    ordered, orders = _ordered(problem)
    greedy = place_greedily(ordered)
    scale = _scale(ordered)
    program = _program(ordered, scale)
    first_values = None if greedy is None else _values(program, greedy, scale)
    outcome = _run(program, first_values, relative_gap, time_limit_s)
    found = None if outcome.values is None else _placement(ordered, program, outcome.values)
    if found is not None and violations(ordered, found):  # a byte or two, where HiGHS rounded
        found = None
    best = min((each for each in (greedy, found) if each is not None), key=lambda p: p.objective_s, default=None)
    if best is None and not outcome.is_infeasible:
        raise BudgetError(f"no placement was found in {time_limit_s:g} s ({outcome.status}); give more --vram or --ram")
    if best is None:
        raise no_placement(problem)
    filled = fill_free_ram(ordered, best)
    gap = 1 - max(0.0, outcome.bound / scale) / filled.objective_s if filled.objective_s > 0 else 0.0
    return Solution(
        placement=_restored(filled, problem, orders),
        is_optimal=gap <= relative_gap + ROUNDING,
        gap=max(0.0, gap),
        status=outcome.status,
        found_by="greedy" if best is greedy else "highs",
        solve_s=time.perf_counter() - start,
        greedy_s=None if greedy is None else greedy.objective_s,
    )


def _ordered(problem: PlacementProblem) -> tuple[PlacementProblem, list[list[int]]]:
    """The problem with every layer's groups sorted, and which group of the original each one is."""
    orders = []
    for layer in problem.layers:
        sort_keys = [(-group.active / group.num_neurons, group.num_neurons) for group in layer.groups]
        orders.append(sorted(range(len(sort_keys)), key=sort_keys.__getitem__))
    layers = tuple(
        replace(layer, groups=tuple(layer.groups[i] for i in order))
        for layer, order in zip(problem.layers, orders, strict=True)
    )
    return replace(problem, layers=layers), orders


def _restored(placement: Placement, problem: PlacementProblem, orders: list[list[int]]) -> Placement:
    """The placement with its tiers in the order of the problem's groups."""
    layers = []
    for layer, placed, order in zip(problem.layers, placement.layers, orders, strict=True):
        tiers = dict(zip(order, placed.tiers, strict=True))
        layers.append(place_layer(layer, placed.merge, [tiers[i] for i in range(len(order))]))
    return Placement(tuple(layers))


def _scale(problem: PlacementProblem) -> float:
    """Units of the program's objective in a second."""
    largest_s = 0.0
    for layer in problem.layers:
        costs = layer.costs
        per_neuron_s = costs.cpu_s + costs.gpu_s + costs.disk_s * problem.allow_disk
        syncs_s = costs.sync_s + costs.hidden_sync_s + costs.none_sync_s + costs.all_gpu_sync_s
        largest_s += layer.active * per_neuron_s + syncs_s
    return LARGEST_TOTAL / largest_s if largest_s > 0 else 1.0


def _program(problem: PlacementProblem, scale: float) -> _Program:
    """The whole program: one block a layer and merge point, and a row of bytes for VRAM and for RAM."""
    program = _Program()
    for position, layer in enumerate(problem.layers):
        merges = [merge for merge in MERGE_POINTS if _may_fit(problem, layer, merge)]
        blocks = [_add_block(program, problem, position, merge, scale) for merge in merges]
        program.add_row({block.switch: 1.0 for block in blocks}, lower=1.0, upper=1.0)
        program.blocks.extend(blocks)
    _add_room(program, problem, problem.gpu_bytes, lambda each: each.gpu_bytes)
    _add_room(program, problem, problem.ram_bytes, lambda each: each.ram_bytes)
    return program


def _may_fit(problem: PlacementProblem, layer: LayerGroups, merge: MergePoint) -> bool:
    """False where merging there takes more VRAM for this layer alone than there is."""
    if merge == "none":
        return True
    if merge == "gpu":
        return problem.min_hot <= layer.num_neurons and layer.num_neurons * layer.bundle_bytes <= problem.gpu_bytes
    smallest = 0 if merge == "hidden" else min(group.num_neurons for group in layer.groups)
    num_hot = max(problem.min_hot, smallest)
    down_bytes = (layer.num_neurons - num_hot) * layer.down_bytes if merge == "hidden" else 0
    return num_hot <= layer.num_neurons and num_hot * layer.bundle_bytes + down_bytes <= problem.gpu_bytes


def _add_block(program: _Program, problem: PlacementProblem, position: int, merge: MergePoint, scale: float) -> _Block:
    """Columns of one layer at one merge point; its time is at least either side's; min_hot holds."""
    layer = problem.layers[position]
    *moved, rest = problem.tiers(merge)
    block = _Block(
        position=position,
        merge=merge,
        switch=program.add_choice(cost=sync_s(layer, merge) * scale),
        time=program.add_time(),
        moved={tier: [program.add_choice() for _ in layer.groups] for tier in moved},
        rest=rest,
    )
    active = [group.active * scale for group in layer.groups]
    sides: tuple[Callable[[Load], float], ...] = (lambda each: each.cpu_s, lambda each: each.gpu_s)
    for side_s in sides:
        program.add_row(dict(_terms(layer, block, active, side_s)) | {block.time: -1.0}, upper=0.0)
    for columns in zip(*block.moved.values(), strict=True):
        program.add_row(dict.fromkeys(columns, 1.0) | {block.switch: -1.0}, upper=0.0)
    if "gpu" in block.moved and problem.min_hot:
        hot = {column: float(group.num_neurons) for column, group in zip(block.moved["gpu"], layer.groups, strict=True)}
        program.add_row(hot | {block.switch: -float(problem.min_hot)}, lower=0.0)
    return block


def _add_room(program: _Program, problem: PlacementProblem, room: int, bytes_of: Callable[[Load], int]) -> None:
    """The row for one memory, in the largest unit that divides every amount, since HiGHS counts in floats."""
    terms: dict[int, int] = {}
    for block in program.blocks:
        layer = problem.layers[block.position]
        sizes = [group.num_neurons for group in layer.groups]
        terms |= {column: int(value) for column, value in _terms(layer, block, sizes, bytes_of)}
    unit = math.gcd(*terms.values())
    if unit:
        program.add_row({column: value // unit for column, value in terms.items()}, upper=room // unit)


def _terms(
    layer: LayerGroups, block: _Block, amounts: Sequence[float], per_unit: Callable[[Load], float]
) -> Iterator[tuple[int, float]]:
    """A block's part of a row which adds up amounts[group] times what a unit takes in the group's tier."""
    in_rest = per_unit(load(layer, block.merge, block.rest))
    yield block.switch, sum(amounts) * in_rest
    for tier, columns in block.moved.items():
        change = per_unit(load(layer, block.merge, tier)) - in_rest
        yield from ((column, amount * change) for column, amount in zip(columns, amounts, strict=True))


def _values(program: _Program, placement: Placement, scale: float) -> list[float]:
    """All columns' values for a placement."""
    values = [0.0] * len(program.costs)
    for block in program.blocks:
        placed = placement.layers[block.position]
        if placed.merge == block.merge:
            values[block.switch] = 1.0
            values[block.time] = max(placed.cpu_s, placed.gpu_s) * scale
            for group, tier in enumerate(placed.tiers):
                if tier != block.rest:
                    values[block.moved[tier][group]] = 1.0
    return values


def _placement(problem: PlacementProblem, program: _Program, values: list[float]) -> Placement:
    """The placement that the columns' values mean."""
    layers = []
    for block in program.blocks:
        if values[block.switch] > 0.5:
            layer = problem.layers[block.position]
            tiers = [block.rest] * len(layer.groups)
            for tier, columns in block.moved.items():
                tiers = [tier if values[column] > 0.5 else each for column, each in zip(columns, tiers, strict=True)]
            merges = block.merge != "output" or "gpu" in tiers  # a free merge may be chosen with nothing to merge
            layers.append(place_layer(layer, block.merge if merges else "none", tiers))
    return Placement(tuple(layers))


def _run(program: _Program, first_values: list[float] | None, relative_gap: float, time_limit_s: float) -> _Outcome:
    """Solve the program on this thread alone, in silence. first_values: a solution to start from."""
    import highspy  # noqa: PLC0415  # heavy, and only needed here
    from highspy._core import _Highs  # noqa: PLC0415  # highspy.Highs prints a banner before it can be told not to

    solver = _Highs()
    options: dict[str, bool | float | str] = {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "time_limit": time_limit_s,
        "mip_rel_gap": relative_gap,
        "presolve": "off",  # with a first solution HiGHS 1.16 loses what presolve moved to the objective's constant
    }
    for name, value in options.items():
        _require_ok(solver.setOptionValue(name, value), f"set {name}")
    _require_ok(solver.passModel(_linear_program(program)), "read the program")
    if first_values is not None:
        first = highspy.HighsSolution()
        first.col_value = first_values
        _require_ok(solver.setSolution(first), "read the first solution")
    solver.run()  # its own status only warns of limits, which the model's status tells too
    status, info = solver.getModelStatus(), solver.getInfo()
    is_solved = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    return _Outcome(
        status=solver.modelStatusToString(status),
        is_infeasible=status == highspy.HighsModelStatus.kInfeasible,
        values=list(solver.getSolution().col_value) if is_solved else None,
        bound=info.mip_dual_bound,
    )


def _linear_program(program: _Program) -> highspy.HighsLp:
    """The program as HiGHS takes it, row by row."""
    import highspy  # noqa: PLC0415  # heavy, and only needed here

    terms = [term for row, _, _ in program.rows for term in row.items()]
    kinds = highspy.HighsVarType
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(program.costs), len(program.rows)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.costs, [0.0] * len(program.costs), program.uppers
    lp.integrality_ = [kinds.kInteger if integer else kinds.kContinuous for integer in program.integers]
    lp.row_lower_ = [lower for _, lower, _ in program.rows]
    lp.row_upper_ = [upper for _, _, upper in program.rows]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = [0, *itertools.accumulate(len(row) for row, _, _ in program.rows)]
    lp.a_matrix_.index_ = [column for column, _ in terms]
    lp.a_matrix_.value_ = [float(value) for _, value in terms]
    return lp


def _require_ok(status: highspy.HighsStatus, step: str) -> None:
    assert status.name != "kError", f"HiGHS did not {step}"
