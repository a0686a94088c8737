"""Profiles of several texts as one: counts add up, and the sample is one of all the texts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hybrid_runtime.errors import BudgetError, CheckpointError, UsageError
from hybrid_runtime.profiling.merging import merge_profiles
from hybrid_runtime.profiling.profile import LAYER_FIELDS, merged
from hybrid_runtime.profiling.profile_file import read_header, read_profile, read_samples
from hybrid_runtime.profiling.samples import SampleShape, token_priorities
from hybrid_runtime.profiling.windows import token_windows
from hybrid_runtime.store.beside import store_digest

from .conftest import SAMPLE_BYTES, WINDOW, Heard, text_of

LARGE = 1 << 22  # holds every token


@pytest.fixture(scope="module")
def parts(small):
    """Two profiles of one model whose samples left tokens out."""
    return [small.profile(name, text_of(seed, count)) for name, seed, count in (("a", 1, 60), ("b", 2, 20))]


def priorities_of(small, name):
    """Of every token that was counted of that text."""
    windows = token_windows([small.folder / f"{name}.txt"], small.tokenizer, WINDOW)
    counted = [token_priorities(tokens, idx) for idx, tokens in enumerate(windows) if idx % 16 != 15]
    return np.concatenate(counted)


def test_counts_of_a_merged_profile_are_the_sums(small, parts, tmp_path):
    first, second = (read_profile(each, small.config) for each in parts)
    total = merge_profiles(small.store, parts, tmp_path / "merged", SAMPLE_BYTES)
    assert total.num_tokens == first.num_tokens + second.num_tokens
    assert total.texts == first.texts + second.texts
    assert torch.equal(total.held_out, torch.cat([first.held_out, second.held_out]))
    for idx, layer in enumerate(total.layers):
        for name in LAYER_FIELDS:
            assert torch.equal(
                getattr(layer, name), getattr(first.layers[idx], name) + getattr(second.layers[idx], name)
            )
    assert (tmp_path / "merged" / "profile.json").is_file()


def test_merged_sample_is_the_tokens_of_smallest_priority_of_both_texts(small, parts, tmp_path):
    """Up to the least bound of a sample: beyond that nobody knows what a text had."""
    merge_profiles(small.store, parts, tmp_path / "merged", SAMPLE_BYTES)
    samples = read_samples(tmp_path / "merged", small.config, 0)
    union = np.sort(np.concatenate([priorities_of(small, name) for name in ("a", "b")]))
    count = len(samples.priorities)
    assert count > 5
    assert np.array_equal(samples.priorities.numpy(), union[:count])
    kept = [read_samples(each, small.config, 0).priorities for each in parts]
    bound = min(int(each[-1]) for each in kept)
    assert count == min(SampleShape.of(small.config).rows_in(SAMPLE_BYTES), int((union <= bound).sum()))


def test_rows_of_a_merged_sample_are_those_of_its_parts(small, parts, tmp_path):
    merge_profiles(small.store, parts, tmp_path / "merged", SAMPLE_BYTES)
    for layer_idx in range(small.config.num_hidden_layers):
        rows = {}
        for each in parts:
            samples = read_samples(each, small.config, layer_idx)
            for priority, *row in zip(
                samples.priorities.tolist(), samples.inputs, samples.experts, samples.active, strict=True
            ):
                rows[priority] = row
        samples = read_samples(tmp_path / "merged", small.config, layer_idx)
        for priority, *row in zip(
            samples.priorities.tolist(), samples.inputs, samples.experts, samples.active, strict=True
        ):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(row, rows[priority], strict=True))


def test_samples_that_left_nothing_out_merge_whole(small, tmp_path):
    sources = [small.profile(f"whole-{seed}", text_of(seed, 8), sample_bytes=LARGE) for seed in (5, 6)]
    total = merge_profiles(small.store, sources, tmp_path / "merged", LARGE)
    samples = read_samples(tmp_path / "merged", small.config, 0)
    assert len(samples.priorities) == total.num_tokens
    smaller = merge_profiles(small.store, sources, tmp_path / "smaller", SAMPLE_BYTES)
    few = read_samples(tmp_path / "smaller", small.config, 0)
    assert smaller.num_tokens == total.num_tokens
    assert torch.equal(few.priorities, samples.priorities[: len(few.priorities)])


def test_merge_of_merged_profiles_is_the_merge_of_all(small, parts, tmp_path):
    third = small.profile("c", text_of(3, 30))
    merge_profiles(small.store, parts, tmp_path / "ab", SAMPLE_BYTES)
    nested = merge_profiles(small.store, [tmp_path / "ab", third], tmp_path / "nested", SAMPLE_BYTES)
    flat = merge_profiles(small.store, [*parts, third], tmp_path / "flat", SAMPLE_BYTES)
    for ours, theirs in zip(nested.layers, flat.layers, strict=True):
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in LAYER_FIELDS)
    ours, theirs = (read_samples(tmp_path / name, small.config, 0).priorities for name in ("nested", "flat"))
    count = min(len(ours), len(theirs))
    assert torch.equal(ours[:count], theirs[:count])


def test_the_result_may_replace_one_of_the_parts(small, tmp_path):
    sources = [small.profile(f"part-{seed}", text_of(seed, 8)) for seed in (7, 8)]
    expected = merge_profiles(small.store, sources, tmp_path / "elsewhere", SAMPLE_BYTES)
    found = merge_profiles(small.store, sources, sources[0], SAMPLE_BYTES)
    assert found.texts == expected.texts
    assert len(list(sources[0].glob("data-*"))) == 1
    assert torch.equal(
        read_samples(sources[0], small.config, 1).active, read_samples(tmp_path / "elsewhere", small.config, 1).active
    )
    with pytest.raises(UsageError, match=r"part-8: is of a text that .*part-7 is of, which would count twice"):
        merge_profiles(small.store, sources, sources[0], SAMPLE_BYTES)


def test_a_part_without_a_sample_is_refused_by_name(small, parts, tmp_path):
    """Of its tokens nobody knows which to choose; the others' samples are not dropped in silence."""
    none = small.profile("none", text_of(9, 8), sample_bytes=0)
    with pytest.raises(UsageError, match=rf"--merge {none}: has no sample of its tokens, .*--samples 0 to add up"):
        merge_profiles(small.store, [parts[0], none], tmp_path / "merged", SAMPLE_BYTES)
    assert not (tmp_path / "merged").exists()
    total = merge_profiles(small.store, [parts[0], none], tmp_path / "merged", 0)
    assert len(total.texts) == 2
    other = small.profile("none-either", text_of(10, 8), sample_bytes=0)
    merge_profiles(small.store, [none, other], tmp_path / "both", SAMPLE_BYTES)
    assert read_header(tmp_path / "both").num_samples == 0


def test_a_merge_tells_its_layers_and_is_refused_without_room(small, parts, tmp_path, monkeypatch):
    heard, layers = Heard(), small.config.num_hidden_layers
    merge_profiles(small.store, parts, tmp_path / "merged", SAMPLE_BYTES, heard)
    assert heard.steps == [["merging 2 profiles", layers, "layers", layers]]
    assert not heard.running
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(BudgetError, match=r"full: the sample takes .*, the disk has 100 B free"):
        merge_profiles(small.store, parts, tmp_path / "full", SAMPLE_BYTES)
    assert not list((tmp_path / "full").glob("data-*"))


def test_what_cannot_be_added_up_is_refused(small, parts, tmp_path):
    first, second = (read_profile(each, small.config, store_digest(small.store)) for each in parts)
    with pytest.raises(UsageError, match=r"^b: is of a text that a is of, which would count twice; leave one out"):
        merged({"a": first, "b": replace(second, texts=first.texts)})
    with pytest.raises(UsageError, match=r"^b: is of .* \(000000000000\), a of .*; merge profiles of the same store"):
        merged({"a": first, "b": replace(second, model_digest="0" * 64)})
    with pytest.raises(UsageError, match=r"^b: looks back on 7 tokens, a on 32; merge profiles of the same --window"):
        merged({"a": first, "b": replace(second, window=7)})
    with pytest.raises(UsageError, match="at least two folders, each once"):
        merge_profiles(small.store, [parts[0], parts[0].parent / "." / parts[0].name], tmp_path / "x", SAMPLE_BYTES)
    with pytest.raises(CheckpointError, match=r"nothing: has no profile\.json; run hybrid-profile again"):
        merge_profiles(small.store, [parts[0], tmp_path / "nothing"], tmp_path / "x", SAMPLE_BYTES)
    assert not (tmp_path / "x").exists()
