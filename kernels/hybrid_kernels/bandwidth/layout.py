"""Arguments of read_memory."""

MEMORY, NUM_BYTES, SUMS = range(3)
NUM_WORDS = 3
BLOCK_BYTES = 1 << 20
