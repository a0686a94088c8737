"""How fast a store is read into memory, against the disk's sequential speed measured in the same process.

    python benchmarks/load_speed.py STORE [--rounds 5]

The disk: one reader of large direct reads, in order, into one buffer. The load: what the engine does. Both begin with
an empty page cache, and take turns. Linux only. One line of JSON comes last.

The host of a virtual machine takes back what memory the machine has freed, and giving it again, page by page, can cost
more than the disk. So the load is measured twice: as it is (`new memory`), and right after as much memory was touched
and freed (`anonymous`), which is what a machine of one's own does and what the ratio is made of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

from hybrid_runtime.machine import describe_machine
from hybrid_runtime.store.memory import LoadMode, anonymous_block
from hybrid_runtime.store.parallel_read import CHUNK_BYTES, DIRECT_ALIGNMENT, READ_THREADS
from hybrid_runtime.store.reader import Store, open_store

WANTED = 0.8


def empty_page_cache(paths: list[Path]) -> None:
    """Of these files."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_seconds(paths: list[Path]) -> float:
    """Read every file once, in order, past the page cache."""
    buffer = anonymous_block(CHUNK_BYTES).numpy().data
    started_s = time.perf_counter()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            offset, size = 0, path.stat().st_size
            while offset < size:
                offset += os.preadv(descriptor, [buffer], offset)
                if offset % DIRECT_ALIGNMENT:  # only the last read of a file may end within a block
                    break
        finally:
            os.close(descriptor)
    return time.perf_counter() - started_s


def touch_memory(num_bytes: int) -> None:
    """Have as much memory at hand as the load will take."""
    anonymous_block(num_bytes).fill_(1)


def load_seconds(store: Store, load: LoadMode, num_threads: int) -> float:
    """What the engine does before it can compute."""
    started_s = time.perf_counter()
    parts = store.read_parts(store.manifest.parts, load, num_threads)
    seconds = time.perf_counter() - started_s
    assert len(parts) == len(store.manifest.parts)
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=READ_THREADS, help="readers (default: %(default)s)")
    arguments = parser.parse_args(argv)
    store = open_store(arguments.store)
    paths = [store.data_folder / part.file for part in store.manifest.parts]
    samples: dict[str, list[float]] = {name: [] for name in ("disk", "new memory", "anonymous", "mmap")}
    for _ in range(arguments.rounds):
        empty_page_cache(paths)
        samples["disk"].append(disk_seconds(paths))
        for name in ("new memory", "anonymous", "mmap"):
            empty_page_cache(paths)
            if name == "anonymous":
                touch_memory(store.num_bytes)
            samples[name].append(load_seconds(store, "mmap" if name == "mmap" else "anonymous", arguments.threads))
    rates = {name: [store.num_bytes / seconds / 1e9 for seconds in each] for name, each in samples.items()}
    for name, each in rates.items():
        shown = " ".join(f"{rate:.2f}" for rate in each)
        print(
            f"{name:16} median {statistics.median(samples[name]):.3f} s, {statistics.median(each):.2f} GB/s ({shown})"
        )
    ratio = statistics.median(rates["anonymous"]) / statistics.median(rates["disk"])
    print(f"load / disk = {ratio:.2f} (wanted: {WANTED})")
    result = {"bytes": store.num_bytes, "threads": arguments.threads, "seconds": samples, "ratio": ratio}
    print(json.dumps(result | {"machine": asdict(describe_machine())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
