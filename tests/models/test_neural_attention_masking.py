"""The random numbers of dropout against their published definition, and the masks."""

import itertools

import pytest
import torch

from hf_neural_attention import neural_attention
from hf_neural_attention.models.neural_attention_masking import (
    causal_pairs,
    draw_dropout_seed,
    dropout_multiplier,
    dropout_threshold,
    mask_scores,
    philox,
)
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from tests.helpers.numerics import CPU_BACKENDS


def scalar_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x32-10 once more, in Python's integers, after Salmon et al. 2011."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = divmod(c0 * 0xD2511F53, 2**32), divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = right[0] ^ c1 ^ k0, right[1], left[0] ^ c3 ^ k1, left[1]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


# Takes counter, key and result from Random123's kat_vectors, philox4x32 with 10 rounds
KNOWN_ANSWERS = {
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name: str):
    counter, key, expected = KNOWN_ANSWERS[name]
    words = philox(tuple(torch.tensor([number]) for number in counter), tuple(torch.tensor([number]) for number in key))
    assert tuple(word.item() for word in words) == expected
    assert scalar_philox(counter, key) == expected


def multiplier(seed: int, dropout_p: float, **changes) -> torch.Tensor:
    places = {"batch": range(2), "heads": range(3), "num_heads": 3, "rows": range(5), "num_columns": 300} | changes
    return dropout_multiplier(torch.tensor([seed]), dropout_p, **places, dtype=torch.float64)


# has bits in both halves
SEED = 0x2B3C4D5E6F708192


def test_a_pair_gets_the_documented_number():
    dropout_p = 0.3
    ours = multiplier(SEED, dropout_p, num_columns=150)
    threshold = round(65536 * dropout_p)
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(150)):
        words = scalar_philox((16 * (j // 128) + j % 16, i, b * 3 + h, 0), (SEED % 2**32, SEED // 2**32))
        slot = j // 16 % 8
        number = words[slot % 4] % 2**16 if slot < 4 else words[slot % 4] // 2**16
        assert ours[b, h, i, j] == (0 if number < threshold else 65536 / (65536 - threshold))


def test_a_block_is_a_slice_of_the_whole():
    whole = multiplier(SEED, 0.5)
    for batch, heads, rows, columns in (
        (range(1, 2), range(3), range(5), 300),
        (range(2), range(1, 3), range(2, 4), 128),
        (range(1), range(2, 3), range(4, 5), 17),
    ):
        part = multiplier(SEED, 0.5, batch=batch, heads=heads, rows=rows, num_columns=columns)
        expected = whole[batch.start : batch.stop, heads.start : heads.stop, rows.start : rows.stop, :columns]
        assert torch.equal(part, expected)
    # checks that no two examples, heads, rows or seeds are alike
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])
    assert not torch.equal(whole[..., :128], whole[..., 128:256])
    assert not torch.equal(whole, multiplier(SEED + 1, 0.5))
    assert not torch.equal(whole, multiplier(SEED + 2**32, 0.5))


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_share_dropped_and_expectation(dropout_p: float):
    drawn = multiplier(SEED, dropout_p, rows=range(500), num_columns=400)
    count, kept = drawn.numel(), 1 - dropout_p
    five_sigma = 5 * (dropout_p * kept / count) ** 0.5
    assert abs((drawn == 0).double().mean().item() - dropout_p) < five_sigma + 1 / 65536
    assert abs(drawn.mean().item() - 1) < five_sigma / kept + 1 / 65536
    assert drawn.unique().numel() == 2
    # checks that every column is dropped as often as every other
    by_column = (drawn == 0).double().mean(dim=(0, 1, 2))
    assert (by_column - dropout_p).abs().max() < 5 * (dropout_p * kept / 3000) ** 0.5 + 1 / 3000


def test_all_or_nothing():
    assert (multiplier(SEED, 0.0) == 1).all()
    assert (multiplier(SEED, 1.0) == 0).all()
    assert (multiplier(SEED, 1 - 1e-9) == 0).all()  # rounds to the nearest 1/65536
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 32768
    assert dropout_threshold(1.0) == 65536


def test_the_seed_follows_torch():
    cpu = torch.device("cpu")
    seeds = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        seeds.append(draw_dropout_seed(0.1, cpu))
    assert seeds[0].shape == (1,)
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])
    assert not torch.equal(draw_dropout_seed(0.1, cpu), draw_dropout_seed(0.1, cpu))


def test_nothing_is_drawn_where_nothing_is_dropped():
    before = torch.get_rng_state()
    assert draw_dropout_seed(0.0, torch.device("cpu")) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_causal_pairs_are_the_lower_triangle():
    lower = torch.ones(9, 6, dtype=torch.bool).tril()
    assert torch.equal(causal_pairs(range(9), 6, torch.device("cpu")), lower)
    assert torch.equal(causal_pairs(range(2, 5), 4, torch.device("cpu")), lower[2:5, :4])


def test_mask_scores():
    scores, causal = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    minus = float("-inf")
    assert torch.equal(mask_scores(scores, None, None), scores)
    assert torch.equal(mask_scores(scores, None, causal), torch.tensor([[0, minus], [0, 0]]))
    assert torch.equal(mask_scores(scores, torch.tensor([False, True]), causal), torch.tensor([[minus, minus], [minus, 0]]))
    added = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.equal(mask_scores(scores, added, causal), torch.tensor([[1, minus], [1, 2]]))
    assert mask_scores(scores, added, causal).dtype == torch.float32


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_float32_number_is_not_minus_infinity(dtype: torch.dtype, backend: str):
    query, key, value = (torch.randn(1, 1, 3, 8).to(dtype) for _ in range(3))
    lowest = torch.full((3, 3), torch.finfo(torch.float32).min)
    scorer = NeuralScorer(8)
    output = neural_attention(query, key, value, scorer, lowest, backend=backend)
    torch.testing.assert_close(output, value.float().mean(dim=2, keepdim=True).expand(1, 1, 3, 8).to(dtype))
    assert not neural_attention(query, key, value, scorer, lowest.fill_(float("-inf")), backend=backend).any()
