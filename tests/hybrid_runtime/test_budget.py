"""--ram is a promise about the whole process: refused beforehand, or kept; and the plan is no gross overestimate."""

import json
import os
import re
import subprocess
import sys

import pytest

from hybrid_runtime.budget import MemoryNeeds, MemoryPlan, plan_memory, require_memory, workspace_bytes
from hybrid_runtime.errors import BudgetError
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.registry import parse_config
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.stores import ModelRequest, convert_model

from .small_models import LLAMA, write_model

MIB = 1 << 20
CONFIG = parse_config(RawConfig(LLAMA, "config.json"))
# 275 MB as float32, most of them in the embedding and the head, so that its tokens cost little time
LARGE = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 60_000,
    "max_position_embeddings": 4096,
}
# One process: refused with the amount that would do, then run with exactly that amount.
PROGRAM = """
import contextlib, io, re, sys
refusal = io.StringIO()
{load}
with contextlib.redirect_stderr(refusal):
    assert main([*sys.argv[1:], "--ram", "1M"]) == 2
enough = re.search(r"give at least --ram ([0-9]+M)", refusal.getvalue())[1]
print(enough, flush=True)
code = main([*sys.argv[1:], "--ram", enough])
from hybrid_runtime.machine import peak_rss_bytes
print(peak_rss_bytes())
sys.exit(code)
"""
RUN = PROGRAM.format(load="from hybrid_runtime.cli.run import main")
EVALUATE = PROGRAM.format(load="from hybrid_tools.evaluate import main")


def plan_of(**changes):
    needs = {"weights_bytes": 100 * MIB, "num_positions": 512, "kv_dtype": "f32"} | changes
    return plan_memory(CONFIG, MemoryNeeds(**needs), 200 * MIB)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("large") / "model", LARGE)
    assert 250e6 < (folder / "model.safetensors").stat().st_size < 300e6
    return folder


def measure(program, folder, cache, *arguments):
    """(promised, planned, measured) bytes of a run in a process of its own."""
    command = [sys.executable, "-c", program, "--model", str(folder), "--cache-dir", str(cache), "--threads", "1"]
    result = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    promised, *output, measured = result.stdout.splitlines()
    assert json.loads(output[0])
    planned = re.search(r"planned ([\d.]+) (MiB|GiB)", result.stderr)
    planned_bytes = float(planned[1]) * (MIB if planned[2] == "MiB" else 1 << 30) if planned else None
    return int(promised.removesuffix("M")) * MIB, planned_bytes, int(measured)


@pytest.mark.parametrize(
    ("quant", "converts", "num_positions", "prompt_tokens", "kv_cache"),
    [
        ("f32", True, 512, 3, "f32"),
        ("f32", False, 4096, 2500, "f32"),
        ("q8", True, 4096, 2000, "f16"),
        ("q4", False, 1024, 900, "f16"),
    ],
    ids=["f32-converted-first", "f32-long-prompt", "q8-converted-first-long-prompt", "q4"],
)
def test_promise_is_kept_and_not_grossly_overestimated(
    large, tmp_path, quant, converts, num_positions, prompt_tokens, kv_cache
):
    model, flags = large, ["--quant", quant]
    if not converts:
        model = convert_model(ModelRequest(str(large), quant), tmp_path / "store", tmp_path, NoProgress()).folder
    flags += ["--ctx", str(num_positions), "--kv-cache", kv_cache, "--max-tokens", "3", "--json"]
    flags += ["--prompt", "x" * (prompt_tokens - 1)]
    promised, planned, measured = measure(RUN, model, tmp_path / "cache", *flags)
    print(f"{quant} ctx {num_positions}: promised {promised >> 20}, measured {measured >> 20} MiB")
    assert measured <= 1.05 * promised
    assert planned <= 1.5 * measured + 100 * MIB
    assert abs(planned - promised) <= 10 * MIB  # what the summary calls planned is what was promised, less the slack


EXPECT = """
import sys, torch
from hybrid_runtime.engine import open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import peak_rss_bytes
from hybrid_runtime.stores import ModelRequest
options = LoadOptions(num_positions=256, threads=1, kv_dtype="f16")
opened = open_model(ModelRequest(sys.argv[1]), options, needs_tokenizer=False)
sequence = opened.load_sequence()
sequence.decoder.forward(torch.arange(100), sequence.cache)
for token in range(10):
    sequence.decoder.forward(torch.tensor([token]), sequence.cache)
print(opened.memory_plan.expected, peak_rss_bytes())
"""


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_what_is_expected_is_what_a_run_takes(large, tmp_path, quant):
    store = convert_model(ModelRequest(str(large), quant), tmp_path / "store", tmp_path, NoProgress())
    for _ in range(2):  # the first run may have to compile kernels
        command = [sys.executable, "-c", EXPECT, str(store.folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, env=environment
        ).stdout
    expected, measured = map(int, output.split())
    assert measured * 0.95 <= expected <= measured * 1.05


def test_promise_holds_for_scoring_every_token(large, tmp_path):
    text = tmp_path / "text"
    text.write_text("x" * 1100)
    flags = ["perplexity", "--text", str(text), "--ctx", "512", "--json"]
    command = EVALUATE.replace("sys.argv[1:]", "['perplexity', *sys.argv[1:]]")
    promised, _, measured = measure(command, large, tmp_path / "cache", *flags[1:])
    print(f"perplexity: promised {promised >> 20}, measured {measured >> 20} MiB")
    assert measured <= 1.05 * promised
    assert promised <= 1.5 * measured + 100 * MIB


def test_refusal_tells_the_parts_and_the_flag_that_would_do():
    plan = plan_of()
    with pytest.raises(BudgetError) as refusal:
        require_memory(plan, 300 * MIB, 1 << 40)
    for words in ("--ram 300.00 MiB", "200.00 MiB program", "100.00 MiB weights", "KV cache", "workspace", "--ctx"):
        assert words in str(refusal.value)
    enough = int(re.search(r"--ram (\d+)M", str(refusal.value))[1]) * MIB
    require_memory(plan, enough, 1 << 40)
    with pytest.raises(BudgetError):
        require_memory(plan, enough - 9 * MIB, 1 << 40)


def test_what_the_machine_has_not_is_refused_without_a_flag():
    plan = plan_of()
    require_memory(plan, None, plan.total - plan.program)
    with pytest.raises(BudgetError, match=r"the machine has .* free; close other programs"):
        require_memory(plan, None, plan.total - plan.program - 1)


def test_context_costs_what_its_keys_and_values_take():
    per_token = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    assert plan_of(num_positions=1000).kv_cache == 1000 * per_token
    assert plan_of(num_positions=1000, kv_dtype="f16").kv_cache == 500 * per_token


def test_scores_take_a_batch_of_logits():
    assert workspace_bytes(CONFIG, 512, scores=True) - workspace_bytes(CONFIG, 512) > 2 * 256 * CONFIG.vocab_size * 4


def test_conversion_counts_where_it_takes_more_than_the_run():
    small, large = plan_of(largest_converted_bytes=MIB), plan_of(largest_converted_bytes=1024 * MIB)
    assert plan_of().total < small.total < large.total
    assert large.total > 200 * MIB + 2 * 1024 * MIB
    assert "while converting" in large.describe()
    assert "while converting" not in plan_of().describe()


def test_total_is_never_below_its_parts():
    plan = MemoryPlan(program=1, weights=2, kv_cache=3, workspace=4, compiler=5, conversion=0)
    assert plan.total >= 15
