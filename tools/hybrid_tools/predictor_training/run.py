"""Training a store's predictors: layer by layer from a profile's sample, wider until the model holds.

What is finished of a layer lies in work/ under its rank, so that a run that was killed goes on with the next one. The
thresholds are set for all layers together. After each round the model is tried on the profile's held-out text, which
nothing was trained on; if its quality does not hold yet, the layer that promises most for its bytes gets wider. The
last round's predictors take the place of those that were there before, at the very end.

A round with wider layers trains and packs those alone. What the neurons of the exact model do is computed in every one,
as thresholds move together and active sets are too large to keep; its losses are computed once.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import filelock
import torch

from hybrid_predictors.mlp import MlpPredictor
from hybrid_predictors.thresholds import Curve, Quality, curve, spend
from hybrid_predictors.training import LayerSample, TrainingOptions, train_layer
from hybrid_runtime.engine import OpenModel
from hybrid_runtime.errors import CheckpointError, UsageError
from hybrid_runtime.evaluation.held_out import Losses, judged, window_losses
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.trained_predictors import pack_layer, with_predictors
from hybrid_runtime.profiling.profile import Profile
from hybrid_runtime.profiling.profile_file import read_header as read_profile_header
from hybrid_runtime.profiling.profile_file import read_samples
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.predictor_files import (
    FORMAT_NAME,
    FORMAT_VERSION,
    PREDICTORS,
    LayerPredictors,
    PredictorHeader,
    has_predictors,
    layer_path,
    read_header,
    read_layer,
    write_header,
    write_layer,
)
from hybrid_tools.predictor_training.outcome import Outcome, PredictorRequest, outcome_of
from hybrid_tools.predictor_training.ranks import (
    ffn_bytes,
    grown_rank,
    initial_ranks,
    layer_bytes,
    least_bytes,
    widest_rank,
)

VALIDATION_SHARE = 0.1
MARGIN = 0.001  # thresholds are set for this much more recall than is asked: other text is a little harder
MARGIN_STEPS = 3  # that much more where that was not enough, before any layer gets wider
LEAST_RECALL = 0.9  # of every layer: a layer that is sacrificed for others may matter more than its neurons' number
LOCK = ".lock"
WORK = "work"
READY = "ready"  # in there: data that is being written, moved when it is whole
TIMED_TOKENS = 64

Say = Callable[[str], None]


def train_predictors(
    opened: OpenModel,
    profile: Profile,
    profile_folder: Path,
    folder: Path,
    request: PredictorRequest,
    say: Say,
) -> Outcome:
    """Train, try, widen, until the request holds or no step fits its bytes; the last outcome is left in folder.

    Raises UsageError for a profile without samples or held-out text, for a share that no predictors fit, while another
    run writes there, and, when all is done, where the folder has predictors that reach more of what is asked.
    """
    if len(profile.held_out) == 0:
        raise UsageError(
            f"{profile_folder}: keeps no text to test on, being imported or of too short a text; profile more text"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            run = _Run(opened, profile, profile_folder, folder, request, say)
            outcome = run.rounds()
            if not request.replaces:
                run.require_better(outcome)
            run.publish(outcome.header)
            return outcome
    except filelock.Timeout as error:
        raise UsageError(f"{folder}: another run trains predictors here; wait for it") from error


class _Run:
    """One run's settings and what it has loaded."""

    def __init__(
        self,
        opened: OpenModel,
        profile: Profile,
        profile_folder: Path,
        folder: Path,
        request: PredictorRequest,
        say: Say,
    ) -> None:
        self._store = opened.store
        self._config = opened.store.manifest.config
        self._sequence = opened.load_sequence()
        self._profile = profile
        self._profile_folder = profile_folder
        self._folder = folder
        self._request = request
        self._say = say
        self._digest = store_digest(opened.store)
        sample = read_profile_header(profile_folder)  # its data's name is that of the text, the windows and the sample
        trained_on = (self._digest, sample.data, sample.num_samples, profile.texts)
        settings = (request.row_format, request.num_epochs, request.has_relu, request.recall)
        self._key = hashlib.sha256(repr((trained_on, settings)).encode()).hexdigest()[:16]
        self._work = folder / WORK
        if request.restarts:
            shutil.rmtree(self._work, ignore_errors=True)
        self._curves: dict[tuple[int, int], Curve] = {}
        self._packed: dict[int, list[MlpPredictor]] = {}  # by layer, of its latest rank, without a threshold yet
        self._exact: Losses | None = None
        self._neuron_bytes = ffn_bytes(self._config, opened.store.manifest.quantization)

    def rounds(self) -> Outcome:
        """All rounds; the weights of the last one are left in work/."""
        config, request = self._config, self._request
        budget = request.most_share * self._neuron_bytes * config.num_hidden_layers
        least = least_bytes(config, request.row_format)
        if least > budget:
            share = math.ceil(1000 * least / (self._neuron_bytes * config.num_hidden_layers)) / 1000
            raise UsageError(
                f"--max-share {request.most_share:g}: the narrowest predictors take {share:.3f} of the neurons' bytes; "
                "give at least that, or narrower --rows"
            )
        widest = widest_rank(config, request.row_format, self._profile.layers, budget)
        ranks = initial_ranks(config, request.row_format, self._profile.layers, budget * request.first_share)
        while True:
            for layer_idx, rank in enumerate(ranks):
                self._train(layer_idx, rank)
            outcome = self._try_with_more_recall(ranks)
            excess = [quality.named - quality.fired for quality in outcome.by_layer]
            step = grown_rank(config, request.row_format, ranks, excess, budget, widest)
            if step is None or not outcome.misses(request):  # else it makes no difference what the model loses
                outcome = self._with_losses(outcome)
            misses = outcome.misses(request)
            self._say(f"ranks {' '.join(map(str, ranks))}: {'; '.join(misses) or 'everything wanted holds'}")
            if not misses or step is None:
                return replace(outcome, share_of_time=self._share_of_time(outcome.header))
            ranks[step[0]] = step[1]

    def require_better(self, outcome: Outcome) -> None:
        """Raise UsageError where the folder's predictors miss less of what is asked; what was trained stays in work/.

        Those that cannot be read, are another model's, or were never measured, are not better.
        """
        misses = outcome.misses(self._request)
        if not misses or not has_predictors(self._folder):
            return
        try:
            before = outcome_of(
                read_header(self._folder, self._config, self._digest),
                self._neuron_bytes * self._config.num_hidden_layers,
            )
        except CheckpointError:
            return
        if before is not None and len(before.misses(self._request)) < len(misses):
            raise UsageError(
                f"{self._folder}: keeps the predictors that were there, which reach more of what is asked; of these "
                f"{'; '.join(misses)}; --replace takes these nevertheless"
            )

    def publish(self, header: PredictorHeader) -> None:
        """Put the last round's predictors into the folder; nothing is left of work/. Killed, the old ones hold."""
        ready = self._work / READY
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        for layer_idx, layer in enumerate(header.layers):
            weights = read_layer(self._work_folder(layer.rank), self._config, layer_idx, layer.rank)
            write_layer(ready, self._config, layer_idx, weights)
        shutil.rmtree(self._folder / header.data, ignore_errors=True)  # of a run that was killed right here
        ready.rename(self._folder / header.data)
        write_header(self._folder, header)
        shutil.rmtree(self._work, ignore_errors=True)

    def _share_of_time(self, header: PredictorHeader) -> float:
        """Decoding held-out tokens one by one, by the kernels' own counters."""
        decoder, cache = self._decoder_with(header), self._sequence.cache
        cache.truncate(0)
        for token in self._profile.held_out[0, :TIMED_TOKENS].long():
            decoder.forward(token.view(1), cache)
        ticks = decoder.program_of(cache).ticks_by_label()
        return ticks["predictor"] / (ticks["predictor"] + ticks["neurons"])

    def _predictors(self, header: PredictorHeader) -> list[list[MlpPredictor]]:
        return [
            [replace(predictor, threshold=layer.threshold) for predictor in self._packed[layer_idx]]
            for layer_idx, layer in enumerate(header.layers)
        ]

    def _decoder_with(self, header: PredictorHeader) -> Decoder:
        decoder = self._sequence.decoder
        config = replace(self._config, predictor_input=header.input)
        return Decoder(config, with_predictors(decoder.weights, self._predictors(header)), "trained", decoder.team)

    def _train(self, layer_idx: int, rank: int) -> None:
        """Have the layer's weights of this rank in work/, and its curve in memory."""
        if (layer_idx, rank) in self._curves:
            return
        data = self._work_folder(rank)
        sample = self._sample(layer_idx)
        training, validation = sample.split(VALIDATION_SHARE)
        if not layer_path(data, layer_idx).exists():
            data.mkdir(parents=True, exist_ok=True)
            options = TrainingOptions(
                rank,
                self._request.row_format,
                self._request.recall,
                has_relu=self._request.has_relu,
                num_epochs=self._request.num_epochs,
                seed=layer_idx,
            )
            label = f"layer {layer_idx}, rank {rank}"
            trained = train_layer(
                training,
                validation,
                options,
                lambda epoch, cost: self._say(
                    f"{label}: epoch {epoch} of {options.num_epochs}, {cost:.2f} neurons named for one that fires"
                ),
            )
            write_layer(data, self._config, layer_idx, [(trained.fc1, fc2) for fc2 in trained.fc2])
        self._curves[layer_idx, rank] = self._curve(layer_idx, rank, validation)

    def _curve(self, layer_idx: int, rank: int, validation: LayerSample) -> Curve:
        """What thresholds cost, by the logits that the kernels compute."""
        weights = read_layer(self._work_folder(rank), self._config, layer_idx, rank)
        packed = pack_layer(weights, self._request.row_format, 0.0, has_relu=self._request.has_relu)
        self._packed[layer_idx] = packed
        team = self._sequence.decoder.team
        parts = [
            (packed[expert_idx].logits(validation.inputs[tokens].float(), team), active)
            for expert_idx, tokens, active in validation.of_experts()
        ]
        return curve([logits for logits, _ in parts], [active for _, active in parts])

    def _try_with_more_recall(self, ranks: list[int]) -> Outcome:
        """Lower thresholds as long as too little is found, and no more is named than may be: that costs no bytes."""
        request, margin = self._request, MARGIN
        outcome = self._try(ranks, margin)
        for _ in range(MARGIN_STEPS):
            missing = request.recall - outcome.total.recall
            if not 0 < missing <= MARGIN or outcome.total.density_ratio >= request.most_named:
                break
            margin += missing + MARGIN / 4
            outcome = self._try(ranks, margin)
        return outcome

    def _try(self, ranks: list[int], margin: float) -> Outcome:
        """Set the thresholds for the recall that is asked and the margin, and see what the predictors find on held-out
        text; what the model loses is not known.
        """
        curves = [self._curves[layer_idx, rank] for layer_idx, rank in enumerate(ranks)]
        chosen = spend(curves, min(1.0, self._request.recall + margin), LEAST_RECALL)
        thresholds = [_finite(each, idx) for each, idx in zip(curves, chosen, strict=True)]
        header = self._header(ranks, thresholds)
        predictors = self._predictors(header)
        qualities, self._exact = judged(self._sequence, self._profile.held_out, predictors, self._exact)
        header = replace(header, layers=tuple(map(_with_quality, header.layers, qualities)))
        share = header.num_bytes / (self._neuron_bytes * self._config.num_hidden_layers)
        return Outcome(header, tuple(qualities), math.nan, math.nan, share)

    def _with_losses(self, outcome: Outcome) -> Outcome:
        """With what the model loses by the predictors on held-out text."""
        assert self._exact is not None
        sequence = TokenSequence(self._decoder_with(outcome.header), self._sequence.cache)
        losses = window_losses(sequence, self._profile.held_out)
        header = replace(outcome.header, perplexity=losses.perplexity, exact_perplexity=self._exact.perplexity)
        loss, error = losses.increase_over(self._exact)
        return replace(outcome, header=header, loss=loss, loss_error=error)

    def _header(self, ranks: list[int], thresholds: list[float]) -> PredictorHeader:
        """Names data that the folder's own header cannot name: it is part of what the name is made of."""
        before = (self._folder / PREDICTORS).read_bytes() if has_predictors(self._folder) else b""
        data = hashlib.sha256(repr((self._key, ranks, before)).encode()).hexdigest()[:16]
        row_format = self._request.row_format
        layers = [
            LayerPredictors(rank, threshold, layer_bytes(self._config, row_format, rank))
            for rank, threshold in zip(ranks, thresholds, strict=True)
        ]
        return PredictorHeader(
            format=FORMAT_NAME,
            version=FORMAT_VERSION,
            model=self._profile.model,
            model_digest=self._digest,
            source=f"hybrid-predictors train, {self._profile.num_tokens} tokens profiled",
            input=self._config.predictor_input or "post_norm",
            has_relu=self._request.has_relu,
            row_kind=row_format.kind,
            row_group=row_format.group,
            layers=tuple(layers),
            perplexity=None,
            exact_perplexity=None,
            data=f"data-{data}",
        )

    def _sample(self, layer_idx: int) -> LayerSample:
        config = self._config
        samples = read_samples(self._profile_folder, config, layer_idx)
        if len(samples.inputs) * VALIDATION_SHARE < 1:
            raise UsageError(
                f"{self._profile_folder}: holds no sample to train on; profile with --samples 256M or more"
            )
        experts = max(1, config.num_experts)
        return LayerSample(samples.inputs, samples.experts, samples.active, config.intermediate_size, experts)

    def _work_folder(self, rank: int) -> Path:
        return self._work / f"{self._key}-rank-{rank}"


def _finite(of_layer: Curve, idx: int) -> float:
    """A threshold as JSON and float32 hold it: minus infinity, which names everything, as a number below all logits."""
    threshold = float(of_layer.thresholds[idx])
    return threshold if math.isfinite(threshold) else float(torch.finfo(torch.float32).min)


def _with_quality(layer: LayerPredictors, quality: Quality) -> LayerPredictors:
    return replace(
        layer,
        recall=quality.recall,
        precision=quality.precision,
        predicted_density=quality.predicted_density,
        true_density=quality.true_density,
    )
