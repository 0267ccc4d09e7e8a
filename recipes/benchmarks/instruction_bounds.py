"""What bounds the operation on a CPU, counted: the vector instructions that a pair takes, and how many this machine does.

A vector instruction works on one pair a lane, and a product of `torch.mm` takes one lane of a multiply-add. So instructions a
pair, times pairs, over products a second is a time that no kernel gets below which computes a pair in this way, unless it has
more of the machine than `torch.mm` gets.
"""

import torch

from benchmarks.cases import Case
from hf_neural_attention.models.configuration_neural_attention import resolve_sizes
from tools.timing_by_turns import Runner, time_by_turns


SIZE = 1024  # of the matrices, whose product all caches can serve
TURNS = 20
EXPONENTIAL = 9  # rounds, takes the rest, a polynomial of degree five, scales


def instructions_per_pair(hidden_dims: tuple[int, int], value_dim: int, phase: str) -> int:
    """Vector instructions on a pair of `ops/native`, without dropout, masks, loads and what is done once a query or key.

    Args:
        hidden_dims: `h1, h2`.
        value_dim: numbers of a value, `Dv`.
        phase: "forward", "backward" or "both".
    """
    first, second = hidden_dims
    # counts the larger of w and -u, the second layer's products, its ReLU, and the third layer's products
    score = first + first * second + 2 * second
    forward = score + EXPONENTIAL + 1 + value_dim  # the exponential's sum, and what the pair adds to the output
    # counts a first-layer unit (two) and whether it is open; its gradient and its weights'; the sums of it by query and key
    network = 4 * second + first * (3 + 2 * second + 2)
    # counts the output's gradient times the value, and times the weight; the softmax
    backward = score + EXPONENTIAL + 1 + 2 * value_dim + 2 + network
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def pairs_of(case: Case) -> int:
    pairs = case.length * (case.length + 1) // 2 if case.causal else case.length**2
    return case.batch_size * case.heads * pairs


def products_per_second() -> float:
    """The most that `torch.mm` does here in float32, with as many threads as torch has now."""
    left, right = torch.randn(2, SIZE, SIZE)
    times = time_by_turns({"mm": Runner(lambda _: left @ right)}, TURNS)["mm"]
    return SIZE**3 / min(times)


def least_seconds(case: Case, rate: float) -> float:
    """The least time of the call on a CPU, by count.

    Args:
        rate: `products_per_second`.
    """
    _, hidden_dims = resolve_sizes(case.head_dim, case.proj_dim, case.hidden_dims)
    return pairs_of(case) * instructions_per_pair(hidden_dims, case.head_dim, case.phase) / rate
