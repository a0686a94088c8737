"""hybrid-bench over a store without a tokenizer: the formats, the numbers in them, and what is refused in one line."""

import csv
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from hybrid_runtime.engine import OpenModel
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_tools import bench

from ..hybrid_runtime.store.small_store import write_store  # noqa: TID252  # absolute names are the runtime's

ROW_BYTES = 64  # of 36 columns in q4 groups of 32
LAYERS, NEURONS = 2, 51


@dataclass
class Counters:
    kernel_s: float = 0.0
    active_neurons: int = 0
    gate_rows: int = 0
    up_rows: int = 0
    down_rows: int = 0

    def reset(self):
        self.__init__()


class FakeDecoder:
    """Reads every gate, and for ten neurons a layer the rest."""

    def __init__(self, config):
        self.config = config
        self.counters = Counters()

    def forward(self, tokens, cache, *, prompt_end=0):
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size
        cache.length += len(tokens)
        self.counters.kernel_s += 1e-9
        self.counters.gate_rows += LAYERS * NEURONS * len(tokens)
        for name in ("active_neurons", "up_rows", "down_rows"):
            setattr(self.counters, name, getattr(self.counters, name) + LAYERS * 10 * len(tokens))
        return torch.zeros(1, self.config.vocab_size)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    write_store(tmp_path / "store")

    def load_sequence(opened):
        config = opened.store.manifest.config
        return SimpleNamespace(decoder=FakeDecoder(config), cache=KvCache(config, opened.num_positions, "f16"))

    monkeypatch.setattr(OpenModel, "load_sequence", load_sequence)
    monkeypatch.setattr(bench, "_bandwidth", lambda num_threads: 1e9 * num_threads)

    def run(*arguments, model=tmp_path / "store"):
        named = [] if model is None else ["-m", str(model)]
        code = bench.main([*named, "-t", "1", "--cache-dir", str(tmp_path / "cache"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def test_table_has_llama_benchs_columns_and_ours(run):
    code, out, err = run("-p", "8", "-n", "4", "-d", "0,6", "-r", "2")
    lines = out.splitlines()
    assert code == 0
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert header[7:] == ["GB/s", "of memory", "overhead", "active"]
    assert [line.split("|")[6].strip() for line in lines[2:6]] == ["pp8", "tg4", "pp8 @ d6", "tg4 @ d6"]
    assert lines[2].split("|")[8].strip() == ""  # bytes a token of a prompt mean nothing
    assert "±" in lines[3]
    assert "19.6 %" in lines[3]  # ten of 51 neurons
    assert any("peak memory" in line and "1.0 GB/s" in line and "predictor gate" in line for line in lines)
    assert sum(line.startswith("tg4") and "a token: embedding" in line for line in lines) == 2
    assert any("loaded in" in line for line in err)


def test_json_keeps_every_sample_and_the_bytes_by_part(run):
    code, out, _ = run("-p", "0", "-n", "4", "-r", "3", "-o", "json")
    (row,) = json.loads(out)
    assert code == 0
    assert len(row["samples_ns"]) == len(row["samples_ts"]) == 3
    assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 3)
    assert (row["n_prompt"], row["n_gen"], row["n_depth"], row["n_threads"], row["test"]) == (0, 4, 0, 1, "tg4")
    assert row["bytes_per_token"]["neurons"] == LAYERS * (NEURONS + 20) * ROW_BYTES
    assert row["bytes_per_token"]["kv_cache"] == 2.5 * LAYERS * 2 * 2 * 10 * 2
    assert row["achieved_gbs"] == pytest.approx(sum(row["bytes_per_token"].values()) * row["avg_ts"] / 1e9)
    assert row["active_fraction"] == pytest.approx(10 / NEURONS)
    assert row["bandwidth_gbs"] == 1.0
    assert 0 < row["overhead"] <= 1
    assert row["peak_rss_bytes"] > 1 << 20
    assert row["backends"]


def test_lines_and_csv_have_the_same_rows(run):
    flags = ("-p", "4", "-n", "2", "-pg", "4,2", "-r", "2")
    lines = [json.loads(line) for line in run(*flags, "-o", "jsonl")[1].splitlines()]
    rows = list(csv.DictReader(run(*flags, "-o", "csv")[1].splitlines()))
    assert [row["test"] for row in lines] == [row["test"] for row in rows] == ["pp4", "tg2", "pp4+tg2"]
    assert len(rows[0]["samples_ns"].split()) == 2
    assert rows[0]["bytes_neurons"] == ""
    assert float(rows[1]["bytes_neurons"]) == lines[1]["bytes_per_token"]["neurons"]


def test_models_and_lists_repeat(run, tmp_path):
    _, out, _ = run("-m", str(tmp_path / "store"), "-p", "0", "-n", "1,2", "-n", "3", "-r", "1", "-o", "jsonl")
    assert [json.loads(line)["test"] for line in out.splitlines()] == ["tg1", "tg2", "tg3"] * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-p", "x"), "--n-prompt x: expected token counts"),
        (("-n", "-1"), "expected token counts"),
        (("-d", "99999999"), "expected token counts up to"),
        (("-pg", "512"), "-pg 512: expected two counts"),
        (("-pg", "0,0"), "expected two counts"),
        (("-r", "0"), "-r"),
        (("-t", "0"), "-t"),
        (("-o", "sql"), "-o"),
        (("--load", "pagecache"), "--load"),
        (("--quant", "q8"), "--quant q8"),
        (("--predictor", "mask"), "carries no predictor"),
        (("--ram", "1M"), "--ram 1.00 MiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_one_line(run, arguments, named):
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert named in err[0]


def test_a_model_must_be_named(run):
    assert run(model=None)[0] == 2
