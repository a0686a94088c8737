"""The map is kept: imports only fall, nothing loads code from files, files stay small, every module says what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "hybrid_runtime": ROOT / "hybrid_runtime",
    "hybrid_kernels": ROOT / "kernels" / "hybrid_kernels",
    "hybrid_predictors": ROOT / "predictors" / "hybrid_predictors",
    "hybrid_tools": ROOT / "tools" / "hybrid_tools",
}
# What each package may import of the four; the kernels import none of the others.
ALLOWED = {
    "hybrid_kernels": {"hybrid_kernels"},
    "hybrid_predictors": {"hybrid_kernels", "hybrid_predictors"},
    "hybrid_runtime": {"hybrid_kernels", "hybrid_predictors", "hybrid_runtime"},
    "hybrid_tools": {"hybrid_kernels", "hybrid_predictors", "hybrid_runtime", "hybrid_tools"},
}
ENTRANCES = ("hybrid_runtime.cli", "hybrid_runtime.server")  # they import the engine, nothing imports them
BY_TABLE = {"hybrid_kernels.native.build"}  # imports modules by names from kernel_names.SOURCES, tested below
CODE_LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CODE_RUNNERS = {"eval", "exec"}
# the one reader of torch.save's files: it names pickle's error, and torch.load(weights_only=True) alone
READS_TORCH_FILES = "hybrid_tools.torch_files"
LARGEST_FILE = 400  # lines
LARGEST_TEST_FILE = 600  # lines

Fault = tuple[int, str]


def package_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def is_entrance(module: str) -> bool:
    return any(module == entrance or module.startswith(f"{entrance}.") for entrance in ENTRANCES)


def may_import_entrances(module: str) -> bool:
    """The entrances' own modules, and the tools, which are programs like them."""
    return is_entrance(module) or package_of(module) == "hybrid_tools"


def imported_modules(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is imported anywhere in the file; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            constant = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            yield node.lineno, argument.value if constant else "an unnamed module"


def called_name(node: ast.Call) -> str:
    """`f` of f(), `a.f` of a.f(), `?.f` of a().f()."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return f"{owner.id if isinstance(owner, ast.Name) else '?'}.{node.func.attr}"
    return "?"


def import_faults(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Fault]:
    for line, name in imported_modules(tree, module, is_package=is_package):
        package = package_of(name)
        if package in PACKAGES and package not in ALLOWED[package_of(module)]:
            yield line, f"{name}: this arrow runs up"
        if is_entrance(name) and not may_import_entrances(module):
            yield line, f"{name}: nothing imports the command line or the server"
        names_error = module == READS_TORCH_FILES and name in ("pickle", "pickle.UnpicklingError")
        if (package in CODE_LOADERS and not names_error) or (name == "an unnamed module" and module not in BY_TABLE):
            yield line, f"{name}: loads code that no one has read"


def call_faults(tree: ast.Module) -> Iterator[Fault]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called_name(node)
        if name in CODE_RUNNERS or name in {f"builtins.{each}" for each in CODE_RUNNERS}:
            yield node.lineno, f"{name}() runs text as code"
        if name in ("torch.load", "torch.jit.load") or (name == "?.load" and "torch" in ast.unparse(node.func)):
            yield node.lineno, f"{name}() can run code from a file"
        if name.split(".")[-1] == "load" and any(each.arg == "allow_pickle" for each in node.keywords):
            yield node.lineno, "allow_pickle can run code from a file"


def word_faults(tree: ast.Module) -> Iterator[Fault]:
    """trust_remote_code as an argument, a name, an attribute, or a string that is a key; not inside a sentence."""
    for node in ast.walk(tree):
        words = [getattr(node, field, None) for field in ("arg", "id", "attr", "value")]
        if any(isinstance(word, str) and word == "trust_remote_code" for word in words):
            yield getattr(node, "lineno", 0), "trust_remote_code runs code from a checkpoint"
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and any(each.name == "load" for each in node.names)
        ):
            yield node.lineno, "torch.load can run code from a file"


def handler_faults(tree: ast.Module) -> Iterator[Fault]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(each).removeprefix("builtins.") for each in caught if each is not None}
        if node.type is None:
            yield node.lineno, "a bare except"
        elif ("Exception" in names and not is_narrowed(node)) or ("BaseException" in names and not reraises(node)):
            yield node.lineno, f"except {', '.join(sorted(names))} hides bugs"


def reraises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler's last statement is a bare raise, as in a cleanup."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def is_narrowed(handler: ast.ExceptHandler) -> bool:
    """Whether the handler first lets every subclass through: some libraries raise Exception itself."""
    first = handler.body[0]
    is_narrowing = isinstance(first, ast.If) and ast.unparse(first.test) == f"type({handler.name}) is not Exception"
    return is_narrowing and ast.unparse(first.body[0]) == "raise"


def faults_of(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Everything that a source of one of the four packages does wrong, as `line: what`."""
    tree = ast.parse(source)
    found = [
        *import_faults(tree, module, is_package=is_package),
        *(fault for fault in call_faults(tree) if module != READS_TORCH_FILES or "torch.load" not in fault[1]),
        *word_faults(tree),
        *handler_faults(tree),
    ]
    if not (ast.get_docstring(tree) or "").strip() and source.strip():
        found.append((1, "no docstring says what the module is"))
    if len(source.splitlines()) > LARGEST_FILE:
        found.append((LARGEST_FILE, f"{len(source.splitlines())} lines, at most {LARGEST_FILE} fit in one sitting"))
    return [f"{line}: {what}" for line, what in sorted(set(found))]


def modules() -> dict[str, Path]:
    found = {}
    for folder in PACKAGES.values():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def test_the_four_packages_are_read():
    assert {package_of(module) for module in MODULES} == set(PACKAGES)
    assert len(MODULES) > 40


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_to_the_map(module):
    path = MODULES[module]
    assert faults_of(path.read_text(), module, is_package=path.name == "__init__.py") == []


def test_the_reader_of_torch_files_loads_tensors_only():
    source = MODULES[READS_TORCH_FILES].read_text()
    assert source.count("torch.load(") == source.count("weights_only=True)") == 1


def test_kernels_by_name_are_this_packages_own():
    from hybrid_kernels.native.kernel_names import SOURCES  # noqa: PLC0415

    assert {source.partition(":")[0] for source in SOURCES.values()} <= {
        module for module in MODULES if package_of(module) == "hybrid_kernels"
    }


def test_test_files_fit_in_one_sitting_too():
    sizes = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert len(sizes) > 10
    assert {str(path): size for path, size in sizes.items() if size > LARGEST_TEST_FILE} == {}


DOC = '"""A module."""\n'
# module, source, what the checker must say
BAD = [
    ("hybrid_kernels.x", "import hybrid_runtime", "hybrid_runtime: this arrow runs up"),
    ("hybrid_kernels.x", "import hybrid_predictors.mlp as mlp", "hybrid_predictors.mlp: this arrow runs up"),
    ("hybrid_kernels.x", "from hybrid_tools import convert", "this arrow runs up"),
    ("hybrid_predictors.x", "import numpy, hybrid_runtime.errors", "hybrid_runtime.errors: this arrow runs up"),
    ("hybrid_predictors.x", "def f():\n    from hybrid_runtime.config import ModelConfig", "this arrow runs up"),
    ("hybrid_runtime.x", "if True:\n    import hybrid_tools.convert", "hybrid_tools.convert: this arrow runs up"),
    ("hybrid_runtime.x", "import importlib\nimportlib.import_module('hybrid_tools')", "this arrow runs up"),
    ("hybrid_runtime.x", "import importlib\nimportlib.import_module(name)", "an unnamed module"),
    ("hybrid_runtime.x", "from hybrid_runtime.cli import run", "nothing imports the command line"),
    ("hybrid_runtime.x", "from hybrid_runtime import cli", "nothing imports the command line"),
    ("hybrid_runtime.x", "from . import cli", "hybrid_runtime.cli: nothing imports the command line"),
    ("hybrid_runtime.store.x", "from ..cli.run import main", "nothing imports the command line"),
    ("hybrid_runtime.x", "import hybrid_runtime.server.app", "nothing imports the command line or the server"),
    ("hybrid_tools.x", "import pickle", "pickle: loads code"),
    ("hybrid_tools.x", "from pickle import loads", "pickle: loads code"),
    ("hybrid_tools.x", "def f():\n    import joblib", "joblib: loads code"),
    ("hybrid_tools.x", "import torch\ntorch.load('x', weights_only=True)", "torch.load() can run code"),
    ("hybrid_tools.x", "from torch import load", "torch.load can run code"),
    ("hybrid_tools.x", "np.load('x', allow_pickle=True)", "allow_pickle can run code"),
    ("hybrid_tools.x", "AutoModel.from_pretrained('x', trust_remote_code=True)", "trust_remote_code runs code"),
    ("hybrid_tools.x", "options = {'trust_remote_code': True}", "trust_remote_code runs code"),
    ("hybrid_tools.x", "eval('1')", "eval() runs text"),
    ("hybrid_tools.x", "import builtins\nbuiltins.exec('1')", "builtins.exec() runs text"),
    ("hybrid_tools.x", "try:\n    f()\nexcept Exception:\n    pass", "except Exception hides bugs"),
    ("hybrid_tools.x", "try:\n    f()\nexcept (OSError, Exception) as e:\n    raise", "hides bugs"),
    ("hybrid_tools.x", "try:\n    f()\nexcept BaseException:\n    pass", "except BaseException hides bugs"),
    (
        "hybrid_tools.x",
        "try:\n    f()\nexcept Exception as e:\n    if type(e) is not Exception:\n        pass",
        "except Exception hides bugs",
    ),
    ("hybrid_tools.x", "try:\n    f()\nexcept:\n    raise", "a bare except"),
    ("hybrid_tools.x", "x = 1\n" * 400, "401 lines, at most 400"),
]
GOOD = [
    ("hybrid_tools.x", "import hybrid_runtime.cli.run\nimport hybrid_predictors.mlp\nimport hybrid_kernels"),
    ("hybrid_runtime.cli.x", "from hybrid_runtime.cli import options\nfrom . import answer"),
    ("hybrid_runtime.x", "import hybrid_kernels, hybrid_predictors\nfrom hybrid_runtime.client import x"),
    ("hybrid_runtime.x", "import json\njson.load(file)\nmodel.eval()\nself.exec_()"),
    ("hybrid_runtime.x", "try:\n    f()\nexcept BaseException:\n    undo()\n    raise"),
    (
        "hybrid_runtime.x",
        "try:\n    f()\nexcept Exception as e:\n    if type(e) is not Exception:\n        raise\n    g()",
    ),
    ("hybrid_runtime.x", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
    ("hybrid_kernels.x", "raise ValueError('found trust_remote_code in it, which is refused')"),
]


@pytest.mark.parametrize(("module", "source", "message"), BAD, ids=lambda value: value[:40].replace("\n", " "))
def test_the_checker_sees_what_it_is_for(module, source, message):
    faults = faults_of(DOC + source, module)
    assert any(message in fault for fault in faults), faults


@pytest.mark.parametrize(("module", "source"), GOOD, ids=lambda value: value[:40].replace("\n", " "))
def test_the_checker_lets_the_rest_pass(module, source):
    assert faults_of(DOC + source, module) == []


@pytest.mark.parametrize("source", ["x = 1", "# a comment\n", '""" """\nx = 1', "x = 1\n'''late'''"])
def test_the_checker_wants_a_docstring(source):
    assert faults_of(source, "hybrid_kernels.x") == ["1: no docstring says what the module is"]


def test_an_empty_file_needs_none():
    assert faults_of("", "hybrid_kernels.norm", is_package=True) == []
