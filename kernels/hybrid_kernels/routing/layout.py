"""Arguments of `route`: which experts one token goes to."""

LOGITS, NUM_EXPERTS, NUM_CHOSEN, SCORE, NORMALIZE, CHOSEN, WEIGHTS = range(7)
NUM_WORDS = 7
"""LOGITS: address of float32 [NUM_EXPERTS], overwritten; CHOSEN: of int64 [NUM_CHOSEN], ascending; WEIGHTS: float32."""

SOFTMAX, TOPK_SIGMOID, TOPK_SOFTMAX = range(3)
