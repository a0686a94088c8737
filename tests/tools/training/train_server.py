"""hybrid-train in processes of its own that can be killed; see fork_server.

What safetensors writes, in Rust, is a change to the disk too, and then half of it is there. No picture is drawn at the
end: that costs most of the time, and pictures have tests of their own.
"""

import os
from importlib import import_module
from pathlib import Path

from fork_server import Fault, serve


def install(fault: Fault) -> None:
    """Let a checkpoint's file be there by half before the rest of it is written."""
    tensor_files = import_module("hybrid_runtime.tensor_files")
    save_whole = tensor_files.save_file

    def save_half_first(tensors, path, metadata):
        save_whole(tensors, path, metadata)
        data = Path(path).read_bytes()
        os.truncate(path, len(data) // 2)
        fault.see("write", (path,))
        with open(os.open(path, os.O_WRONLY), "wb", closefd=True) as file:  # noqa: PTH123  # a descriptor
            file.write(data)

    tensor_files.save_file = save_half_first
    fault.install()


if __name__ == "__main__":
    import_module("torch").set_num_threads(1)
    for module in ("torch._dynamo", "sentencepiece", "hybrid_tools.training.display"):  # an optimiser imports the first
        import_module(module)
    import_module("hybrid_tools.training.run").draw_run = lambda log, picture: None
    serve(import_module("hybrid_tools.train").main, install)
