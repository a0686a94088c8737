"""Rows of the table against counts made by hand from what the decoder shows."""

from dataclasses import replace

import pytest
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.engine import TrainedPredictors
from hybrid_runtime.errors import UsageError
from hybrid_runtime.evaluation.held_out import window_losses
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.profiling.profile_file import read_samples
from hybrid_tools.predictor_training import comparison
from hybrid_tools.predictor_training.comparison import compare_kinds
from hybrid_tools.predictor_training.importing import import_powerinfer

from .test_importing import powerinfer


class Watching:
    """Keeps what every network was shown, and which of its neurons fired."""

    def __init__(self):
        self.passes = {}

    def see_routing(self, layer_idx, experts):
        pass

    def see_neurons(self, ffn, neurons, values):
        key = id(ffn)
        if key not in self.passes:
            self.passes[key] = ffn, torch.zeros(len(values), 48, dtype=torch.bool)
        self.passes[key][1][:, neurons] = values != 0


def shown(sequence, windows, reads):
    """(layer, float32 [T, H] where `reads` says, bool [T, I]) of every pass over the windows."""
    config = replace(sequence.decoder.config, predictor_input=reads)
    decoder = Decoder(config, sequence.decoder.weights, sequence.decoder.predictor_mode, sequence.decoder.team)
    watching = Watching()
    for window in windows.long():
        sequence.cache.truncate(0)
        decoder.forward(window, sequence.cache, observer=watching)
    return [(ffn.layer_idx, ffn.predictor_input, active) for ffn, active in watching.passes.values()]


def compare(dense, kinds, trained=None, recall=0.9, **changes):
    sequence = dense.opened.load_sequence()
    rows, said = [], []
    profile = replace(dense.profile, **changes)
    found = compare_kinds(sequence, profile, dense.profile_folder, trained, recall, rows.append, kinds, said.append)
    assert found == rows
    return sequence, {row.kind: row for row in rows}, said


def test_imported_predictors_are_judged_where_they_read(dense, tmp_path):
    """The model's sample is of the stream behind the norm, PowerInfer's predictors read it before."""
    assert dense.config.predictor_input is None
    source = powerinfer(tmp_path / "source")
    header = import_powerinfer(dense.opened.store, source, tmp_path / "predictors", RowFormat("f32"))
    sequence, rows, _ = compare(dense, ["mlp"], TrainedPredictors(tmp_path / "predictors", header))
    found = fired = named = 0
    for layer_idx, inputs, active in shown(sequence, dense.profile.held_out, "pre_norm"):
        state = torch.load(source / f"model_{layer_idx}.pt", weights_only=True)
        fc1, fc2 = (state[f"{name}.weight"].bfloat16().float() for name in ("fc1", "fc2"))
        names = torch.relu(inputs @ fc1.T) @ fc2.T > 0
        found, fired, named = found + (names & active).sum(), fired + active.sum(), named + names.sum()
    assert rows["mlp"].recall == pytest.approx(float(found / fired), abs=1e-3)
    assert rows["mlp"].precision == pytest.approx(float(found / named), abs=1e-3)
    assert rows["mlp"].num_bytes == header.num_bytes


def test_the_exact_gate_names_what_its_rows_let_through(dense):
    sequence, rows, said = compare(dense, ["oracle", "exact-gate"])
    fired = named = 0
    for layer_idx, inputs, active in shown(sequence, dense.profile.held_out, "post_norm"):
        (ffn,) = sequence.decoder.weights.layers[layer_idx].experts
        gates = inputs @ ffn.bundles.gate_proj.rows[:, : 4 * 32].contiguous().view(torch.float32).T
        fired, named = fired + active.sum(), named + (gates > 0).sum()
    assert rows["exact-gate"].recall == rows["oracle"].recall == rows["oracle"].precision == 1
    assert rows["exact-gate"].named_for_one == pytest.approx(float(named / fired), abs=2e-3)
    exact = window_losses(sequence, dense.profile.held_out)
    assert rows["oracle"].perplexity == pytest.approx(exact.perplexity, rel=1e-4)
    assert rows["oracle"].loss == pytest.approx(0, abs=1e-4)
    alone = f"the model alone, on {dense.profile.held_out.numel()} held-out tokens ..."
    assert said == [alone, "exact-gate ...", "oracle ..."]


def test_a_sketch_learns_from_more_tokens_than_its_threshold_is_set_on(dense, monkeypatch):
    seen, found = [], comparison.svd_sketch

    def watched(bundles, inputs, rank, row_format):
        seen.append(inputs)
        return found(bundles, inputs, rank, row_format)

    monkeypatch.setattr(comparison, "svd_sketch", watched)
    monkeypatch.setattr(comparison, "MOST_VALUES", 48 * 20)  # twenty tokens
    compare(dense, ["svd"])
    for layer_idx, inputs in enumerate(seen):
        assert torch.equal(inputs, read_samples(dense.profile_folder, dense.config, layer_idx).inputs.float())
    assert len(seen) == dense.config.num_hidden_layers


def test_sketches_name_more_for_more_recall(dense):
    low, high = (compare(dense, ["sign", "svd"], recall=recall)[1] for recall in (0.8, 0.95))
    for kind in ("sign", "svd"):
        assert low[kind].recall < high[kind].recall
        assert low[kind].named_for_one < high[kind].named_for_one
        assert high[kind].recall > 0.9  # on text that the thresholds were not set on


def test_what_cannot_be_compared_is_refused(dense):
    with pytest.raises(UsageError, match="--kind mlp: this model has sign, svd, exact-gate, oracle, random"):
        compare(dense, ["random", "mlp"])
    with pytest.raises(UsageError, match=r"profile: has no held-out text or no sample; profile more text"):
        compare(dense, ["random"], held_out=dense.profile.held_out[:0])
