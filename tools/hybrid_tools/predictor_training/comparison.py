"""Predictors of every kind on the same held-out text, with the same recall to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from hybrid_kernels.packed_matrix import Bundles
from hybrid_predictors.normed import NormedPredictor
from hybrid_predictors.predictor import Predictor
from hybrid_predictors.sketch import MOST_INPUTS, exact_gate, sign_sketch, svd_sketch
from hybrid_predictors.study import OraclePredictor, RandomPredictor
from hybrid_predictors.thresholds import Quality, curve, spend
from hybrid_runtime.config import StreamPoint
from hybrid_runtime.engine import TrainedPredictors
from hybrid_runtime.errors import UsageError
from hybrid_runtime.evaluation.held_out import Losses, judged, window_losses
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.norms import apply_norm
from hybrid_runtime.model.trained_predictors import load_predictors, with_predictors
from hybrid_runtime.profiling.profile import Profile
from hybrid_runtime.profiling.profile_file import LayerSamples, read_header, read_samples
from hybrid_tools.predictor_training.memory import SKETCH_ROWS, svd_ranks

MOST_VALUES = 1 << 24  # neurons times tokens of a layer that thresholds are set on, 64 MiB of logits
RANDOM_NAMES = 1.6  # neurons for one that fires

Layers = list[list[Predictor]]
OnKind = Callable[["KindResult"], None]


@dataclass(frozen=True, slots=True)
class KindResult:
    """One row of the table. num_bytes: of weights that a token's predictions can read, over all experts; share: over
    the neurons' bytes; loss: relative increase of the perplexity, with its standard error.
    """

    kind: str
    num_bytes: int
    share: float
    recall: float
    precision: float
    named_for_one: float
    perplexity: float
    loss: float
    loss_error: float

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def compare_kinds(
    sequence: TokenSequence,
    profile: Profile,
    profile_folder: Path,
    trained: TrainedPredictors | None,
    recall: float,
    on_kind: OnKind,
    wanted: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[KindResult]:
    """sequence: the model in its exact mode. The kinds that need a gate to decide are left out where it does not.

    wanted: only these kinds; none: all. say: is told what comes next.

    Raises UsageError for a profile without held-out text or without a sample.
    """
    if len(profile.held_out) == 0 or read_header(profile_folder).num_samples == 0:
        raise UsageError(f"{profile_folder}: has no held-out text or no sample; profile more text, with --samples")
    config = sequence.decoder.config
    kinds: dict[str, Callable[[], Layers]] = {}
    if trained is not None:
        kinds["mlp"] = lambda: [list(of_layer) for of_layer in load_predictors(trained.folder, trained.header, config)]
    study = _Study(sequence, profile_folder, recall, trained)
    if config.predictor_input != "layer_input":  # from there nobody gets to what neurons read without attention
        kinds |= {"sign": study.sign, "svd": study.svd}
        kinds |= {"exact-gate": study.exact_gate} if config.activation.is_sparse else {}
        kinds["oracle"] = study.oracle
    kinds["random"] = lambda: study.random(profile)
    if missing := [kind for kind in wanted if kind not in kinds]:
        raise UsageError(f"--kind {missing[0]}: this model has {', '.join(kinds)}")
    say(f"the model alone, on {profile.held_out.numel()} held-out tokens ...")
    exact = window_losses(sequence, profile.held_out)
    results = []
    for kind, make in kinds.items():
        if wanted and kind not in wanted:
            continue
        say(f"{kind} ...")
        reads = trained.header.input if kind == "mlp" and trained is not None else config.predictor_input or "post_norm"
        results.append(_result(kind, sequence, profile, make(), reads, exact))
        on_kind(results[-1])
    return results


class _Study:
    """Makes each kind's predictors for all layers, with thresholds that reach the recall."""

    def __init__(
        self, sequence: TokenSequence, profile_folder: Path, recall: float, trained: TrainedPredictors | None
    ) -> None:
        self._decoder = sequence.decoder
        self._config = sequence.decoder.config
        self._folder = profile_folder
        self._recall = recall
        self._ranks = svd_ranks(self._config, None if trained is None else trained.header)

    def sign(self) -> Layers:
        """The gate at 4 bits."""
        return self._tuned(lambda _, bundles, __: sign_sketch(bundles, SKETCH_ROWS))

    def svd(self) -> Layers:
        """The gate at the trained ones' ranks."""
        return self._tuned(
            lambda layer_idx, bundles, inputs: svd_sketch(bundles, inputs(), self._ranks[layer_idx], SKETCH_ROWS)
        )

    def exact_gate(self) -> Layers:
        """The gate, with the threshold of the activation."""
        return self._behind_norms(self._each(lambda bundles: exact_gate(bundles, self._config.activation.threshold)))

    def oracle(self) -> Layers:
        """Everything that fires and nothing else."""
        return self._behind_norms(self._each(lambda bundles: OraclePredictor(bundles, self._config.activation)))

    def random(self, profile: Profile) -> Layers:
        """As many neurons as good predictors name, drawn blindly."""
        neurons = self._config.intermediate_size
        return [
            [
                RandomPredictor(neurons, seed, 1 - RANDOM_NAMES * (1 - profile.zero_share(layer_idx)))
                for seed in range(len(layer.experts))
            ]
            for layer_idx, layer in enumerate(self._decoder.weights.layers)
        ]

    def _each(self, make: Callable[[Bundles], Predictor]) -> Layers:
        return [[make(ffn.plain_bundles) for ffn in layer.experts] for layer in self._decoder.weights.layers]

    def _norm(self, layer_idx: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """From what predictors read to what neurons read; None where that is the same."""
        if self._config.predictor_input != "pre_norm":
            return None
        return partial(apply_norm, self._config, self._decoder.weights.layers[layer_idx].post_attention_layernorm)

    def _behind_norms(self, layers: Layers) -> Layers:
        normed: Layers = []
        for layer_idx, predictors in enumerate(layers):
            norm = self._norm(layer_idx)
            normed.append(predictors if norm is None else [NormedPredictor(each, norm) for each in predictors])
        return normed

    def _tuned(self, make: Callable[[int, Bundles, Callable[[], torch.Tensor]], Predictor]) -> Layers:
        """make: from the layer, a network, and what gives a sample of what it reads."""
        curves, layers = [], []
        for layer_idx, layer in enumerate(self._decoder.weights.layers):
            samples = read_samples(self._folder, self._config, layer_idx)
            norm = self._norm(layer_idx)
            made, logits, fired = [], [], []
            most = max(1, MOST_VALUES // (len(layer.experts) * self._config.intermediate_size))
            for expert_idx, ffn in enumerate(layer.experts):
                inputs, active = samples.of_expert(expert_idx, self._config.intermediate_size, most)
                inputs = inputs if norm is None else norm(inputs)
                predictor = make(layer_idx, ffn.plain_bundles, partial(_inputs_of, samples, expert_idx, norm))
                made.append(predictor)
                logits.append(predictor.logits(inputs, self._decoder.team))
                fired.append(active)
            layers.append(made)
            curves.append(curve(logits, fired))
        chosen = spend(curves, self._recall)
        thresholds = [float(each.thresholds[idx]) for each, idx in zip(curves, chosen, strict=True)]
        return self._behind_norms([
            [replace(predictor, threshold=threshold) for predictor in made]  # type: ignore[type-var]  # dataclasses all
            for made, threshold in zip(layers, thresholds, strict=True)
        ])  # fmt: skip


def _result(
    kind: str,
    sequence: TokenSequence,
    profile: Profile,
    predictors: Sequence[Sequence[Predictor]],
    reads: StreamPoint,
    exact: Losses,
) -> KindResult:
    """reads: where these predictors read the stream, which need not be where the model's own do."""
    decoder = sequence.decoder
    config = replace(decoder.config, predictor_input=reads)
    shown = Decoder(config, decoder.weights, decoder.predictor_mode, decoder.team)
    qualities, _ = judged(TokenSequence(shown, sequence.cache), profile.held_out, predictors, exact)
    total: Quality = qualities[0]
    for quality in qualities[1:]:
        total = total + quality
    weights = with_predictors(decoder.weights, predictors)
    with_them = Decoder(config, weights, "trained", decoder.team)
    losses = window_losses(TokenSequence(with_them, sequence.cache), profile.held_out)
    num_bytes = sum(map(_layer_bytes, predictors))
    neurons = sum(ffn.plain_bundles.data.numel() for layer in decoder.weights.layers for ffn in layer.experts)
    loss, error = losses.increase_over(exact)
    return KindResult(
        kind,
        num_bytes,
        num_bytes / neurons,
        total.recall,
        total.precision,
        total.density_ratio,
        losses.perplexity,
        loss,
        error,
    )


def _inputs_of(
    samples: LayerSamples, expert_idx: int, norm: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """float32 [n, H], of more tokens than thresholds are set on, as nobody asks what fired."""
    inputs = samples.inputs[(samples.experts == expert_idx).any(1)][:MOST_INPUTS].float()
    return inputs if norm is None else norm(inputs)


def _layer_bytes(predictors: Sequence[Predictor]) -> int:
    """Of one layer's predictors, an fc1 that they share counted once."""
    shared = [getattr(predictor, "fc1", None) for predictor in predictors]
    total = sum(predictor.num_bytes for predictor in predictors)
    if len(shared) > 1 and shared[0] is not None and all(each is shared[0] for each in shared):
        total -= (len(shared) - 1) * shared[0].num_bytes
    return total
