"""hybrid-convert in processes of its own that can be killed; see fork_server."""

from importlib import import_module

from fork_server import Fault, serve


def install(fault: Fault) -> None:
    """All that hybrid-convert removes by relative names is the store's."""
    fault.counts_relative = True
    fault.install()


if __name__ == "__main__":
    import_module("torch").set_num_threads(1)
    import_module("hybrid_runtime.stores")
    serve(import_module("hybrid_tools.convert").main, install)
