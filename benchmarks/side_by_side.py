"""The programs that cpu_vs_llamacpp.py runs, one process a run, and what each run gives as a sample.

llama.cpp reads its weights into anonymous memory and repacks them, which is its fastest way on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Sample = dict[str, float]
STORIES_TOKENS = 256
PREFILL_TOKENS = 512
CORPUS_CHARS, SEPARATOR = 12_000, "<|endoftext|>\n"  # as tests/real/test_stories260k.py cuts it


@dataclass(frozen=True, slots=True)
class Files:
    """What the runs need. None where no chosen row needs it."""

    llama_cpp: Path
    dense: Path | None
    sparse: Path | None
    gguf: Path | None
    stories: Path | None
    text: Path | None


@dataclass(frozen=True, slots=True)
class Programs:
    """Command lines, and samples from what they print."""

    files: Files
    num_threads: int
    num_tokens: int

    def measurements(self) -> dict[str, Callable[[], Sample]]:
        """By name, in the order in which a round runs them."""
        dense, sparse, gguf, stories = (str(path) for path in self._models())
        prompt = ("-p", str(PREFILL_TOKENS), "-n", "0")
        decode = ("-p", "0", "-n", str(self.num_tokens))
        story = ("-p", "0", "-n", str(STORIES_TOKENS))
        return {
            "llama.cpp dense decode": lambda: self.llama_bench(gguf, *decode),
            "dense decode": lambda: self.hybrid_bench(dense, *decode),
            "sparse decode": lambda: self.hybrid_bench(sparse, *decode),
            "llama.cpp dense prefill": lambda: self.llama_bench(gguf, *prompt),
            "dense prefill": lambda: self.hybrid_bench(dense, *prompt),
            "llama.cpp contended decode": lambda: beside_a_busy_process(lambda: self.llama_bench(gguf, *decode)),
            "dense contended decode": lambda: beside_a_busy_process(lambda: self.hybrid_bench(dense, *decode)),
            "sparse contended decode": lambda: beside_a_busy_process(lambda: self.hybrid_bench(sparse, *decode)),
            "llama.cpp stories decode": lambda: self.llama_bench(stories, *story),
            "stories decode": lambda: self.hybrid_bench(stories, *story, "--quant", "q4"),
            "llama.cpp perplexity": self.llama_perplexity,
            "perplexity": self.hybrid_perplexity,
            "warm start": self.warm_start,
            "first start": self.first_start,
        }

    def llama_bench(self, model: str, *arguments: str) -> Sample:
        """One repetition after llama-bench's own warm-up."""
        command = [self._llama("llama-bench"), "-m", model, "-t", str(self.num_threads), "-r", "1", "-o", "json"]
        (row,) = json.loads(_output([*command, "-lm", "none", "--repack", "1", *arguments]))
        return {"tokens_s": row["avg_ts"]}

    def hybrid_bench(self, model: str, *arguments: str) -> Sample:
        """One repetition after a warm-up; with what bounds it."""
        command = [sys.executable, "-m", "hybrid_tools.bench", "-m", model, "-t", str(self.num_threads)]
        (row,) = json.loads(_output([*command, "-r", "1", "-o", "json", *arguments]))
        names = ("overhead", "active_fraction", "bandwidth_gbs", "achieved_gbs", "load_s", "peak_rss_bytes")
        sample = {"tokens_s": row["avg_ts"]} | {name: row[name] for name in names if row[name] is not None}
        if "achieved_gbs" in sample:
            sample["of_bandwidth"] = sample["achieved_gbs"] / sample["bandwidth_gbs"]
        return sample

    def llama_perplexity(self) -> Sample:
        """Of the Q4_0 file."""
        assert self.files.stories is not None
        with self._story_text() as text:
            command = [self._llama("llama-perplexity"), "-m", str(self.files.stories), "-f", text, "-c", "512"]
            printed = _output([*command, "-t", str(self.num_threads)], with_errors=True)
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", printed)
        assert found is not None, printed
        return {"perplexity": float(found[1])}

    def hybrid_perplexity(self) -> Sample:
        """Of q4 made from the float32 file beside the Q4_0 file: each quantises for itself."""
        assert self.files.stories is not None
        model = self.files.stories.with_name(self.files.stories.name.replace("Q4_0", "f32"))
        with self._story_text() as text:
            command = [sys.executable, "-m", "hybrid_tools.evaluate", "perplexity", "--model", str(model)]
            printed = _output([*command, "--quant", "q4", "--text", text, "--ctx", "512", "--json"])
        return {"perplexity": json.loads(printed)["perplexity"]}

    def warm_start(self) -> Sample:
        """Seconds from the shell to one token, the model converted and the kernels compiled."""
        self._first_token(dict(os.environ))
        return self._first_token(dict(os.environ))

    def first_start(self) -> Sample:
        """The same on a machine that has never seen us: no converted model, no compiled kernel."""
        with tempfile.TemporaryDirectory() as cache:
            names = ("XDG_CACHE_HOME", "HYBRID_CACHE_DIR", "NUMBA_CACHE_DIR")
            return self._first_token(os.environ | dict.fromkeys(names, cache))

    def _first_token(self, environment: dict[str, str]) -> Sample:
        command = [
            sys.executable,
            "-m",
            "hybrid_runtime.cli.run",
            "--model",
            str(self.files.stories),
            "--prompt",
            "Once",
        ]
        command += ["--max-tokens", "1", "--threads", str(self.num_threads)]
        started_s = time.perf_counter()
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
        ):
            assert process.stdout is not None
            first = process.stdout.read(1)  # the prompt is not printed: this is the token
            seconds = time.perf_counter() - started_s
            process.stdout.read()
            if process.wait() or not first.strip():
                errors.seek(0)
                sys.exit(f"{' '.join(command)} printed no token:\n{errors.read().decode(errors='replace')[-2000:]}")
        return {"seconds": seconds}

    def _models(self) -> tuple[Path | None, ...]:
        return self.files.dense, self.files.sparse, self.files.gguf, self.files.stories

    def _llama(self, name: str) -> str:
        return str(self.files.llama_cpp / "bin" / name)

    @contextlib.contextmanager
    def _story_text(self) -> Iterator[str]:
        assert self.files.text is not None
        text = self.files.text.read_text(encoding="utf-8").replace(SEPARATOR, "")[:CORPUS_CHARS]
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            yield file.name


def beside_a_busy_process(measure: Callable[[], Sample]) -> Sample:
    """Measure while one other process keeps a core busy."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return measure()
    finally:
        busy.kill()
        busy.wait()


def llama_version(files: Files) -> str:
    """What the build says of itself."""
    return " ".join(_output([str(files.llama_cpp / "bin" / "llama-bench"), "--version"], with_errors=True).split())


def _output(command: list[str], *, environment: dict[str, str] | None = None, with_errors: bool = False) -> str:
    """Standard output; on failure, end with what the program said."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\nended with {result.returncode}: {result.stderr.strip()[-2000:]}")
    return result.stdout + (result.stderr if with_errors else "")
