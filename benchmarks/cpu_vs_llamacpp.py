"""The CPU path beside llama.cpp's: alternating runs, medians, ratios, one row a line of the acceptance table.

    python benchmarks/cpu_vs_llamacpp.py dense-decode sparse-decode --llama-cpp BUILD --dense STORE --sparse STORE
    python benchmarks/cpu_vs_llamacpp.py stories-decode warm-start --llama-cpp BUILD --stories stories260K-Q4_0.gguf

BUILD is llama.cpp's build folder with bin/llama-bench (and bin/llama-perplexity for the row `perplexity`). STOREs are
hybrid-synth's; for llama.cpp a GGUF file of the dense store's shape is made in --gguf where it is not there yet.
Without a row's name every row runs whose files were named. Prints a table and a last line of JSON, and writes the
same JSON to benchmarks/results/. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from q4_0_gguf import write_q4_0
from side_by_side import Files, Programs, Sample, llama_version
from sparse_ffn_speed import sparse_ffn_sample

from hybrid_runtime.machine import describe_machine, physical_cores, usable_cores
from hybrid_runtime.store.manifest import read_manifest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ("tests/kernels", "tests/hybrid_runtime/model")
SHARED = ROOT.parent / "shared" / "data"


@dataclass(frozen=True, slots=True)
class Row:
    """value: `field` of the first measurement, divided by that of the second where there is one."""

    ours: str
    theirs: str | None
    field: str
    wanted: float
    at_most: bool = False
    needs: tuple[str, ...] = ()

    def reached(self, value: float) -> bool:
        """Whether the value is good enough."""
        return value <= self.wanted if self.at_most else value >= self.wanted


DENSE, SPARSE, STORIES = ("dense", "llama_cpp"), ("dense", "sparse", "llama_cpp"), ("stories", "llama_cpp")
ROWS = {
    "dense-decode": Row("dense decode", "llama.cpp dense decode", "tokens_s", 1.2, needs=DENSE),
    "sparse-decode": Row("sparse decode", "llama.cpp dense decode", "tokens_s", 3.0, needs=SPARSE),
    "sparse-bandwidth": Row("sparse decode", None, "of_bandwidth", 0.8, needs=("sparse",)),
    "prefill": Row("dense prefill", "llama.cpp dense prefill", "tokens_s", 1.0, needs=DENSE),
    "sparse-ffn": Row("sparse ffn", None, "of_bandwidth", 0.75, needs=("sparse",)),
    "overhead": Row("dense decode", None, "overhead", 0.03, at_most=True, needs=("dense",)),
    "stories-decode": Row("stories decode", "llama.cpp stories decode", "tokens_s", 0.5, needs=STORIES),
    "contention": Row("dense contended decode", "dense decode", "tokens_s", 0.45, needs=("dense",)),
    "sparse-contention": Row("sparse contended decode", "sparse decode", "tokens_s", 0.45, needs=("sparse",)),
    "llama-contention": Row("llama.cpp contended decode", "llama.cpp dense decode", "tokens_s", 0.0, needs=DENSE),
    "warm-start": Row("warm start", None, "seconds", 1.5, at_most=True, needs=("stories",)),
    "first-start": Row("first start", None, "seconds", 40.0, at_most=True, needs=("stories",)),
    "perplexity": Row("perplexity", "llama.cpp perplexity", "perplexity", 1.0, at_most=True, needs=(*STORIES, "text")),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    given = {name for name in ("llama_cpp", "dense", "sparse", "stories", "text") if getattr(arguments, name)}
    rows = arguments.rows or [name for name, row in ROWS.items() if given.issuperset(row.needs)]
    for name in rows:
        missing = [f"--{need.replace('_', '-')}" for need in ROWS[name].needs if need not in given]
        if missing:
            sys.exit(f"{name}: needs {' and '.join(missing)}")
    if not arguments.no_tests:
        refuse_on_red()
    samples = run_rounds(arguments, rows)
    return report(arguments, rows, samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all that can run)")
    parser.add_argument("--llama-cpp", type=Path, metavar="BUILD", help="llama.cpp's build folder")
    parser.add_argument("--dense", type=Path, metavar="STORE", help="of hybrid-synth --like mistral-7b")
    parser.add_argument("--sparse", type=Path, metavar="STORE", help="of hybrid-synth --like turbosparse-mistral")
    parser.add_argument("--gguf", type=Path, help="made where it is missing (default: DENSE-Q4_0.gguf)")
    parser.add_argument("--stories", type=Path, metavar="GGUF", help="stories260K-Q4_0.gguf")
    parser.add_argument("--text", type=Path, default=SHARED / "text/tinystories_train_2MB.txt", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="alternating rounds (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of one decode (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(physical_cores(), usable_cores()), help="(%(default)s)")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests first")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.rows) - set(ROWS)
    if unknown:
        parser.error(f"unknown row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if arguments.dense and not arguments.gguf:
        arguments.gguf = arguments.dense.with_name(arguments.dense.name + "-Q4_0.gguf")
    return arguments


def refuse_on_red() -> None:
    """The speed of wrong results is of no interest."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS]
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode:
        sys.exit(f"{' '.join(TESTS)} fail; mend them first, or measure all the same with --no-tests")


def run_rounds(arguments: argparse.Namespace, rows: Sequence[str]) -> dict[str, list[Sample]]:
    """Samples by measurement; a measurement that several rows use runs once a round."""
    names = {name for row in rows for name in (ROWS[row].ours, ROWS[row].theirs) if name is not None}
    if any(name.startswith("llama.cpp") for name in names) and arguments.gguf and not arguments.gguf.exists():
        print(f"writing {arguments.gguf}", file=sys.stderr)
        write_q4_0(read_manifest(arguments.dense).config, arguments.gguf)
    files = Files(
        arguments.llama_cpp, arguments.dense, arguments.sparse, arguments.gguf, arguments.stories, arguments.text
    )
    programs = Programs(files, arguments.threads, arguments.tokens)
    measurements = programs.measurements() | {
        "sparse ffn": lambda: sparse_ffn_sample(arguments.sparse, arguments.threads)
    }
    samples: dict[str, list[Sample]] = {name: [] for name in measurements if name in names}
    for round_idx in range(arguments.runs):
        for name, found in samples.items():
            found.append(measurements[name]())
            shown = ", ".join(f"{field} {value:.4g}" for field, value in found[-1].items())
            print(f"round {round_idx + 1}: {name}: {shown}", file=sys.stderr, flush=True)
    return samples


def report(arguments: argparse.Namespace, rows: Sequence[str], samples: dict[str, list[Sample]]) -> int:
    """Print the table, write the JSON, print it on the last line."""
    medians = {name: median_sample(found) for name, found in samples.items()}
    values = {}
    print("| row | ours | llama.cpp or idle | value | wanted | reached |\n| --- | ---: | ---: | ---: | ---: | --- |")
    for name in rows:
        row = ROWS[name]
        ours = medians[row.ours][row.field]
        theirs = None if row.theirs is None else medians[row.theirs][row.field]
        values[name] = ours if theirs is None else ours / theirs
        wanted = f"{'≤' if row.at_most else '≥'} {row.wanted:g}"
        verdict = "yes" if row.reached(values[name]) else "no"
        shown = "" if theirs is None else f"{theirs:.2f}"
        print(f"| {name} | {ours:.2f} | {shown} | {values[name]:.2f} | {wanted} | {verdict} |")
    rates = [sample["bandwidth_gbs"] for found in samples.values() for sample in found if "bandwidth_gbs" in sample]
    if rates:
        print(f"\nmemory read at {statistics.median(rates):.1f} GB/s by {arguments.threads} threads (median)")
    result = {
        "values": values,
        "medians": medians,
        "samples": samples,
        "bandwidth_gbs": rates,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "llama_cpp": llama_version(Files(arguments.llama_cpp, *[None] * 5)) if arguments.llama_cpp else None,
        "machine": asdict(describe_machine()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cpu_vs_llamacpp-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
    print(json.dumps(result))
    return 0


def median_sample(found: Sequence[Sample]) -> Sample:
    """The median of each field."""
    return {field: statistics.median(sample[field] for sample in found) for field in found[0]}


if __name__ == "__main__":
    sys.exit(main())
