"""The forward kernel: attention with an online softmax, a block of queries per program."""

import triton
import triton.language as tl

from .triton_cores import load_layers, load_units, score_tile_cores
from .triton_kernels import (
    add_products,
    any_pair,
    dropout_scale,
    existing_pairs,
    exp,
    kept_by_dropout,
    layers_of_head,
    load_mask,
    load_tile,
    matmul,
    score_tile,
    store_tile,
    zero_tile,
)


# avoids new kernels for lengths and numbers that change from call to call
@triton.jit(do_not_specialize=["num_bh", "threshold", "T_q", "T_k"])
def neural_attention_fwd_kernel(
    p_u,  # [B, H, Tq, H1]
    p_w,  # [B, Hkv, Tk, H1]
    p_v,  # [B, Hkv, Tk, DV]
    p_weight2,  # [1 or H, H2, H1]
    p_bias2,  # [1 or H, H2]
    p_weight3,  # [1 or H, 1, H2]
    p_q,  # [B, H, Tq, D], scaled, or None
    p_k,  # [B, Hkv, Tk, D] or None
    p_mask,  # broadcast to [B, H, Tq, Tk] by strides of zero, or None
    p_seed,  # [1] or None
    p_sinks,  # [H] or None
    p_o,  # [B, H, Tq, DV]
    p_stats,  # [2, B, H, Tq]
    s_u,
    s_w,
    s_v,
    s_q,
    s_k,
    s_mask,
    num_bh,
    num_heads,
    groups,
    threshold,
    T_q,
    T_k,
    softcap,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    UNITS: tl.constexpr,
    UNROLL: tl.constexpr,
    CORES1: tl.constexpr,
    CORES2: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output, and of each row the largest score (0 if it has none) and the sum of exponentials below it (0 if none)."""
    DTYPE: tl.constexpr = p_u.dtype.element_ty
    num_blocks = tl.cdiv(T_q, BLOCK_M)
    program = tl.program_id(0)
    # starts the longest blocks first, since causal blocks differ in length
    first_query = (num_blocks - 1 - program % num_blocks) * BLOCK_M
    b_h = program // num_blocks
    batch, head = (b_h // num_heads).to(tl.int64), (b_h % num_heads).to(tl.int64)
    kv_head = head // groups

    o_m = first_query + tl.arange(0, BLOCK_M)
    m_m = o_m < T_q
    rows = (p_u + batch * s_u[0] + head * s_u[1] + o_m.to(tl.int64) * s_u[2], m_m, s_u[3])
    p_w += batch * s_w[0] + kv_head * s_w[1]
    p_v += batch * s_v[0] + kv_head * s_v[1]
    layers = layers_of_head(p_weight2, p_bias2, p_weight3, head, H1, H2, PER_HEAD)
    if p_mask is not None:
        p_mask += batch * s_mask[0] + head * s_mask[1]
    if p_q is not None:
        p_k += batch * s_k[0] + kv_head * s_k[1]
        b_q = load_tile(p_q + batch * s_q[0] + head * s_q[1], o_m, m_m, s_q, D, D_PADDED)

    HALF: tl.constexpr = p_v.dtype.element_ty
    if CORES1:
        b_rows = load_units(rows, H1, CORES1)
        layer_tiles = load_layers(layers, HALF, H1, H2, CORES1, CORES2)
    b_zero = zero_tile(BLOCK_M, BLOCK_N, DTYPE, p_q is not None)
    b_max = tl.full([BLOCK_M], float("-inf"), DTYPE)
    b_sum = tl.zeros([BLOCK_M], DTYPE)
    b_o = tl.zeros([BLOCK_M, DV_PADDED], DTYPE)
    end = T_k
    if IS_CAUSAL:
        end = tl.minimum(T_k, first_query + BLOCK_M)
    for first_key in range(0, end, BLOCK_N):
        o_n = first_key + tl.arange(0, BLOCK_N)
        m_n = o_n < T_k
        m_pairs = existing_pairs(o_m[:, None], o_n[None, :], T_q, T_k, IS_CAUSAL)
        b_added, m_pairs = load_mask(p_mask, first_query, o_m[:, None], first_key, o_n[None, :], m_pairs, s_mask, MASK, DTYPE)
        if any_pair(m_pairs, MASK):
            columns = (p_w + o_n.to(tl.int64) * s_w[2], m_n, s_w[3])
            if CORES1:
                b_scores, _, _ = score_tile_cores(b_zero, b_rows, load_units(columns, H1, CORES1), layer_tiles, 0, WIDEN)
            else:
                b_scores, _ = score_tile(b_zero, rows, columns, layers, H1, H2, UNITS, UNROLL)
            if p_q is not None:
                b_k = load_tile(p_k, o_n, m_n, s_k, D, D_PADDED)
                b_scores, _ = add_products(b_q, b_k, b_scores, softcap, SOFTCAP, WIDEN)
            b_scores = tl.where(m_pairs, b_scores + b_added, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
            # stays finite also for rows that have nothing to attend to yet
            b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_p = exp(b_scores - b_pivot[:, None])
            b_shrink = exp(b_max - b_pivot)
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            if p_seed is not None:
                b_p = tl.where(kept_by_dropout(p_seed, o_m, first_key, b_h, threshold, BLOCK_N), b_p, 0.0)
            b_v = load_tile(p_v, o_n, m_n, s_v, DV, DV_PADDED)
            b_o = matmul(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], WIDEN)
            b_max = b_new_max

    if p_sinks is not None:  # makes the sum infinite, and so the output zero, where it is far above all scores
        b_sum += exp(tl.load(p_sinks + head) - tl.where(b_max == float("-inf"), 0.0, b_max))
    b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    if p_seed is not None:
        b_o *= dropout_scale(threshold, DTYPE)
    store_tile(p_o + b_h.to(tl.int64) * T_q * DV, b_o, o_m, m_m, DV, DV_PADDED)
    p_stats += b_h.to(tl.int64) * T_q + o_m
    tl.store(p_stats, tl.where(b_max == float("-inf"), 0.0, b_max), mask=m_m)
    tl.store(p_stats + num_bh.to(tl.int64) * T_q, b_sum, mask=m_m)
