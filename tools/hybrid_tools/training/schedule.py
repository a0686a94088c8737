"""What changes over a run: the learning rate and the weight of the sparsity penalty, as functions of the step."""

from __future__ import annotations

import math

from hybrid_tools.training.recipe import Optimisation


def learning_rate(optimisation: Optimisation, step_idx: int) -> float:
    """Rises linearly over the warm-up, then falls along half a cosine to final_learning_rate x the largest."""
    num_steps = optimisation.num_steps
    warmup = math.ceil(optimisation.warmup * num_steps)
    if step_idx < warmup:
        return optimisation.learning_rate * (step_idx + 1) / warmup
    done = (step_idx - warmup) / max(1, num_steps - warmup)
    lowest = optimisation.final_learning_rate
    return optimisation.learning_rate * (lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2)


def l1_weight(optimisation: Optimisation, step_idx: int) -> float:
    """0 before l1_start, rising along half a cosine, l1 from l1_end on (ProSparse's progressive regularisation)."""
    done = step_idx / optimisation.num_steps
    if done < optimisation.l1_start:
        return 0.0
    if done >= optimisation.l1_end:
        return optimisation.l1
    share = (done - optimisation.l1_start) / (optimisation.l1_end - optimisation.l1_start)
    return optimisation.l1 * (1 - math.cos(math.pi * share)) / 2
