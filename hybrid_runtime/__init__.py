"""hybrid-runtime: text from sparse large language models on machines whose GPU is too small for them.

Importing this package loads neither torch nor anything of the engine; `from hybrid_runtime.engine import Engine` does.
"""

__version__ = "2026.11.0"
