"""Arguments of `attend`: one new token's attention in one layer, its key and value appended to the cache."""

(
    TOKEN,  # address of int64 [2]: the token's id and its position
    QUERY,  # address: float32 [NUM_HEADS, HEAD_DIM]
    NEW_KEYS,  # address: float32 [NUM_KV_HEADS, HEAD_DIM], rotated in place
    NEW_VALUES,
    OUTPUT,  # address: float32 [NUM_HEADS, HEAD_DIM], written
    NUM_HEADS,
    NUM_KV_HEADS,
    HEAD_DIM,
    ROTATES,  # whether queries and keys carry rotary positions
    COSINES,
    SINES,
    KEY_CACHE,  # address of this layer's keys, POSITION_STRIDE bytes a position
    VALUE_CACHE,
    POSITION_STRIDE,
    KV_KIND,
    KV_VALUE_BYTES,  # of Q8: bytes from a position's levels to its scales
    WINDOW,  # tokens that are seen, the new one included; 0: all
    SCALE,  # float32: what scores are multiplied by
    SCRATCH,  # address of SCRATCH_STRIDE bytes for every worker
    SCRATCH_STRIDE,
) = range(20)
NUM_WORDS = 20

F32, F16, Q8 = range(3)
"""Q8: a position's keys of all heads are one row of row_format's q8, group 32."""
KV_GROUP = 32


def scratch_bytes(num_heads: int, num_kv_heads: int, head_dim: int, num_positions: int) -> int:
    """Bytes that one worker needs: scores of a group of heads, and two vectors of a head."""
    return -(-(num_heads // num_kv_heads * num_positions + 2 * head_dim) * 4 // 4096) * 4096
