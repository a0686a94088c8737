"""hybrid_kernels/compiled.py: what is kept on disk is never taken for newer code."""

import logging

import numba
import pytest

from hybrid_kernels import compiled as compiled_module
from hybrid_kernels.compiled import CALLED_SOURCES, compiled, source_digest


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where Numba keeps what this test compiles."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def one_more(value):
    return value + 1


def test_code_generated_from_other_sources_is_kept_apart(kept, monkeypatch):
    for digest in ("aaaaaaaa", "bbbbbbbb", "aaaaaaaa"):
        monkeypatch.setattr(compiled_module, "source_digest", lambda digest=digest: digest)
        monkeypatch.setattr(one_more, "__qualname__", "one_more")
        assert compiled()(one_more)(41) == 42
    names = [path.name for path in kept.rglob("*.nbi")]
    assert len(names) == 2
    assert {digest for digest in ("aaaaaaaa", "bbbbbbbb") if any(digest in name for name in names)} == {
        "aaaaaaaa",
        "bbbbbbbb",
    }


def test_the_digest_covers_every_source_that_kernels_are_generated_from(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_module, "__file__", str(tmp_path / "compiled.py"))
    (tmp_path / "quantization").mkdir()
    digests = set()
    for changed in (None, *CALLED_SOURCES):
        for name in CALLED_SOURCES:
            (tmp_path / name).write_text("changed" if name == changed else "as it was")
        source_digest.cache_clear()
        digests.add(source_digest())
    source_digest.cache_clear()
    assert len(digests) == len(CALLED_SOURCES) + 1


def test_where_nothing_can_be_kept_kernels_run_and_the_log_says_so(monkeypatch, caplog):
    def refuse(self):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", refuse)
    monkeypatch.setattr(one_more, "__qualname__", "one_more")
    with caplog.at_level(logging.WARNING, logger="hybrid_kernels"):
        assert compiled()(one_more)(41) == 42
    assert "compiled anew in each process" in caplog.text
