"""The first words of every kernel that takes a vector: where it is, which norm it gets, and what it is quantised for.

Every worker prepares the vector by itself, in memory of its own: that costs some microseconds of each, where sharing it
would cost a barrier.
"""

NUM_NORMS = 3
NO_NORM, RMS_NORM, LAYER_NORM = range(NUM_NORMS)

(
    X,  # address: float32 [COLUMNS], or one after another every INPUT_STRIDE bytes
    INPUT_STRIDE,
    NORM_KIND,
    NORM_WEIGHT,
    NORM_BIAS,
    EPS,
    COLUMNS,
    VECTOR_COLUMNS,
    CODE,  # of the rows' format
    GROUPS,
    VALUE_BYTES,
    SCRATCH,  # address of SCRATCH_STRIDE bytes for every worker
    SCRATCH_STRIDE,
) = range(13)
INPUT_WORDS = 13

ROW_SCRATCH_BYTES = 4096  # behind the vector: run_neurons' rows and their sums, or `project`'s products


def scratch_bytes(vector_columns: int) -> int:
    """Bytes that one worker needs for a vector of that many columns: floats, levels, scales and offsets, rows.

    At their end lies a copy of the input's words, which `project` changes from matrix to matrix.
    """
    return -(-(vector_columns * (4 + 1 + 1) + ROW_SCRATCH_BYTES + 8 * INPUT_WORDS) // 4096) * 4096
