"""How well a model predicts the documents that it never saw: mean loss over whole sequences, file by file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.text.documents import read_documents
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_tools.training.corpus import HELD_OUT_FOLDER, document_ids
from hybrid_tools.training.network import OnHidden, Weights, forward

BATCH_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class HeldOut:
    """sequences: by file's name, [B, seq_len + 1] int64; a text shorter than one sequence is left out."""

    sequences: Mapping[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(each.shape[0] * (each.shape[1] - 1) for each in self.sequences.values())


def read_held_out(
    corpus_folder: Path, tokenizer: Tokenizer, seq_len: int, most_sequences: int | None = None
) -> HeldOut:
    """The held-out documents of every file, packed as in training. most_sequences: of each file, from its start."""
    found = {}
    for path in sorted((corpus_folder / HELD_OUT_FOLDER).iterdir()):
        most_ids = math.inf if most_sequences is None else most_sequences * seq_len + 1
        ids: list[int] = []
        for document in read_documents(path):
            ids += document_ids(tokenizer, document)
            if len(ids) >= most_ids:
                break
        num_sequences = (len(ids) - 1) // seq_len
        if most_sequences is not None:
            num_sequences = min(num_sequences, most_sequences)
        if num_sequences > 0:
            row = np.asarray(ids[: num_sequences * seq_len + 1], np.int64)
            windows = np.lib.stride_tricks.sliding_window_view(row, seq_len + 1)[::seq_len]
            found[path.name] = torch.from_numpy(np.ascontiguousarray(windows))
    return HeldOut(found)


def mean_losses(
    config: ModelConfig, weights: Weights, held_out: HeldOut, on_hidden: OnHidden | None = None
) -> dict[str, float]:
    """Nats a token by file, and over all tokens under `all`."""
    sums, counts = {}, {}
    for name, sequences in held_out.sequences.items():
        device = weights["embed_tokens"].device
        total = torch.zeros((), dtype=torch.float64)
        for batch in torch.split(sequences, BATCH_SEQUENCES):
            tokens = batch.to(device)
            with torch.no_grad():
                logits = forward(config, weights, tokens[:, :-1], on_hidden).logits
                losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            total += losses.double().cpu()
        sums[name], counts[name] = float(total), sequences.shape[0] * (sequences.shape[1] - 1)
    losses_by_file = {name: sums[name] / counts[name] for name in sums}
    if sums:
        losses_by_file["all"] = sum(sums.values()) / sum(counts.values())
    return losses_by_file
