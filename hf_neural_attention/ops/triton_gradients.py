"""Pieces of the backward kernels: the gradient of a tile's scores, carried through the network.

Few units: every sum is a vector along the rows, and loops over units are unrolled. Many units: sums are tiles with a column
per unit, and a loop counts the units of the first layer.
"""

import triton
import triton.language as tl

from .triton_kernels import hidden1_tile, hidden2_tiles, store_tile


@triton.jit
def zero_sums(ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, UNROLL: tl.constexpr, DTYPE: tl.constexpr):
    """`SIZE` sums for each row: a tuple of vectors, or where a loop counts the units, a tile."""
    if UNROLL:
        sums = ()
        for _ in tl.static_range(SIZE):
            sums += (tl.zeros([ROWS], DTYPE),)
        return sums
    else:
        return tl.zeros([ROWS, PADDED], DTYPE)


@triton.jit
def store_sums(p, sums, o_rows, m_rows, SIZE: tl.constexpr, PADDED: tl.constexpr, UNROLL: tl.constexpr):
    """Rows of a contiguous `[T, SIZE]` matrix."""
    if UNROLL:
        for c in tl.static_range(SIZE):
            tl.store(p + o_rows.to(tl.int64) * SIZE + c, sums[c], mask=m_rows)
    else:
        store_tile(p, sums, o_rows, m_rows, SIZE, PADDED)


@triton.jit
def open_units(tiles, b_ds, COUNT: tl.constexpr):
    """The gradient of the scores where a unit of the second layer is open, for each of `COUNT` units."""
    opened = ()
    for r in tl.static_range(COUNT):
        opened += (tl.where(tiles[r] > 0.0, b_ds, 0.0),)
    return opened


@triton.jit
def hidden1_gradient(opened, b_hidden1, p_weight2, p_weight3, COUNT: tl.constexpr, H1: tl.constexpr):
    """Gradient of one unit of the first layer before its ReLU, as far as it comes from `COUNT` units of the second."""
    b_gradient = tl.zeros_like(b_hidden1)
    for r in tl.static_range(COUNT):
        b_weight = tl.load(p_weight2 + r * H1) * tl.load(p_weight3 + r)
        b_gradient = tl.fma(tl.zeros_like(b_hidden1) + b_weight, opened[r], b_gradient)
    return tl.where(b_hidden1 > 0.0, b_gradient, 0.0)


@triton.jit
def add_gradients_unrolled(
    sums, weight_sums, tiles, b_ds, rows, columns, layers, H1: tl.constexpr, H2: tl.constexpr, WEIGHTS: tl.constexpr
):
    """Adds a tile's share of the first layer's gradient, summed along the rows, to `sums`, a vector per unit.

    With `WEIGHTS` also, to `weight_sums`, the sums of `open * ds` (H2 vectors) and of `open * ds * hidden1` (H1 H2 vectors).
    """
    opened = open_units(tiles, b_ds, H2)
    new_sums = ()
    new_weight_sums = ()
    if WEIGHTS:
        for r in tl.static_range(H2):
            new_weight_sums += (weight_sums[r] + tl.sum(opened[r], 1),)
    for c in tl.static_range(H1):
        b_hidden1 = hidden1_tile(rows, columns, c)
        new_sums += (sums[c] + tl.sum(hidden1_gradient(opened, b_hidden1, layers[0] + c, layers[2], H2, H1), 1),)
        if WEIGHTS:
            for r in tl.static_range(H2):
                new_weight_sums += (weight_sums[(c + 1) * H2 + r] + tl.sum(opened[r] * b_hidden1, 1),)
    return new_sums, new_weight_sums


@triton.jit
def add_gradients_looped(
    b_sums,
    b_weight_sums,
    tiles,
    b_ds,
    rows,
    columns,
    layers,
    H1: tl.constexpr,
    H1_PADDED: tl.constexpr,
    H2: tl.constexpr,
    H2_PADDED: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """As `add_gradients_unrolled`, with `b_sums` `[rows, H1_PADDED]` and `b_weight_sums` `[H2_PADDED, H1_PADDED]`.

    There the whole tile is summed: column c is for unit c of the first layer, column H1 for `open * ds`.
    """
    o_units1 = tl.arange(0, H1_PADDED)
    o_units2 = tl.arange(0, H2_PADDED)
    for first in tl.static_range(0, H2, UNITS):
        COUNT: tl.constexpr = UNITS if first + UNITS <= H2 else H2 - first
        if H2 > UNITS:
            tiles = hidden2_tiles(tl.zeros_like(b_ds), rows, columns, layers, first, COUNT, H1, False)
        opened = open_units(tiles, b_ds, COUNT)
        if WEIGHTS:
            b_column = tl.zeros([H2_PADDED], b_ds.dtype)
            for r in tl.static_range(COUNT):
                b_column = tl.where(o_units2 == first + r, tl.sum(opened[r]), b_column)
            b_weight_sums += tl.where((o_units1 == H1)[None, :], b_column[:, None], 0.0)
        for c in range(H1):
            b_hidden1 = hidden1_tile(rows, columns, c)
            p_weight2 = layers[0] + first * H1 + c
            b_gradient = hidden1_gradient(opened, b_hidden1, p_weight2, layers[2] + first, COUNT, H1)
            b_sums += tl.where((o_units1 == c)[None, :], tl.sum(b_gradient, 1)[:, None], 0.0)
            if WEIGHTS:
                b_column = tl.zeros([H2_PADDED], b_ds.dtype)
                for r in tl.static_range(COUNT):
                    b_column = tl.where(o_units2 == first + r, tl.sum(opened[r] * b_hidden1), b_column)
                b_weight_sums += tl.where((o_units1 == c)[None, :], b_column[:, None], 0.0)
    return b_sums, b_weight_sums
