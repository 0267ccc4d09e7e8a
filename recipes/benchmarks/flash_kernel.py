"""Plain flash-attention kernels, to count the dot product's instructions beside those of Neural Attention.

They do as little as such kernels can: no mask but causality, heads of a size that is a power of two, tokens side by side. As
with ours, one kernel computes the output, and two the gradients: one owns a block of queries, the other of keys and values.
"""

import triton
import triton.language as tl

from hf_neural_attention.ops.triton_blocks import Blocks


# Takes queries, keys and warps from Triton's own tutorial, which has them for heads of 64 numbers on such GPUs
FLASH_BLOCKS = {
    "forward": Blocks(queries=128, keys=64, warps=4, stages=3),
    "query": Blocks(queries=128, keys=32, warps=4, stages=3),
    "key": Blocks(queries=32, keys=128, warps=4, stages=3),
}
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T"])
def flash_fwd_kernel(
    p_q,  # [B H, T, D]
    p_k,
    p_v,
    p_o,
    p_stats,  # [B H, T]
    scale,
    T,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Causal attention, and of each row the logarithm (to base 2) of its sum of exponentials."""
    num_blocks = tl.cdiv(T, BLOCK_M)
    first_query = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    head = (tl.program_id(0) // num_blocks).to(tl.int64) * T * D
    o_m = first_query + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
    o_rows = o_m[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q + head + o_rows, mask=o_m[:, None] < T, other=0.0)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, D], tl.float32)
    for first_key in range(0, tl.minimum(T, first_query + BLOCK_M), BLOCK_N):
        o_n = first_key + tl.arange(0, BLOCK_N)
        o_columns = o_n[:, None] * D + o_d[None, :]
        b_k = tl.load(p_k + head + o_columns, mask=o_n[:, None] < T, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k)) * (scale * LOG2_E)
        b_scores = tl.where(o_n[None, :] <= o_m[:, None], b_scores, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
        b_p = tl.exp2(b_scores - b_new_max[:, None])
        b_shrink = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = tl.load(p_v + head + o_columns, mask=o_n[:, None] < T, other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None])
        b_max = b_new_max
    tl.store(p_o + head + o_rows, (b_o / b_sum[:, None]).to(p_o.dtype.element_ty), mask=o_m[:, None] < T)
    tl.store(p_stats + head // D + o_m, b_max + tl.log2(b_sum), mask=o_m < T)


@triton.jit(do_not_specialize=["T"])
def flash_bwd_query_kernel(
    p_q,  # [B H, T, D]
    p_k,
    p_v,
    p_do,
    p_stats,  # [B H, T]
    p_delta,  # [B H, T], sums of output times its gradient
    p_dq,
    scale,
    T,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of queries."""
    num_blocks = tl.cdiv(T, BLOCK_M)
    first_query = (num_blocks - 1 - tl.program_id(0) % num_blocks) * BLOCK_M
    row = (tl.program_id(0) // num_blocks).to(tl.int64) * T
    o_m = first_query + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, D)
    o_rows = row * D + o_m[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q + o_rows, mask=o_m[:, None] < T, other=0.0)
    b_do = tl.load(p_do + o_rows, mask=o_m[:, None] < T, other=0.0)
    b_stats = tl.load(p_stats + row + o_m, mask=o_m < T, other=0.0)
    b_delta = tl.load(p_delta + row + o_m, mask=o_m < T, other=0.0)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    for first_key in range(0, tl.minimum(T, first_query + BLOCK_M), BLOCK_N):
        o_n = first_key + tl.arange(0, BLOCK_N)
        o_columns = row * D + o_n[:, None] * D + o_d[None, :]
        b_k = tl.load(p_k + o_columns, mask=o_n[:, None] < T, other=0.0)
        b_v = tl.load(p_v + o_columns, mask=o_n[:, None] < T, other=0.0)
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k)) * (scale * LOG2_E) - b_stats[:, None])
        b_p = tl.where(o_n[None, :] <= o_m[:, None], b_p, 0.0)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v)) - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
    tl.store(p_dq + o_rows, (b_dq * scale).to(p_dq.dtype.element_ty), mask=o_m[:, None] < T)


@triton.jit(do_not_specialize=["T"])
def flash_bwd_key_kernel(
    p_q,  # [B H, T, D]
    p_k,
    p_v,
    p_do,
    p_stats,  # [B H, T]
    p_delta,  # [B H, T]
    p_dk,
    p_dv,
    scale,
    T,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of keys and values. Tiles have a row for each key, so that no tile is transposed."""
    num_blocks = tl.cdiv(T, BLOCK_N)
    first_key = (tl.program_id(0) % num_blocks) * BLOCK_N
    row = (tl.program_id(0) // num_blocks).to(tl.int64) * T
    o_n = first_key + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, D)
    o_columns = row * D + o_n[:, None] * D + o_d[None, :]
    b_k = tl.load(p_k + o_columns, mask=o_n[:, None] < T, other=0.0)
    b_v = tl.load(p_v + o_columns, mask=o_n[:, None] < T, other=0.0)
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, D], tl.float32)
    for first_query in range(first_key // BLOCK_M * BLOCK_M, T, BLOCK_M):
        o_m = first_query + tl.arange(0, BLOCK_M)
        o_rows = row * D + o_m[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q + o_rows, mask=o_m[:, None] < T, other=0.0)
        b_do = tl.load(p_do + o_rows, mask=o_m[:, None] < T, other=0.0)
        b_stats = tl.load(p_stats + row + o_m, mask=o_m < T, other=0.0)
        b_delta = tl.load(p_delta + row + o_m, mask=o_m < T, other=0.0)
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q)) * (scale * LOG2_E) - b_stats[None, :])
        b_p = tl.where(o_n[:, None] <= o_m[None, :], b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv)
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do)) - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    tl.store(p_dk + o_columns, (b_dk * scale).to(p_dk.dtype.element_ty), mask=o_n[:, None] < T)
    tl.store(p_dv + o_columns, b_dv.to(p_dv.dtype.element_ty), mask=o_n[:, None] < T)
