"""Arguments of `begin_token`: what happens once a token before its first layer."""

(
    TOKEN,  # address of int64 [2]: the token's id and its position
    EMBED_ROWS,
    EMBED_STRIDE,
    EMBED_CODE,
    EMBED_GROUPS,
    EMBED_VALUE_BYTES,
    X,  # address: float32 [vector_columns of the embedding], written
    HIDDEN_SIZE,
    LEARNED_ROWS,  # address of learned positions' rows, or 0
    LEARNED_STRIDE,
    LEARNED_CODE,
    LEARNED_GROUPS,
    LEARNED_VALUE_BYTES,
    LEARNED_OFFSET,
    SPARE,  # address: float32 [vector_columns] for a learned position
    HALF_DIM,  # head_dim / 2; 0: no rotary positions
    INVERSE_FREQUENCIES,  # address: float32 [HALF_DIM]
    MAGNITUDE,  # float32
    COSINES,  # address: float32 [HALF_DIM], written
    SINES,
) = range(20)
NUM_WORDS = 20
