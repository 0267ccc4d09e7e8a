"""The backward kernels: both compute the pairs again, one a block of queries per program, the other a block of keys.

No number is added to by two programs, so results do not depend on their order.
"""

import triton
import triton.language as tl

from .triton_cores import add_gradients_cores, backward_weights, load_layers, load_units, score_tile_cores
from .triton_gradients import add_gradients_looped, add_gradients_unrolled, store_sums, zero_sums
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


@triton.jit(do_not_specialize=["num_bh", "threshold", "T_q", "T_k"])
def neural_attention_bwd_query_kernel(
    p_u,  # inputs as in the forward kernel
    p_w,
    p_v,
    p_weight2,
    p_bias2,
    p_weight3,
    p_q,
    p_k,
    p_mask,
    p_seed,
    p_o,  # [B, H, Tq, DV]
    p_stats,  # [2, B, H, Tq]
    p_do,  # [B, H, Tq, DV]
    p_delta,  # [B, H, Tq], written for the other kernel
    p_du,  # [B, H, Tq, H1]
    p_dq,  # [B, H, Tq, D] or None
    p_dmask,  # [B, H, Tq, Tk], zero, or None
    p_dweights,  # [B, H, blocks, H2, H1 + 1]
    s_u,
    s_w,
    s_v,
    s_q,
    s_k,
    s_mask,
    s_do,
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
    H1_PADDED: tl.constexpr,
    H2: tl.constexpr,
    H2_PADDED: tl.constexpr,
    UNITS: tl.constexpr,
    UNROLL: tl.constexpr,
    CORES1: tl.constexpr,
    CORES2: tl.constexpr,
    PARTS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of `u`, of the scaled query and of the mask, and each program's sums for the second and third layer."""
    DTYPE: tl.constexpr = p_u.dtype.element_ty
    num_blocks = tl.cdiv(T_q, BLOCK_M)
    program = tl.program_id(0)
    block = num_blocks - 1 - program % num_blocks
    first_query = block * BLOCK_M
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

    o_rows = b_h.to(tl.int64) * T_q + o_m
    b_pivot = tl.load(p_stats + o_rows, mask=m_m, other=0.0)
    b_sum = tl.load(p_stats + num_bh.to(tl.int64) * T_q + o_rows, mask=m_m, other=0.0)
    b_share = tl.where(b_sum == 0.0, 0.0, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))
    b_do = load_tile(p_do + batch * s_do[0] + head * s_do[1], o_m, m_m, s_do, DV, DV_PADDED)
    b_o = load_tile(p_o + b_h.to(tl.int64) * T_q * DV, o_m, m_m, (0, 0, DV, 1), DV, DV_PADDED)
    b_delta = tl.sum(b_do.to(DTYPE) * b_o.to(DTYPE), 1)
    tl.store(p_delta + o_rows, b_delta, mask=m_m)
    if p_q is not None:
        p_k += batch * s_k[0] + kv_head * s_k[1]
        b_q = load_tile(p_q + batch * s_q[0] + head * s_q[1], o_m, m_m, s_q, D, D_PADDED)
        b_dq = tl.zeros([BLOCK_M, D_PADDED], DTYPE)

    HALF: tl.constexpr = p_v.dtype.element_ty
    b_zero = tl.zeros([BLOCK_M, BLOCK_N], DTYPE)
    if CORES1:
        b_zero = zero_tile(BLOCK_M, BLOCK_N, DTYPE, p_q is not None)
        b_rows = load_units(rows, H1, CORES1)
        layer_tiles = load_layers(layers, HALF, H1, H2, CORES1, CORES2)
        b_weights = backward_weights(layers, HALF, H1, H2, CORES1, CORES2)
        sums = tl.zeros([BLOCK_M, 8, CORES1], DTYPE)
        weight_sums = tl.zeros([PARTS, 2 * CORES2, CORES1], DTYPE)
        b_opened_sums = tl.zeros([PARTS, 2 * CORES2, 16], DTYPE)
    else:
        sums = zero_sums(BLOCK_M, H1, H1_PADDED, UNROLL, DTYPE)
    if CORES1:
        pass
    elif UNROLL:
        weight_sums = zero_sums(BLOCK_M, (H1 + 1) * H2, 0, True, DTYPE)
    else:
        weight_sums = zero_sums(H2_PADDED, H1, H1_PADDED, False, DTYPE)
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
                b_columns = load_units(columns, H1, CORES1)
                b_scores, b_hidden1, b_hidden2 = score_tile_cores(b_zero, b_rows, b_columns, layer_tiles, 0, WIDEN)
            else:
                b_scores, tiles = score_tile(b_zero, rows, columns, layers, H1, H2, UNITS, UNROLL)
            if p_q is not None:
                b_k = load_tile(p_k, o_n, m_n, s_k, D, D_PADDED)
                b_scores, b_slope = add_products(b_q, b_k, b_scores, softcap, SOFTCAP, WIDEN)
            b_scores = tl.where(m_pairs, b_scores + b_added, float("-inf"))
            b_p = exp(b_scores - b_pivot[:, None]) * b_share[:, None]
            b_v = load_tile(p_v, o_n, m_n, s_v, DV, DV_PADDED)
            b_dp = matmul(b_do, tl.trans(b_v), b_zero, WIDEN)
            if p_seed is not None:
                m_kept = kept_by_dropout(p_seed, o_m, first_key, b_h, threshold, BLOCK_N)
                b_dp = tl.where(m_kept, b_dp * dropout_scale(threshold, DTYPE), 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if p_dmask is not None:
                p_tile = p_dmask + (b_h.to(tl.int64) * T_q + first_query) * T_k + first_key
                o_pairs = (o_m - first_query)[:, None] * T_k + (o_n - first_key)[None, :]
                tl.store(p_tile + o_pairs, b_ds, mask=m_m[:, None] & m_n[None, :])
            if p_q is not None:
                b_dq = matmul((b_ds * b_slope).to(b_k.dtype), b_k, b_dq, WIDEN)
            if CORES1:
                sums, weight_sums, b_opened_sums = add_gradients_cores(
                    sums, weight_sums, b_opened_sums, b_hidden1, b_hidden2, b_ds, b_weights, True, 0, WIDEN
                )
            elif UNROLL:
                sums, weight_sums = add_gradients_unrolled(sums, weight_sums, tiles, b_ds, rows, columns, layers, H1, H2, True)
            else:
                sums, weight_sums = add_gradients_looped(
                    sums, weight_sums, tiles, b_ds, rows, columns, layers, H1, H1_PADDED, H2, H2_PADDED, UNITS, True
                )

    if CORES1:
        store_tile(p_du + b_h.to(tl.int64) * T_q * H1, tl.sum(sums, 1), o_m, m_m, H1, CORES1)
    else:
        store_sums(p_du + b_h.to(tl.int64) * T_q * H1, sums, o_m, m_m, H1, H1_PADDED, UNROLL)
    if p_q is not None:
        store_tile(p_dq + b_h.to(tl.int64) * T_q * D, b_dq, o_m, m_m, D, D_PADDED)
    p_dweights += (b_h.to(tl.int64) * num_blocks + block) * H2 * (H1 + 1)
    if CORES1:
        o_units1, o_units2 = tl.arange(0, CORES1), tl.arange(0, CORES2)
        b_dweights = tl.sum(tl.sum(tl.reshape(weight_sums, [PARTS, 2, CORES2, CORES1]), 1), 0)
        p_tile = p_dweights + o_units2[:, None] * (H1 + 1) + o_units1[None, :]
        tl.store(p_tile, b_dweights, mask=(o_units2 < H2)[:, None] & (o_units1 < H1)[None, :])
        b_opened = tl.max(tl.sum(tl.sum(tl.reshape(b_opened_sums, [PARTS, 2, CORES2, 16]), 1), 0), 1)
        tl.store(p_dweights + o_units2 * (H1 + 1) + H1, b_opened, mask=o_units2 < H2)
    elif UNROLL:
        for r in tl.static_range(H2):
            tl.store(p_dweights + r * (H1 + 1) + H1, tl.sum(weight_sums[r], 0))
            for c in tl.static_range(H1):
                tl.store(p_dweights + r * (H1 + 1) + c, tl.sum(weight_sums[(c + 1) * H2 + r], 0))
    else:
        o_units = tl.arange(0, H2_PADDED)
        store_tile(p_dweights, weight_sums, o_units, o_units < H2, H1 + 1, H1_PADDED)


@triton.jit(do_not_specialize=["num_bh", "threshold", "T_q", "T_k"])
def neural_attention_bwd_key_kernel(
    p_u,  # inputs as in the forward kernel
    p_w,
    p_v,
    p_weight2,
    p_bias2,
    p_weight3,
    p_q,
    p_k,
    p_mask,
    p_seed,
    p_stats,  # [2, B, H, Tq]
    p_do,  # [B, H, Tq, DV]
    p_delta,  # [B, H, Tq]
    p_dw,  # [B, Hkv, Tk, H1]
    p_dv,  # [B, Hkv, Tk, DV]
    p_dk,  # [B, Hkv, Tk, D] or None
    s_u,
    s_w,
    s_v,
    s_q,
    s_k,
    s_mask,
    s_do,
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
    H1_PADDED: tl.constexpr,
    H2: tl.constexpr,
    H2_PADDED: tl.constexpr,
    UNITS: tl.constexpr,
    UNROLL: tl.constexpr,
    CORES1: tl.constexpr,
    CORES2: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    WIDEN: tl.constexpr,
    BATCHES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of `w`, the values and the keys, summed over the query heads that a key head serves, in their order."""
    DTYPE: tl.constexpr = p_u.dtype.element_ty
    num_blocks = tl.cdiv(T_k, BLOCK_N)
    num_kv_heads = num_heads // groups
    program = tl.program_id(0)
    first_key = program % num_blocks * BLOCK_N
    b_kv = program // num_blocks
    batch, kv_head = (b_kv // num_kv_heads).to(tl.int64), (b_kv % num_kv_heads).to(tl.int64)

    o_n = first_key + tl.arange(0, BLOCK_N)
    m_n = o_n < T_k
    rows = (p_w + batch * s_w[0] + kv_head * s_w[1] + o_n.to(tl.int64) * s_w[2], m_n, s_w[3])
    b_v = load_tile(p_v + batch * s_v[0] + kv_head * s_v[1], o_n, m_n, s_v, DV, DV_PADDED)
    b_dv = tl.zeros([BLOCK_N, DV_PADDED], DTYPE)
    if p_q is not None:
        b_k = load_tile(p_k + batch * s_k[0] + kv_head * s_k[1], o_n, m_n, s_k, D, D_PADDED)
        b_dk = tl.zeros([BLOCK_N, D_PADDED], DTYPE)

    b_zero = zero_tile(BLOCK_N, BLOCK_M, DTYPE, p_q is not None)
    HALF: tl.constexpr = p_v.dtype.element_ty
    if CORES1:
        b_rows = load_units(rows, H1, CORES1)
        sums = tl.zeros([BLOCK_N, 8, CORES1], DTYPE)
    else:
        sums = zero_sums(BLOCK_N, H1, H1_PADDED, UNROLL, DTYPE)
    start = 0
    if IS_CAUSAL:
        start = first_key // BLOCK_M * BLOCK_M
    for member in range(groups):
        head = kv_head * groups + member
        b_h = batch * num_heads + head
        layers = layers_of_head(p_weight2, p_bias2, p_weight3, head, H1, H2, PER_HEAD)
        if CORES1:
            layer_tiles = load_layers(layers, HALF, H1, H2, CORES1, CORES2)
            b_weights = backward_weights(layers, HALF, H1, H2, CORES1, CORES2)
        for first_query in range(start, T_q, BLOCK_M):
            o_m = first_query + tl.arange(0, BLOCK_M)
            m_m = o_m < T_q
            m_pairs = existing_pairs(o_m[None, :], o_n[:, None], T_q, T_k, IS_CAUSAL)
            p_head_mask = p_mask
            if p_mask is not None:
                p_head_mask += batch * s_mask[0] + head * s_mask[1]
            b_added, m_pairs = load_mask(
                p_head_mask, first_query, o_m[None, :], first_key, o_n[:, None], m_pairs, s_mask, MASK, DTYPE
            )
            if any_pair(m_pairs, MASK):
                columns = (p_u + batch * s_u[0] + head * s_u[1] + o_m.to(tl.int64) * s_u[2], m_m, s_u[3])
                if CORES1:
                    b_columns = load_units(columns, H1, CORES1)
                    b_scores, b_hidden1, b_hidden2 = score_tile_cores(b_zero, b_rows, b_columns, layer_tiles, BATCHES, WIDEN)
                else:
                    b_scores, tiles = score_tile(b_zero, rows, columns, layers, H1, H2, UNITS, UNROLL)
                if p_q is not None:
                    b_q = load_tile(p_q + batch * s_q[0] + head * s_q[1], o_m, m_m, s_q, D, D_PADDED)
                    b_scores, b_slope = add_products(b_k, b_q, b_scores, softcap, SOFTCAP, WIDEN)
                b_scores = tl.where(m_pairs, b_scores + b_added, float("-inf"))
                o_rows = b_h * T_q + o_m
                b_pivot = tl.load(p_stats + o_rows, mask=m_m, other=0.0)
                b_sum = tl.load(p_stats + num_bh.to(tl.int64) * T_q + o_rows, mask=m_m, other=0.0)
                b_share = tl.where(b_sum == 0.0, 0.0, 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))
                b_p = exp(b_scores - b_pivot[None, :]) * b_share[None, :]
                b_do = load_tile(p_do + batch * s_do[0] + head * s_do[1], o_m, m_m, s_do, DV, DV_PADDED)
                b_dp = matmul(b_v, tl.trans(b_do), b_zero, WIDEN)
                b_dropped = b_p
                if p_seed is not None:
                    m_kept = tl.trans(kept_by_dropout(p_seed, o_m, first_key, b_h.to(tl.int32), threshold, BLOCK_N))
                    b_dropped = tl.where(m_kept, b_p * dropout_scale(threshold, DTYPE), 0.0)
                    b_dp = tl.where(m_kept, b_dp * dropout_scale(threshold, DTYPE), 0.0)
                b_dv = matmul(b_dropped.to(b_do.dtype), b_do, b_dv, WIDEN)
                b_ds = b_p * (b_dp - tl.load(p_delta + o_rows, mask=m_m, other=0.0)[None, :])
                if p_q is not None:
                    b_dk = matmul((b_ds * b_slope).to(b_q.dtype), b_q, b_dk, WIDEN)
                if CORES1:
                    sums, _, _ = add_gradients_cores(
                        sums, b_zero, b_zero, b_hidden1, b_hidden2, b_ds, b_weights, False, BATCHES, WIDEN
                    )
                elif UNROLL:
                    sums, _ = add_gradients_unrolled(sums, (), tiles, b_ds, rows, columns, layers, H1, H2, False)
                else:
                    sums, _ = add_gradients_looped(
                        sums, b_zero, tiles, b_ds, rows, columns, layers, H1, H1_PADDED, H2, H2_PADDED, UNITS, False
                    )

    o_head = b_kv.to(tl.int64) * T_k
    if CORES1:
        store_tile(p_dw + o_head * H1, tl.sum(sums, 1), o_n, m_n, H1, CORES1)
    else:
        store_sums(p_dw + o_head * H1, sums, o_n, m_n, H1, H1_PADDED, UNROLL)
    store_tile(p_dv + o_head * DV, b_dv, o_n, m_n, DV, DV_PADDED)
    if p_q is not None:
        store_tile(p_dk + o_head * D, b_dk, o_n, m_n, D, D_PADDED)
