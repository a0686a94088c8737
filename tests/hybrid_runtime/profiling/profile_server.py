"""hybrid-profile in processes of its own that can be killed; see tests/fork_server.py.

The state is saved after every window, and every second window is held out. A layer's rows of the sample are a change to
the disk too, and so is what safetensors writes, in Rust: of both, half is there before the rest.
"""

from __future__ import annotations

import gc
import os
from importlib import import_module
from pathlib import Path

from fork_server import Fault, serve


def install(fault: Fault) -> None:
    """Let files be there by half before the rest of them is written."""
    fault.counts_relative = True
    tensor_files = import_module("hybrid_runtime.tensor_files")
    samples = import_module("hybrid_runtime.profiling.samples")
    save_whole, write_all = tensor_files.save_file, samples.SampleFile.write

    def save_half_first(tensors, path, metadata):
        save_whole(tensors, path, metadata)
        data = Path(path).read_bytes()
        os.truncate(path, len(data) // 2)
        fault.see("write", (path,))
        Path(path).write_bytes(data)

    def write_half_first(file, layer_idx, slots, rows):
        half = len(slots) // 2
        write_all(file, layer_idx, slots[:half], rows[:half])
        fault.see("write", (file.path,))
        write_all(file, layer_idx, slots, rows)

    tensor_files.save_file, samples.SampleFile.write = save_half_first, write_half_first
    fault.install()


if __name__ == "__main__":
    import_module("torch").set_num_threads(1)
    run = import_module("hybrid_runtime.profiling.run")
    run.SAVE_EVERY_S, run.HELD_OUT_EVERY = 0, 2
    for module in ("hybrid_runtime.engine", "hybrid_runtime.text.load", "tokenizers", "hybrid_kernels.native.build"):
        import_module(module)
    import_module("llvmlite.binding")
    import_module("numpy.random")
    gc.collect()
    gc.freeze()  # else every child's first collection copies all of these pages
    gc.disable()
    serve(import_module("hybrid_tools.profile").main, install)
