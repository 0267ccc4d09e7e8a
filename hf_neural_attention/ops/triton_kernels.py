"""Pieces that the Triton kernels of both passes share: the network of a tile of pairs, masks and dropout.

A tile is `[rows, columns]` pairs. Forward and the backward of queries have queries as rows and keys as columns; the backward
of keys turns it round, so that what a program owns always lies along the rows. The network is symmetric in them: its first
layer is `u_i + w_j`. Hidden units are never a dimension of a tile: one unit of one layer is one tile, held in registers, and
the layers' weights are scalars.

Names: `b_` values of a block, `p_` pointers, `o_` offsets, `m_` masks, `s_` strides.
"""

import triton
import triton.language as tl


# Say how a mask comes: not at all, as numbers other than zero where a pair counts, or (2) to be added to the scores
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def relu(x):
    # keeps NaN as NaN, as in PyTorch
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(x):
    # takes one instruction for the power of two, where that of e takes four for results below 2^-126, which become zero
    return tl.exp2(x * LOG2_E)


@triton.jit
def matmul(b_left, b_right, b_sum, WIDEN: tl.constexpr):
    """`b_left @ b_right + b_sum` in `b_sum`'s dtype. `WIDEN`: for the interpreter, whose products of bfloat16 are wrong."""
    if WIDEN:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    # avoids TF32, so that float32 inputs are multiplied as such
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee", out_dtype=b_sum.dtype)


@triton.jit
def tanh(x):
    """In float32 by its series near zero, where the quotient of exponentials would lose the small number."""
    b_exp = exp(-2.0 * tl.abs(x))
    b_far = (1.0 - b_exp) / (1.0 + b_exp)
    b_far = tl.where(x < 0.0, -b_far, b_far)
    if x.dtype.primitive_bitwidth == 64:
        return b_far
    else:
        # goes up to x^11 (Abramowitz and Stegun, 4.5.64): relative error below 1e-7 up to 0.4
        b_square = x * x
        b_series = 62.0 / 2835 + b_square * (-1382.0 / 155925)
        b_near = x + x * b_square * (-1.0 / 3 + b_square * (2.0 / 15 + b_square * (-17.0 / 315 + b_square * b_series)))
        return tl.where(tl.abs(x) < 0.4, b_near, b_far)


@triton.jit
def add_products(b_left, b_right, b_scores, softcap, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr):
    """Scores and the products of queries and keys `b_left @ b_right^T`, soft-capped or not; and the slope of the cap there."""
    if SOFTCAP:
        b_tanh = tanh(matmul(b_left, tl.trans(b_right), tl.zeros_like(b_scores), WIDEN) / softcap)
        return b_scores + softcap * b_tanh, (1.0 - b_tanh) * (1.0 + b_tanh)
    else:
        return matmul(b_left, tl.trans(b_right), b_scores, WIDEN), 1.0


@triton.jit
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, HAS_DOT: tl.constexpr):
    """Zeros that the scores start from. `HAS_DOT`: a matrix product is added to them.

    Where none is, one of zeros gives the tile the layout of matrix products. Else the compiler picks one in which a row is
    spread over a whole warp, or computes the tile twice. Being the same in every turn, it is computed once, before the loop.
    """
    if DTYPE.primitive_bitwidth == 64 or HAS_DOT:
        return tl.zeros([ROWS, COLUMNS], DTYPE)
    else:
        return tl.dot(tl.zeros([ROWS, 16], tl.float16), tl.zeros([16, COLUMNS], tl.float16), out_dtype=tl.float32)


@triton.jit
def load_tile(p, o_rows, m_rows, s, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a `[T, SIZE]` matrix with strides `s[2], s[3]` -> `[rows, PADDED]`, zero outside."""
    o_features = tl.arange(0, PADDED)
    p_tile = p + o_rows.to(tl.int64)[:, None] * s[2] + o_features[None, :] * s[3]
    return tl.load(p_tile, mask=m_rows[:, None] & (o_features < SIZE)[None, :], other=0.0)


@triton.jit
def store_tile(p, b, o_rows, m_rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """`[rows, PADDED]` -> rows of a contiguous `[T, SIZE]` matrix."""
    o_features = tl.arange(0, PADDED)
    p_tile = p + o_rows.to(tl.int64)[:, None] * SIZE + o_features[None, :]
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=m_rows[:, None] & (o_features < SIZE)[None, :])


@triton.jit
def layers_of_head(p_weight2, p_bias2, p_weight3, head, H1: tl.constexpr, H2: tl.constexpr, PER_HEAD: tl.constexpr):
    if PER_HEAD:
        return p_weight2 + head * H1 * H2, p_bias2 + head * H2, p_weight3 + head * H2
    else:
        return p_weight2, p_bias2, p_weight3


@triton.jit
def hidden1_tile(rows, columns, unit):
    """One unit of the first layer for all pairs. `rows`, `columns`: see `score_tile`."""
    b_rows = tl.load(rows[0] + unit * rows[2], mask=rows[1], other=0.0)
    b_columns = tl.load(columns[0] + unit * columns[2], mask=columns[1], other=0.0)
    return relu(b_rows[:, None] + b_columns[None, :])


@triton.jit
def add_unit(tiles, b_hidden1, p_weight2, COUNT: tl.constexpr, H1: tl.constexpr):
    """Adds what one unit of the first layer contributes to `COUNT` units of the second; `p_weight2`: its column."""
    added = ()
    for r in tl.static_range(COUNT):
        b_weight = tl.zeros_like(b_hidden1) + tl.load(p_weight2 + r * H1)
        added += (tl.fma(b_weight, b_hidden1, tiles[r]),)
    return added


@triton.jit
def hidden2_tiles(
    b_zero, rows, columns, layers, FIRST: tl.constexpr, COUNT: tl.constexpr, H1: tl.constexpr, UNROLL: tl.constexpr
):
    """Units `FIRST .. FIRST + COUNT - 1` of the second layer before their ReLU: a tuple of tiles."""
    tiles = ()
    for r in tl.static_range(COUNT):
        tiles += (b_zero + tl.load(layers[1] + FIRST + r),)
    p_weight2 = layers[0] + FIRST * H1
    if UNROLL:
        for c in tl.static_range(H1):
            tiles = add_unit(tiles, hidden1_tile(rows, columns, c), p_weight2 + c, COUNT, H1)
    else:
        for c in range(H1):
            tiles = add_unit(tiles, hidden1_tile(rows, columns, c), p_weight2 + c, COUNT, H1)
    return tiles


@triton.jit
def score_tile(b_zero, rows, columns, layers, H1: tl.constexpr, H2: tl.constexpr, UNITS: tl.constexpr, UNROLL: tl.constexpr):
    """Scores of the network, and the tiles of the last `UNITS` units of the second layer: all there are if `H2 <= UNITS`.

    `rows`, `columns`: (pointers to the first unit of `u` or `w`, which of them exist, distance between units). `layers`:
    pointers to `weight2`, `bias2`, `weight3`.
    """
    b_scores = b_zero
    tiles = ()
    for first in tl.static_range(0, H2, UNITS):
        COUNT: tl.constexpr = UNITS if first + UNITS <= H2 else H2 - first
        tiles = hidden2_tiles(b_zero, rows, columns, layers, first, COUNT, H1, UNROLL)
        for r in tl.static_range(COUNT):
            b_scores = tl.fma(b_zero + tl.load(layers[2] + first + r), relu(tiles[r]), b_scores)
    return b_scores, tiles


@triton.jit
def existing_pairs(o_queries, o_keys, T_q, T_k, IS_CAUSAL: tl.constexpr):
    """Pairs that exist and that causality keeps. One of the offsets is `[rows, 1]`, the other `[1, columns]`."""
    m_pairs = (o_queries < T_q) & (o_keys < T_k)
    if IS_CAUSAL:
        m_pairs = m_pairs & (o_keys <= o_queries)
    return m_pairs


@triton.jit
def load_mask(p_mask, first_query, o_queries, first_key, o_keys, m_pairs, s_mask, MASK: tl.constexpr, DTYPE: tl.constexpr):
    """What is added to the scores (a tile, or 0.0) and the pairs that the mask leaves."""
    b_added = 0.0
    if MASK != NO_MASK:
        # takes one address of 64 bits for the tile, and 32 bits for each pair from there
        p_tile = p_mask + tl.cast(first_query, tl.int64) * s_mask[2] + tl.cast(first_key, tl.int64) * s_mask[3]
        o_pairs = (o_queries - first_query) * s_mask[2] + (o_keys - first_key) * s_mask[3]
        b_mask = tl.load(p_tile + o_pairs, mask=m_pairs, other=0)
        if MASK == BOOL_MASK:
            m_pairs = m_pairs & (b_mask != 0)
        else:
            b_added = b_mask.to(DTYPE)
            m_pairs = m_pairs & (b_added != float("-inf"))
    return b_added, m_pairs


@triton.jit
def any_pair(m_pairs, MASK: tl.constexpr):
    """Whether a tile is worth computing; without a mask, known when compiling: loops leave empty tiles out."""
    if MASK == NO_MASK:
        return True
    else:
        return tl.max(tl.max(m_pairs.to(tl.int32), 1), 0) > 0


@triton.jit
def kept_by_dropout(p_seed, o_queries, first_key, b_h, threshold, KEYS: tl.constexpr):
    """Bool `[queries, KEYS]`: the definition of `dropout_multiplier`. `KEYS`: 16, 32, 64 or 128, and divides `first_key`.

    A call of Philox serves keys that lie 16 apart, so a row of 16 lanes makes the numbers of all `KEYS`.
    """
    o_lanes = 16 * (first_key // 128) + tl.arange(0, 16)
    o_counter = tl.zeros([o_queries.shape[0], 16], tl.int32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(p_seed), o_counter + o_lanes[None, :], o_counter + o_queries[:, None], o_counter + b_h, o_counter
    )
    part = first_key // KEYS  # says which of the parts of 128 keys this is, once reduced below
    if KEYS == 128:
        # orders columns as 16 s + lane; s = 4 (high half) + 2 (word 2 or 3) + (word 1 or 3)
        b_words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        b_numbers = tl.permute(tl.join(b_words & 0xFFFF, b_words >> 16), (0, 4, 2, 3, 1))
    elif KEYS == 64:
        b_words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        b_numbers = tl.permute((b_words >> (part % 2 * 16)) & 0xFFFF, (0, 2, 3, 1))
    elif KEYS == 32:
        b_words = tl.join(tl.where(part % 2 == 0, word0, word2), tl.where(part % 2 == 0, word1, word3))
        b_numbers = tl.permute((b_words >> (part // 2 % 2 * 16)) & 0xFFFF, (0, 2, 1))
    else:
        tl.static_assert(KEYS == 16)
        b_even = tl.where(part % 4 == 0, word0, word2)
        b_words = tl.where(part % 2 == 0, b_even, tl.where(part % 4 == 1, word1, word3))
        b_numbers = (b_words >> (part // 4 % 2 * 16)) & 0xFFFF
    return tl.reshape(b_numbers, [o_queries.shape[0], KEYS]).to(tl.int32) >= threshold


@triton.jit
def dropout_scale(threshold, DTYPE: tl.constexpr):
    """What kept attention weights are multiplied by; zero where nothing is kept."""
    kept = (65536 - threshold).to(DTYPE)
    return tl.where(threshold < 65536, 65536.0 / tl.maximum(kept, 1.0), 0.0)
