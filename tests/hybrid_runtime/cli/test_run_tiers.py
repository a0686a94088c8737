"""hybrid-run with budgets that a model's neurons do not fit: spread over tiers, told, kept; or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import filelock
import pytest

from hybrid_runtime.placement.plan import read_plan
from hybrid_runtime.sizes import parse_bytes
from hybrid_runtime.store.reader import open_store

MIB = 1 << 20
PROMPT = ("--prompt", "Once upon a time", "--max-tokens", "12", "--temperature", "0", "--seed", "1", "--ctx", "128")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """300 MB of neurons in q4, some of which fire, made in some seconds."""
    folder = tmp_path_factory.mktemp("synthetic") / "store"
    command = [sys.executable, "-m", "hybrid_tools.synth", "--like", "turbosparse-mistral", "--layers", "3"]
    subprocess.run([*command, "-o", str(folder)], check=True, capture_output=True)
    return open_store(folder)


def run(store, cache, *flags):
    command = [sys.executable, "-m", "hybrid_runtime.cli.run", "--model", str(store.folder), "--cache-dir", str(cache)]
    return subprocess.run(
        [*command, "--threads", "2", *PROMPT, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def size_in(pattern, text):
    found = re.search(pattern + r" ([\d.]+ \w+)", text)
    assert found, text
    return parse_bytes(found[1].replace(" ", ""))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def least(store, cache):
    """What a run needs with its neurons on disk, as a refusal says."""
    refused = run(store, cache, "--ram", "100M")
    assert refused.returncode == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.strip().splitlines()
    found = re.search(r"give at least --ram (\d+)M \((\d+)M with neurons on disk\)", line)
    assert int(found[2]) < int(found[1])
    return int(found[2]) * MIB


def test_ram_that_is_too_little_for_all_neurons_leaves_some_on_disk(store, cache, least):
    ram = least + 110 * MIB
    first = run(store, cache, "--ram", f"{ram >> 20}M", "-v")
    assert first.returncode == 0, first.stderr
    assert "nobody has profiled this model" in first.stderr
    assert size_in("neurons: .* in RAM,", first.stderr) > 20 * MIB
    assert "on disk; expected" in first.stderr
    assert re.search(r"\nneurons    .* in RAM, .* on disk; expected [\d.]+ tokens/s; placed by ", first.stderr)
    assert re.search(r"\ndisk       a cache of [\d.]+ MiB; reads are asynchronous", first.stderr)
    again = run(store, cache, "--ram", f"{ram >> 20}M")
    assert again.stdout == first.stdout, "and the plan is kept"
    assert "profil" not in again.stderr
    for each in (first, again):
        assert size_in("RAM  peak", each.stderr) <= 1.05 * ram
        assert re.search(r"tiers    a token: .* CPU .* wait .* disk \d+ asked, \d+% in the cache", each.stderr)


def test_json_tells_what_was_promised_and_used(store, cache, least):
    done = run(store, cache, "--ram", f"{(least >> 20) + 110}M", "--json")
    assert done.returncode == 0, done.stderr
    tiers = json.loads(done.stdout)["tiers"]
    assert 0 < tiers["ram_peak_bytes"] <= 1.05 * tiers["ram_promised_bytes"]
    assert tiers["vram_promised_bytes"] == tiers["vram_peak_bytes"] == tiers["hot_neurons"] == 0
    assert tiers["cold_neurons"] >= tiers["disk_asked"] >= tiers["disk_hits"] > 0
    assert tiers["disk_bytes"] > 0
    assert tiers["cpu_s"] > 0


def test_the_least_that_a_refusal_names_is_enough(store, cache, least):
    done = run(store, cache, "--ram", f"{least >> 20}M")
    assert done.returncode == 0, done.stderr
    assert size_in("RAM  peak", done.stderr) <= 1.05 * least


def test_a_simulated_gpu_takes_what_the_plan_gives_it(store, cache, least, tmp_path):
    trace = tmp_path / "trace.json"
    ram = least + 40 * MIB
    flags = ("--ram", f"{ram >> 20}M", "--vram", "900M", "--simulate-gpu", "--trace", str(trace))
    done = run(store, cache, *flags)
    assert done.returncode == 0, done.stderr
    assert size_in("RAM  peak", done.stderr) <= 1.05 * ram
    assert 0 < size_in("VRAM", done.stderr) <= 900 * MIB
    plans = [read_plan(path, store.manifest.config)[0] for path in store.folder.glob("plans/run-vram-900M-*")]
    assert [plan.vram_bytes for plan in plans] == [900 * MIB]
    assert abs(size_in("VRAM", done.stderr) - (plans[0].vram_used_bytes - 600 * MIB)) < 20 * MIB
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["cat"] for span in spans} == {f"token {idx}" for idx in range(1, 9)}
    hot = [span for span in spans if span["name"] == "hot neurons"]
    assert {span["tid"] for span in hot} == {lanes["GPU"]}
    assert all(span["dur"] >= 0 for span in spans)
    one = [span for span in spans if span["cat"] == "token 2"]
    assert [span["ts"] for span in one] == sorted(span["ts"] for span in one)
    assert spans[0]["ts"] == 0
    ends = {}
    for span in spans:
        number = span["args"]["token"]
        assert span["ts"] >= ends.get(number - 1, 0.0), "tokens do not overlap"
        ends[number] = span["ts"] + span["dur"]


def test_a_trace_goes_through_links_and_is_refused_early_without_a_folder(store, cache, least, tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    target.write_text("old")
    link.symlink_to(target)
    done = run(store, cache, "--ram", f"{(least >> 20) + 110}M", "--trace", str(link))
    assert done.returncode == 0, done.stderr
    assert link.is_symlink()
    assert json.loads(target.read_text())["traceEvents"]
    done = run(store, cache, "--ram", f"{(least >> 20) + 110}M", "--trace", str(tmp_path / "none" / "trace.json"))
    assert done.returncode == 2
    assert "--trace" in done.stderr
    assert "name a file in a folder that is there" in done.stderr


def test_a_profile_and_a_plan_that_cannot_be_had_now_keep_nobody_from_an_answer(store, cache, least, tmp_path):
    own = shutil.copytree(store.folder, tmp_path / "store", ignore=shutil.ignore_patterns("profile", "plans"))
    (own / "profile").mkdir()
    with filelock.FileLock(own / "profile" / ".lock"):
        done = run(open_store(own), cache, "--ram", f"{(least >> 20) + 110}M")
    assert done.returncode == 0, done.stderr
    assert "another run writes its profile here; wait for it; this time neurons are placed blindly" in done.stderr
    shutil.copytree(store.folder / "profile", own / "profile", dirs_exist_ok=True)
    (own / "plans").write_text("no folder")
    done = run(open_store(own), cache, "--ram", f"{(least >> 20) + 110}M")
    assert done.returncode == 0, done.stderr
    assert "this plan is not kept for the next run" in done.stderr


def test_a_gpu_without_memory_is_refused(store, cache):
    done = run(store, cache, "--simulate-gpu")
    assert done.returncode == 2
    assert "give --vram SIZE" in done.stderr
    done = run(store, cache, "--simulate-gpu", "--vram", "500M")
    assert done.returncode == 2
    assert "CUDA and buffers alone take 600.00 MiB" in done.stderr


def test_a_store_that_was_cut_off_is_refused_while_it_decodes(store, cache, least):
    """The disk's errors are told; nothing that was computed after one is shown."""
    path = store.data_folder / "layer-00001.bin"
    program = f"""
import os, sys, torch
from hybrid_runtime.engine import open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.errors import StoreError
from hybrid_runtime.stores import ModelRequest
from pathlib import Path
options = LoadOptions(ram_bytes={least + 20 * MIB}, num_positions=128, threads=2, cache_dir=Path({str(cache)!r}))
sequence = open_model(ModelRequest({str(store.folder)!r}), options).load_sequence()
for token in range(3):
    sequence.step(token)
os.truncate({str(path)!r}, 4096)
try:
    for token in range(20):
        sequence.step(token)
except StoreError as error:
    print(error)
"""
    whole = path.read_bytes()
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200)
    finally:
        path.write_bytes(whole)
    assert done.returncode == 0, done.stderr
    assert re.search(r"layer-00001\.bin: neurons could not be read: the file ends too early", done.stdout)
