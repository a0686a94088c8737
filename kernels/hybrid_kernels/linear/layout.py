"""Arguments of `project`: rows of one or several matrices times a vector."""

from hybrid_kernels.native.input_layout import INPUT_WORDS, ROW_SCRATCH_BYTES

(
    NUM_MATRICES,
    MATRICES,  # address of a table of matrices, MATRIX_WORDS each
    CHOSEN,  # address of int64 [NUM_MATRICES]: which of the table; 0: the first NUM_MATRICES in order
    OUTPUTS,  # address of a table of NUM_MATRICES outputs, OUTPUT_WORDS each
    OUTPUT_KIND,
    THRESHOLD,  # float32, of SELECT
    ROWS_PER_TASK,
    NUM_STATIC,  # the number of workers: each begins with the task of its own number, which may be prefetched; 0: drawn
) = range(INPUT_WORDS, INPUT_WORDS + 8)
NUM_WORDS = INPUT_WORDS + 8

MATRIX_WORDS = 8
ROWS, STRIDE, NUM_ROWS, BIAS, MATRIX_COLUMNS, MATRIX_VECTOR_COLUMNS, MATRIX_GROUPS, MATRIX_VALUE_BYTES = range(8)
"""The last four stand in for the input's COLUMNS ... VALUE_BYTES: experts' predictors differ in rank."""

OUTPUT_WORDS = 2
OUTPUT, RESIDUAL = range(OUTPUT_WORDS)

STORE, RELU, SELECT = range(3)
"""STORE: OUTPUT float32 [NUM_ROWS] = product + bias (+ RESIDUAL's, where there is one). RELU: the same, none below 0.
SELECT: the rows whose product exceeds THRESHOLD, in ascending order: OUTPUT int32 [NUM_ROWS], those of a task from its
first row's place on; RESIDUAL int64 [tasks], how many there are of each."""
MOST_SELECTED = ROW_SCRATCH_BYTES // 4  # rows of a task of SELECT: their products lie in a worker's scratch
