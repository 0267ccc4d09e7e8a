"""The network of a tile on tensor cores, for half precision: hidden units are a dimension of a matrix here.

A tile of `[rows, columns]` pairs is a matrix of `rows * columns` pairs by units. The first layer is summed and cut in float32,
so that the same ReLUs open as elsewhere, rounded once, and multiplied by the second layer's weights with sums in float32. In
backward, so are the gradients of the second layer, each as a sum of two numbers of half precision, of which the second is
what rounding took from the first.
"""

import triton
import triton.language as tl

from .triton_kernels import matmul, relu


@triton.jit
def load_units(side, H1: tl.constexpr, UNITS1: tl.constexpr):
    """`u` or `w` of a tile's rows or columns, `[rows, UNITS1]`, zero outside. `side`: see `score_tile`."""
    o_units = tl.arange(0, UNITS1)
    p_tile = side[0][:, None] + o_units[None, :] * side[2]
    return tl.load(p_tile, mask=side[1][:, None] & (o_units < H1)[None, :], other=0.0)


@triton.jit
def load_layers(layers, HALF: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, UNITS1: tl.constexpr, UNITS2: tl.constexpr):
    """`weight2` `[UNITS1, UNITS2]`, `bias2` and `weight3` `[UNITS2]`, zero for units that do not exist."""
    o_units1, o_units2 = tl.arange(0, UNITS1), tl.arange(0, UNITS2)
    m_weights = (o_units1 < H1)[:, None] & (o_units2 < H2)[None, :]
    b_weight2 = tl.load(layers[0] + o_units2[None, :] * H1 + o_units1[:, None], mask=m_weights, other=0.0)
    b_bias2 = tl.load(layers[1] + o_units2, mask=o_units2 < H2, other=0.0)
    return b_weight2.to(HALF), b_bias2, tl.load(layers[2] + o_units2, mask=o_units2 < H2, other=0.0)


@triton.jit
def backward_weights(
    layers, HALF: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, UNITS1: tl.constexpr, UNITS2: tl.constexpr
):
    """The second layer's weights times the third's, `[2 UNITS2, UNITS1]`: the same twice, for gradients in two parts."""
    o_units1, o_units2 = tl.arange(0, UNITS1), tl.arange(0, 2 * UNITS2) % UNITS2
    m_weights = (o_units2 < H2)[:, None] & (o_units1 < H1)[None, :]
    b_weight2 = tl.load(layers[0] + o_units2[:, None] * H1 + o_units1[None, :], mask=m_weights, other=0.0)
    return (b_weight2 * tl.load(layers[2] + o_units2, mask=o_units2 < H2, other=0.0)[:, None]).to(HALF)


@triton.jit
def matmul_of_pairs(b_left, b_right, b_sum, BATCHES: tl.constexpr, WIDEN: tl.constexpr):
    """`matmul` of a matrix with a row per pair, as one product, or with BATCHES above 0 as so many: one for each warp.

    Triton may give a product the warps of another one that its results go into, and where that has fewer rows than there are
    warps, all of them compute the same. It gives batches to warps in any case.
    """
    if BATCHES == 0:
        return matmul(b_left, b_right, b_sum, WIDEN)
    else:
        UNITS: tl.constexpr = b_right.shape[1]
        PAIRS: tl.constexpr = b_left.shape[0] // BATCHES
        b_parts = tl.reshape(b_left, [BATCHES, PAIRS, b_left.shape[1]])
        b_same = tl.broadcast_to(b_right[None, :, :], [BATCHES, b_right.shape[0], UNITS])
        b_product = matmul(b_parts, b_same, tl.reshape(b_sum, [BATCHES, PAIRS, UNITS]), WIDEN)
        return tl.reshape(b_product, [b_left.shape[0], UNITS])


@triton.jit
def score_tile_cores(b_zero, b_rows, b_columns, layers, BATCHES: tl.constexpr, WIDEN: tl.constexpr):
    """Scores `[rows, columns]`, and both layers of all pairs, `[rows * columns, units]`: the first after its ReLU."""
    ROWS: tl.constexpr = b_rows.shape[0]
    COLUMNS: tl.constexpr = b_columns.shape[0]
    b_hidden1 = relu(b_rows[:, None, :] + b_columns[None, :, :]).to(layers[0].dtype)
    b_hidden1 = tl.reshape(b_hidden1, [ROWS * COLUMNS, b_rows.shape[1]])
    b_bias = tl.zeros([ROWS * COLUMNS, layers[1].shape[0]], tl.float32) + layers[1][None, :]
    b_hidden2 = matmul_of_pairs(b_hidden1, layers[0], b_bias, BATCHES, WIDEN)
    b_scores = tl.reshape(tl.sum(relu(b_hidden2) * layers[2][None, :], 1), [ROWS, COLUMNS])
    return b_zero + b_scores, b_hidden1, b_hidden2


@triton.jit
def two_parts(b, HALF: tl.constexpr):
    """`[pairs, units]` -> `[pairs, 2 units]`: rounded to `HALF`, and what rounding took."""
    b_rounded = b.to(HALF)
    b_parts = tl.permute(tl.join(b_rounded, (b - b_rounded.to(b.dtype)).to(HALF)), (0, 2, 1))
    return tl.reshape(b_parts, [b.shape[0], 2 * b.shape[1]])


@triton.jit
def add_gradients_cores(
    b_sums,
    b_weight_sums,
    b_opened_sums,
    b_hidden1,
    b_hidden2,
    b_ds,
    b_weights,
    WEIGHTS: tl.constexpr,
    BATCHES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Adds a tile's gradients of the first layer to `b_sums` `[rows, 8, UNITS1]`, over which they are still to be summed.

    With `WEIGHTS` also the sums of `open * ds * hidden1` to `b_weight_sums` `[parts, 2 UNITS2, UNITS1]`, and of `open * ds` to
    `b_opened_sums` `[parts, 2 UNITS2, 16]`, each column the same.
    """
    ROWS: tl.constexpr = b_ds.shape[0]
    COLUMNS: tl.constexpr = b_ds.shape[1]
    UNITS1: tl.constexpr = b_hidden1.shape[1]
    HALF: tl.constexpr = b_hidden1.dtype
    b_opened = two_parts(tl.where(b_hidden2 > 0.0, tl.reshape(b_ds, [ROWS * COLUMNS])[:, None], 0.0), HALF)
    b_zero = tl.zeros([ROWS * COLUMNS, UNITS1], tl.float32)
    b_gradient = matmul_of_pairs(b_opened, b_weights, b_zero, BATCHES, WIDEN)
    b_gradient = tl.where(b_hidden1.to(tl.float32) > 0.0, b_gradient, 0.0)
    b_sums += tl.sum(tl.reshape(b_gradient, [ROWS, COLUMNS // 8, 8, UNITS1]), 1)
    if WEIGHTS:
        PARTS: tl.constexpr = b_weight_sums.shape[0]
        PAIRS: tl.constexpr = ROWS * COLUMNS // PARTS
        b_transposed = tl.permute(tl.reshape(b_opened, [PARTS, PAIRS, b_opened.shape[1]]), (0, 2, 1))
        b_weight_sums = matmul(b_transposed, tl.reshape(b_hidden1, [PARTS, PAIRS, UNITS1]), b_weight_sums, WIDEN)
        # converts, since the interpreter of Triton 3.7 makes no number of bfloat16
        b_ones = tl.full([PARTS, PAIRS, 16], 1.0, tl.float32).to(HALF)
        b_opened_sums = matmul(b_transposed, b_ones, b_opened_sums, WIDEN)
    return b_sums, b_weight_sums, b_opened_sums
