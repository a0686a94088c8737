"""Training a store's predictors: layer by layer from a profile's sample, wider until the model holds.

What is finished of a layer lies in work/ under its rank, so that a run that was killed goes on with the next one. The
thresholds are set for all layers together. After each round the model is tried on the profile's held-out text, which
nothing was trained on; if its quality does not hold yet, the layer that promises most for its bytes gets wider. The
last round's predictors take the place of those that were there before, at the very end.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.predictor import Predictor
from hybrid_predictors.thresholds import Curve, Quality, curve, spend
from hybrid_predictors.training import LayerSample, TrainingOptions, train_layer
from hybrid_runtime.engine import OpenModel
from hybrid_runtime.errors import UsageError
from hybrid_runtime.evaluation.held_out import judged, window_losses
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.trained_predictors import load_predictors, pack_layer, with_predictors
from hybrid_runtime.profiling.profile import Profile
from hybrid_runtime.profiling.profile_file import read_header as read_profile_header
from hybrid_runtime.profiling.profile_file import read_samples
from hybrid_runtime.store.beside import store_digest
from hybrid_runtime.store.predictor_files import (
    FORMAT_NAME,
    FORMAT_VERSION,
    LayerPredictors,
    PredictorHeader,
    layer_path,
    read_layer,
    write_header,
    write_layer,
)
from hybrid_tools.predictor_training.ranks import ffn_bytes, grown_rank, initial_ranks, layer_bytes

VALIDATION_SHARE = 0.1
FIRST_SHARE = 0.8
MARGIN = 0.001  # thresholds are set for this much more recall than is asked: other text is a little harder
LEAST_RECALL = 0.9  # of every layer: a layer that is sacrificed for others may matter more than its neurons' number
LOCK = ".lock"
WORK = "work"
ROUND = "round"  # in there: the latest round's predictors
TIMED_TOKENS = 64

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PredictorRequest:
    """recall: share of firing neurons to find; most_named: neurons named for one that fires; most_share: predictors'
    bytes over the neurons'; most_loss: relative increase of the perplexity. All hold in the end, or a miss is said.
    first_share: of those bytes, what the first round spends; the rest goes where it turns out to be missing.
    """

    recall: float
    most_named: float
    most_share: float
    most_loss: float
    row_format: RowFormat
    num_epochs: int
    has_relu: bool = True
    restarts: bool = False
    first_share: float = FIRST_SHARE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to, on held-out text. by_layer: qualities; loss: relative increase of the perplexity, and its
    standard error; share: bytes over the neurons' bytes; share_of_time: of a decoded token's feed-forward networks.
    """

    header: PredictorHeader
    by_layer: tuple[Quality, ...]
    loss: float
    loss_error: float
    share: float
    share_of_time: float = math.nan

    @property
    def total(self) -> Quality:
        """Over all layers."""
        total = self.by_layer[0]
        for quality in self.by_layer[1:]:
            total = total + quality
        return total

    def misses(self, request: PredictorRequest) -> list[str]:
        """What does not hold, in words."""
        total = self.total
        found = []
        if total.recall < request.recall:
            found.append(f"recall {total.recall:.4f}, wanted {request.recall:g}")
        if total.density_ratio > request.most_named:
            found.append(f"{total.density_ratio:.2f} neurons named for one that fires, wanted {request.most_named:g}")
        if self.loss > request.most_loss:
            found.append(f"perplexity {100 * self.loss:+.2f} %, wanted at most +{100 * request.most_loss:g} %")
        if self.share > request.most_share:
            found.append(
                f"{100 * self.share:.1f} % of the neurons' bytes, wanted at most {100 * request.most_share:g} %"
            )
        return found


def train_predictors(
    opened: OpenModel,
    profile: Profile,
    profile_folder: Path,
    folder: Path,
    request: PredictorRequest,
    say: Say,
) -> Outcome:
    """Train, try, widen, until the request holds or no step fits its bytes; the last outcome is left in folder.

    Raises UsageError for a profile without samples or held-out text, and while another run writes there.
    """
    if len(profile.held_out) == 0:
        raise UsageError(f"{profile_folder}: its text was too short to keep any for testing; profile more text")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            run = _Run(opened, profile, profile_folder, folder, request, say)
            outcome = run.rounds()
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
        num_samples = read_profile_header(profile_folder).num_samples
        key = (self._digest, profile.texts, num_samples, request.row_format, request.num_epochs, request.has_relu)
        self._key = hashlib.sha256(repr((*key, request.recall)).encode()).hexdigest()[:16]
        self._work = folder / WORK
        self._round = self._work / ROUND
        if request.restarts:
            shutil.rmtree(self._work, ignore_errors=True)
        self._curves: dict[tuple[int, int], Curve] = {}
        self._neuron_bytes = ffn_bytes(self._config, opened.store.manifest.quantization)

    def rounds(self) -> Outcome:
        """All rounds; the last one's predictors are left in work/."""
        config, request = self._config, self._request
        budget = request.most_share * self._neuron_bytes * config.num_hidden_layers
        ranks = initial_ranks(config, request.row_format, self._profile.layers, budget * request.first_share)
        while True:
            for layer_idx, rank in enumerate(ranks):
                self._train(layer_idx, rank)
            outcome = self._try(ranks)
            misses = outcome.misses(request)
            self._say(f"ranks {' '.join(map(str, ranks))}: {'; '.join(misses) or 'everything wanted holds'}")
            excess = [quality.named - quality.fired for quality in outcome.by_layer]
            step = grown_rank(config, request.row_format, ranks, excess, budget)
            if not misses or step is None:
                return replace(outcome, share_of_time=self._share_of_time(outcome.header))
            ranks[step[0]] = step[1]

    def publish(self, header: PredictorHeader) -> None:
        """Put the last round's predictors into the folder; nothing is left of work/."""
        shutil.rmtree(self._folder / header.data, ignore_errors=True)
        (self._round / header.data).rename(self._folder / header.data)
        write_header(self._folder, header)
        shutil.rmtree(self._work, ignore_errors=True)

    def _share_of_time(self, header: PredictorHeader) -> float:
        """Decoding held-out tokens one by one, by the kernels' own counters."""
        decoder, cache = (
            self._decoder_with(load_predictors(self._round, header, self._config), header),
            self._sequence.cache,
        )
        cache.truncate(0)
        for token in self._profile.held_out[0, :TIMED_TOKENS].long():
            decoder.forward(token.view(1), cache)
        ticks = decoder.program_of(cache).ticks_by_label()
        return ticks["predictor"] / (ticks["predictor"] + ticks["neurons"])

    def _decoder_with(self, predictors: Sequence[Sequence[Predictor]], header: PredictorHeader) -> Decoder:
        decoder = self._sequence.decoder
        config = replace(self._config, predictor_input=header.input)
        return Decoder(config, with_predictors(decoder.weights, predictors), "trained", decoder.team)

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
        team = self._sequence.decoder.team
        parts = [
            (packed[expert_idx].logits(validation.inputs[tokens].float(), team), active)
            for expert_idx, tokens, active in validation.of_experts()
        ]
        return curve([logits for logits, _ in parts], [active for _, active in parts])

    def _try(self, ranks: list[int]) -> Outcome:
        """Set the thresholds, leave the predictors in work/, and see what they do on held-out text."""
        request, config = self._request, self._config
        curves = [self._curves[layer_idx, rank] for layer_idx, rank in enumerate(ranks)]
        chosen = spend(curves, min(1.0, request.recall + MARGIN), LEAST_RECALL)
        thresholds = [_finite(each, idx) for each, idx in zip(curves, chosen, strict=True)]
        header = self._save(ranks, thresholds)
        predictors = load_predictors(self._round, header, config)
        qualities, exact = judged(self._sequence, self._profile.held_out, predictors)
        with_them = TokenSequence(self._decoder_with(predictors, header), self._sequence.cache)
        losses = window_losses(with_them, self._profile.held_out)
        header = replace(
            header,
            layers=tuple(map(_with_quality, header.layers, qualities)),
            perplexity=losses.perplexity,
            exact_perplexity=exact.perplexity,
        )
        share = header.num_bytes / (self._neuron_bytes * config.num_hidden_layers)
        return Outcome(header, tuple(qualities), *losses.increase_over(exact), share)

    def _save(self, ranks: list[int], thresholds: list[float]) -> PredictorHeader:
        data = f"data-{hashlib.sha256(repr((self._key, ranks)).encode()).hexdigest()[:16]}"
        shutil.rmtree(self._round, ignore_errors=True)
        (self._round / data).mkdir(parents=True)
        layers = []
        for layer_idx, (rank, threshold) in enumerate(zip(ranks, thresholds, strict=True)):
            weights = read_layer(self._work_folder(rank), self._config, layer_idx, rank)
            write_layer(self._round / data, self._config, layer_idx, weights)
            layers.append(LayerPredictors(rank, threshold, layer_bytes(self._config, self._request.row_format, rank)))
        return PredictorHeader(
            format=FORMAT_NAME,
            version=FORMAT_VERSION,
            model=self._profile.model,
            model_digest=self._digest,
            source=f"hybrid-predictors train, {self._profile.num_tokens} tokens profiled",
            input=self._config.predictor_input or "post_norm",
            has_relu=self._request.has_relu,
            row_kind=self._request.row_format.kind,
            row_group=self._request.row_format.group,
            layers=tuple(layers),
            perplexity=None,
            exact_perplexity=None,
            data=data,
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
