"""Arguments of `run_neurons` and `sum_shares`: a feed-forward network's neurons, shared out among workers."""

from hybrid_kernels.native.input_layout import INPUT_WORDS

(
    NUM_SLOTS,  # feed-forward networks to run: 1, or the experts of the token
    BUNDLES,  # address of a table of networks, BUNDLE_WORDS each
    CHOSEN,  # address of int64 [NUM_SLOTS]: which of the table; 0: the first
    NUM_NEURONS,
    HAS_GATE,
    ACTIVATION,
    THRESHOLD,  # float32, of fatrelu
    SELECTED,  # address of int32 [NUM_SLOTS, NUM_NEURONS] from `project`'s SELECT; 0: every neuron
    COUNTS,  # address of int64 [NUM_SLOTS, blocks], how many each block of SELECTED has
    BLOCK,  # neurons of such a block
    NUM_SHARES,  # into how many shares a network's neurons are cut
    SHARES,  # address of float32 [NUM_SLOTS, NUM_SHARES, VECTOR_COLUMNS], written: each share's output in packed order
    READ_ROWS,  # address of int64 [workers, 8]: gate, up, down rows that each read, values carried over; added to
    LISTS,  # address of int32 [workers, 2, LIST_SIZE], written: the neurons of a worker's share, and of its next one
    LIST_SIZE,  # most_listed(NUM_NEURONS, NUM_SHARES)
    SLOT_SHARES,  # shares of SHARES that a network has: NUM_SHARES, or more where others write some of them
    HIDDEN,  # address of float32 [NUM_SLOTS, NUM_NEURONS], written: values of neurons, no down row is added; 0: none
    NEEDED,  # address of int64 [NUM_SLOTS, NUM_SHARES]: see tiers/layout.py; 0: nothing is waited for
    DISK,  # address of the words of who reads the disk; 0: nobody does
) = range(INPUT_WORDS, INPUT_WORDS + 19)
NUM_WORDS = INPUT_WORDS + 19


def most_listed(num_neurons: int, num_shares: int) -> int:
    """Neurons of the largest share."""
    return -(-num_neurons // num_shares)


BUNDLE_WORDS = 6
DATA, BUNDLE_STRIDE, ROW_STRIDE, GATE_BIAS, UP_BIAS, HOMES = range(BUNDLE_WORDS)
"""HOMES: address of int64 [NUM_NEURONS], where each bundle is (tiers/layout.py); 0: side by side from DATA on."""

(
    SUM_X,  # address: float32 [SUM_COLUMNS], what is added to
    SUM_OUTPUT,  # address: float32 [SUM_COLUMNS], written
    SUM_SHARES,
    SUM_NUM_SLOTS,
    SUM_NUM_SHARES,
    SUM_COLUMNS,
    SUM_VECTOR_COLUMNS,
    SUM_GROUP,  # columns that are in packed order among themselves
    SUM_ORDER,  # address: int32 [SUM_GROUP], the column of each place
    SUM_WEIGHTS,  # address: float32 [slots], the experts' weights; 0: all 1
    SUM_CHOSEN,  # as CHOSEN, for the biases
    SUM_BIASES,  # address of int64 [networks]: addresses of down biases, or 0s; 0: none
    SUM_SCRATCH,  # address of SUM_SCRATCH_STRIDE bytes for every worker
    SUM_SCRATCH_STRIDE,
) = range(14)
SUM_WORDS = 14
SUM_BLOCK = 512  # columns of a task: whole groups of every format
