"""Which query-key pairs count: attention masks, causality, and the counter-based dropout of attention weights.

Every backend takes its masks and random numbers from here, or repeats this file's definition of them, so that all of
them keep and drop the same pairs.
"""

import torch


# Follows Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2)
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LOW_32_BITS = 0xFFFFFFFF

# Puts the eight keys that one Philox call serves (by four 32-bit words, so eight 16-bit numbers) 16 columns apart, so that a
# vector of 16 lanes needs no shuffle.
LANES = 16
COLUMNS_PER_GROUP = 8 * LANES
RESOLUTION = 1 << 16


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox 4x32-10.

    Args:
        counter: four int64 tensors that broadcast together, with values below 2**32.
        key: two int64 tensors that broadcast with them, with values below 2**32.

    Returns:
        Four int64 tensors of the broadcast shape with values below 2**32: 128 random bits per counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # lets int64 products wrap around, which leaves all 64 bits of the unsigned product in place
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0 = ((product1 >> 32) & LOW_32_BITS) ^ c1 ^ k0
        c2 = ((product0 >> 32) & LOW_32_BITS) ^ c3 ^ k1
        c1, c3 = product1 & LOW_32_BITS, product0 & LOW_32_BITS
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & LOW_32_BITS, (k1 + PHILOX_KEY_INCREMENTS[1]) & LOW_32_BITS
    return c0, c1, c2, c3


def draw_dropout_seed(dropout_p: float, device: torch.device) -> torch.Tensor | None:
    """A seed from torch's generator of `device` (int64 tensor of shape `[1]`), or None if nothing is dropped.

    It stays a tensor, so that a GPU need not wait for it, and follows `torch.manual_seed`; gradient checkpointing, which
    restores the generator, therefore drops the same pairs when it runs the forward again.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> int:
    """How many of the 65,536 values of a 16-bit random number mean "drop"."""
    return round(dropout_p * RESOLUTION)


def dropout_multiplier(
    seed: torch.Tensor,
    dropout_p: float,
    *,
    batch: range,
    heads: range,
    num_heads: int,
    rows: range,
    num_columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What attention weights are multiplied by under dropout: 0, or the inverse of the share that is kept.

    A pair's fate depends on `seed` and its own place alone, never on how the work is cut into blocks. Query `i`, key `j`
    and head `h` of example `b` are dropped if their 16-bit number is below `round(65536 * dropout_p)`, which is word
    `s % 4` (low half if `s < 4`, else high half), with `s = j // 16 % 8`, of Philox 4x32-10 under the 64-bit key `seed`
    and the counter `(16 * (j // 128) + j % 16, i, b * num_heads + h, 0)`.

    Args:
        seed: int64 tensor of shape `[1]`.
        dropout_p: probability of a drop, kept to the nearest 1/65536.
        batch, heads, rows: which examples, query heads and queries of the whole problem are wanted.
        num_heads: query heads of the whole problem.
        num_columns: keys `0..num_columns - 1` are wanted.
        dtype: of the result.

    Returns:
        Tensor of shape `[len(batch), len(heads), len(rows), num_columns]` on the seed's device.
    """
    device = seed.device
    num_groups = -(-num_columns // COLUMNS_PER_GROUP)
    column = torch.arange(num_groups * LANES, device=device)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    head = torch.arange(heads.start, heads.stop, device=device)[:, None, None]
    example = torch.arange(batch.start, batch.stop, device=device)[:, None, None, None]
    counter = (column, row, example * num_heads + head, torch.zeros_like(column))
    words = philox(counter, (seed & LOW_32_BITS, (seed >> 32) & LOW_32_BITS))

    grouped = torch.stack([word.unflatten(-1, (num_groups, LANES)) for word in words], dim=-2)  # [..., group, 4, lane]
    numbers = torch.cat((grouped & (RESOLUTION - 1), grouped >> 16), dim=-2).flatten(-3)[..., :num_columns]
    threshold = dropout_threshold(dropout_p)
    scale = RESOLUTION / (RESOLUTION - threshold) if threshold < RESOLUTION else 0.0
    return (numbers >= threshold).to(dtype) * scale


def causal_pairs(rows: range, num_columns: int, device: torch.device) -> torch.Tensor:
    """Bool tensor of shape `[len(rows), num_columns]`: query `i` may attend to keys `j <= i` (upper-left aligned)."""
    row = torch.arange(rows.start, rows.stop, device=device)
    return torch.arange(num_columns, device=device) <= row[:, None]


def mask_scores(scores: torch.Tensor, attn_mask: torch.Tensor | None, causal: torch.Tensor | None) -> torch.Tensor:
    """Scores with -inf where a pair does not count; `attn_mask` is bool (True attends) or float (added)."""
    if causal is not None:
        scores = scores.masked_fill(~causal, float("-inf"))
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask.to(scores.dtype)
