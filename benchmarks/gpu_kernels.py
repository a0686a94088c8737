"""The GPU's kernels: right first, then how fast, against the bandwidth that a copy reaches on the same GPU.

    python benchmarks/gpu_kernels.py

Needs an NVIDIA GPU, and takes about a minute on one. Every kernel is held to its reference before anything is timed; a
kernel that is wrong ends the program with a table of what failed and no figure. Times are medians of runs, each a CUDA
graph as when decoding, that begin with the GPU's caches full of something else; GB/s are of the bytes that are stored,
padding included. `sparse_ffn` is one network for a few tokens at once; `decode` what a token of a mixture runs: lists,
values, down rows and sums of its two experts. The last line is JSON, also written under benchmarks/results with the
machine's description.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.attention import reference as attention_reference
from hybrid_kernels.attention.gpu import LayerCache, attention
from hybrid_kernels.linear import reference as linear_reference
from hybrid_kernels.linear.gpu import linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.sparse_ffn import reference as ffn_reference
from hybrid_kernels.sparse_ffn.gpu import sparse_ffn
from hybrid_kernels.tiers.gpu import HotNetworks, add_down_rows, hot_values, merge, new_partial, split
from hybrid_runtime.machine import describe_machine

FORMATS = (RowFormat("q4", 32), RowFormat("q4", 128), RowFormat("q8", 32), RowFormat("bf16"))
TOLERANCE = {"q4": 4e-3, "q8": 4e-3, "bf16": 4e-3, "f32": 4e-3}  # root mean square over root mean square
SHAPES = {"attention": (4096, 4096), "up": (14336, 4096), "head": (32000, 4096)}
DEVICE = "cuda"
FLUSH_BYTES = 256 << 20
NUM_REPETITIONS = 30


@dataclass(frozen=True)
class Case:
    """num_bytes: stored ones that one run reads. run: on the GPU; expected: by the reference."""

    name: str
    num_bytes: int
    run: Callable[[], torch.Tensor]
    expected: Callable[[], torch.Tensor]
    kind: str


@dataclass(frozen=True)
class Row:
    case: str
    microseconds: float
    slowest_tenth: float
    gb_per_s: float
    share_of_copy: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"needs an NVIDIA GPU: {describe_machine().no_gpu_reason}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # of the references
    failed, rows, copy = [], [], copy_bandwidth()
    for case in cases():
        error = relative_error(case)
        if not error <= TOLERANCE[case.kind]:
            failed.append(f"{case.name}: off by {error:.2e}, at most {TOLERANCE[case.kind]:.0e}")
        elif not options.checks_only:
            rows.append(timed(case, copy))
    if failed:
        print("WRONG, so nothing is reported:\n" + "\n".join(failed), file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}: a copy reads and writes {copy / 1e9:.0f} GB/s")
    for row in rows:
        print(f"{row.case:44} {row.microseconds:9.1f} us  {row.gb_per_s:8.1f} GB/s  {100 * row.share_of_copy:5.1f} %")
    result = {
        "benchmark": "gpu_kernels",
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": asdict(describe_machine()),
        "copy_gb_per_s": copy / 1e9,
        "rows": [asdict(row) for row in rows],
    }
    if rows:
        options.results.mkdir(exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        (options.results / f"gpu_kernels-{stamp}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def cases() -> Iterator[Case]:
    for row_format in FORMATS:
        for name, (num_rows, columns) in SHAPES.items():
            weight = random_rows(num_rows, columns, row_format)
            for count in (1, 4, 16):
                x = torch.randn(count, columns, device=DEVICE)
                yield Case(
                    f"linear {name} {num_rows}x{columns} {row_format}, {count} vectors",
                    weight.rows.numel(),
                    lambda x=x, weight=weight: linear(x, weight),
                    lambda x=x, weight=weight: linear_reference.linear(x, weight),
                    row_format.kind,
                )
    for row_format in FORMATS[:3]:
        bundles = random_bundles(14336, 4096, row_format)
        for share in (0.03, 0.1):
            for count in (1, 4):
                yield ffn_case(bundles, share, count)
            yield decode_case([bundles, random_bundles(14336, 4096, row_format)], share)
    for dtype in (torch.float16, torch.float32):
        for length in (512, 4096):
            yield attention_case(dtype, length)


def random_rows(num_rows: int, columns: int, row_format: RowFormat) -> PackedMatrix:
    """Any bytes are rows of q4 and q8 as long as scales are numbers; quantising would take the host minutes."""
    width = row_format.row_bytes(columns)
    rows = torch.randint(0, 256, (num_rows, width), dtype=torch.uint8, device=DEVICE)
    if row_format.is_quantized:
        start, end = row_format.value_bytes(columns), row_format.value_bytes(columns) + row_format.scale_bytes(columns)
        scales = torch.rand(num_rows, (end - start) // 2, device=DEVICE).half() / 64 + 1e-3
        rows[:, start:end] = scales.view(torch.uint8)
    else:
        rows[:, : 2 * columns] = torch.randn(num_rows, columns, device=DEVICE).bfloat16().view(torch.uint8)
    return PackedMatrix(rows, columns, row_format)


def random_bundles(num_neurons: int, hidden_size: int, row_format: RowFormat) -> Bundles:
    parts = [random_rows(num_neurons, hidden_size, row_format).rows for _ in range(3)]
    return Bundles(torch.stack(parts, 1), hidden_size, row_format)


def ffn_case(bundles: Bundles, share: float, count: int) -> Case:
    activation = Activation("drelu")
    x = torch.randn(count, bundles.hidden_size, device=DEVICE) / 64
    selected = torch.rand(count, bundles.num_neurons, device=DEVICE) < share
    read = int(selected.any(0).sum()) * bundles.data[0].numel()
    return Case(
        f"sparse_ffn 14336x4096 {bundles.row_format}, {100 * share:.0f} %, {count} tokens",
        read,
        lambda: sparse_ffn(x, bundles, activation, selected),
        lambda: ffn_reference.sparse_ffn(x, bundles, activation, selected),
        bundles.row_format.kind,
    )


def decode_case(experts: list[Bundles], share: float) -> Case:
    """A token through all of the experts, whose neurons are all on the GPU."""
    first, count = experts[0], len(experts)
    num_neurons, hidden_size = first.num_neurons, first.hidden_size
    rows = torch.arange(count * num_neurons, dtype=torch.int32, device=DEVICE).view(count, num_neurons)
    networks = HotNetworks(torch.cat([each.data for each in experts]), rows, num_neurons, hidden_size, first.row_format)
    activation = Activation("drelu")
    x = torch.randn(1, hidden_size, device=DEVICE) / 64
    chosen = torch.arange(count, dtype=torch.int32, device=DEVICE)
    weights = torch.rand(count, device=DEVICE)
    logits = torch.rand(count, num_neurons, device=DEVICE)
    cold = torch.empty(count, num_neurons, dtype=torch.int32, device=DEVICE)
    cold_counts = torch.zeros(count, dtype=torch.int64, device=DEVICE)

    def run() -> torch.Tensor:
        lists = split(networks, chosen, logits, 1 - share, cold, cold_counts)
        hidden = hot_values(x, networks, activation, chosen, lists)
        partial = new_partial(networks, count, merges_hidden=False)
        add_down_rows(hidden, networks, chosen, lists, partial)
        return merge(partial, networks, chosen, weights)

    def expected() -> torch.Tensor:
        outputs = (
            ffn_reference.sparse_ffn(x, each, activation, own[None]) for each, own in zip(experts, active, strict=True)
        )
        return sum((weight * output for weight, output in zip(weights, outputs, strict=True)), torch.zeros_like(x))

    active = logits > 1 - share
    values = hot_values(x, networks, activation, chosen, split(networks, chosen, logits, 1 - share, cold, cold_counts))
    rows_read = 2 * int(active.sum()) + int((active & (values != 0)).sum())  # no down rows of those that came out as 0
    return Case(
        f"decode {count} of {num_neurons}x{hidden_size} {first.row_format}, {100 * share:.0f} %",
        rows_read * first.data[0, 0].numel(),
        run,
        expected,
        first.row_format.kind,
    )


def attention_case(dtype: torch.dtype, length: int) -> Case:
    keys, values = (torch.randn(length, 8, 128, device=DEVICE).to(dtype) for _ in range(2))
    query, cache = torch.randn(1, 32, 128, device=DEVICE), LayerCache(keys, values, 8, 128)
    positions = torch.tensor([length - 1], dtype=torch.int32, device=DEVICE)

    def expected() -> torch.Tensor:
        on_host = (each.cpu() for each in (query, keys, values))
        return attention_reference.attention(*on_host, length - 1).cuda()

    return Case(
        f"attention 32 heads, 8 kv, {cache.kind}, {length} positions",
        2 * keys.numel() * keys.element_size(),
        lambda: attention(query, cache, positions),
        expected,
        "f32",
    )


def relative_error(case: Case) -> float:
    found, again, expected = case.run(), case.run(), case.expected()
    if not torch.equal(found, again):
        return float("inf")  # two runs must agree to the bit
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def timed(case: Case, copy: float) -> Row:
    seconds = sorted(timings(replayed(case.run)))
    median = statistics.median(seconds)
    speed = case.num_bytes / median
    return Row(case.name, 1e6 * median, 1e6 * seconds[int(0.9 * len(seconds))], speed / 1e9, speed / copy)


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """Without the host's time for launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timings(run: Callable[[], object]) -> Iterator[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    run()
    for _ in range(NUM_REPETITIONS):
        flush.zero_()
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        run()
        ended.record()
        ended.synchronize()
        yield started.elapsed_time(ended) / 1000


def copy_bandwidth() -> float:
    """Bytes a second that are read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(timings(lambda: target.copy_(source)))


if __name__ == "__main__":
    sys.exit(main())
