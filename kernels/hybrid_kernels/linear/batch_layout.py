"""Arguments of the kernels that take many vectors."""

(
    Q_X,  # address: float32 [Q_COUNT, Q_COLUMNS], rows Q_STRIDE bytes apart
    Q_STRIDE,
    Q_COUNT,
    Q_COLUMNS,
    Q_CODE,  # of the rows that the vectors will meet
    Q_GROUPS,
    Q_VECTOR_COLUMNS,
    Q_SHORTS,  # whether starts are for sums in 16 bits
    Q_LEVELS,  # address: int8 [Q_COUNT, Q_VECTOR_COLUMNS], written
    Q_SCALES,  # address: float32 [Q_COUNT, Q_GROUPS], written
    Q_STARTS,  # address: int32 [Q_COUNT, Q_VECTOR_COLUMNS / 32], written: what sums of nibbles start at
    Q_SCRATCH,  # address of Q_SCRATCH_STRIDE bytes for every worker
    Q_SCRATCH_STRIDE,
) = range(13)
Q_WORDS = 13

(
    LEVELS,
    SCALES,
    STARTS,
    COUNT,  # vectors
    VECTOR_COLUMNS,
    GROUPS,
    CODE,
    ROWS,
    STRIDE,
    NUM_ROWS,
    INDEX,  # address of int32 [NUM_ROWS]: which rows; 0: the first NUM_ROWS in order
    VALUE_BYTES,
    OUTPUT,  # address: float32 [COUNT, NUM_ROWS], rows OUTPUT_STRIDE bytes apart; of multiply_down [COUNT, COLUMNS]
    OUTPUT_STRIDE,
    COLUMNS,
    SCRATCH,
    SCRATCH_STRIDE,
) = range(17)
NUM_WORDS = 17

PANEL_ROWS = 8
DOWN_COLUMNS = 128  # of the output that a worker makes at once: whole groups of every format
DOWN_ROWS = 512  # of neurons that are in a panel at once
BLOCK = 32
TILE_BYTES = 512  # tables of addresses, and outputs of a tile's vectors that are cut at the end


def quantize_scratch(vector_columns: int) -> int:
    """Bytes that a worker of quantize_batch needs."""
    return 4 * vector_columns + 4 * vector_columns // BLOCK + 64


def multiply_scratch(vector_columns: int) -> int:
    """Bytes that a worker of multiply_batch needs: a panel, its scales, tables."""
    return PANEL_ROWS * vector_columns + PANEL_ROWS * 4 * vector_columns // BLOCK + TILE_BYTES


def down_scratch() -> int:
    """Bytes that a worker of multiply_down needs: a panel, its scales, rows as float32, tables."""
    panel = DOWN_ROWS * DOWN_COLUMNS
    return panel + panel // BLOCK * 4 + BLOCK * DOWN_COLUMNS * 4 + TILE_BYTES


(
    UNPACK_CODE,
    UNPACK_ROWS,
    UNPACK_STRIDE,
    UNPACK_VALUE_BYTES,
    UNPACK_GROUPS,
    UNPACK_COUNT,
    UNPACK_OUTPUT,
    UNPACK_OUTPUT_STRIDE,
) = range(8)
UNPACK_WORDS = 8
