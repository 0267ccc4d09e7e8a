"""What a scorer starts with: the paper's initialisation, and one that no draw leaves dead."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .neural_attention_reference import ScorerWeights, first_layer_of_key, first_layer_of_query


# Sets the standard deviation of the scores that "mirrored" starts with, on unit-normal queries and keys: what the scaled
# dot product has there
INITIAL_SCORE_STD = 1.0

# Overrides defaults, also those of DeepSpeed, whose `zero.Init` casts what torch makes: a QR decomposition needs float32, and
# not every device has float64
IN_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def draw_weights(
    init: str, head_dim: int, proj_dim: int, hidden_dims: tuple[int, int], num_heads: int | None = None
) -> ScorerWeights:
    """New weights of a scorer, in float32 on the CPU, with a leading dimension of `num_heads` where that is given."""
    draw = mirrored_weights if init == "mirrored" else paper_weights
    sets = [draw(head_dim, proj_dim, *hidden_dims) for _ in range(num_heads or 1)]
    return sets[0] if num_heads is None else ScorerWeights(*map(torch.stack, zip(*sets, strict=True)))


def paper_weights(head_dim: int, proj_dim: int, first: int, second: int) -> ScorerWeights:
    """The released code's initialisation: `nn.Linear`'s, uniform in +-1/sqrt(fan_in), biases included.

    On unit-normal inputs 28.8 % of such scorers with `proj_dim` 2 have a last hidden layer that is zero for every pair
    ("dead": uniform attention, no gradient, for ever), and the living start almost uniform
    (`recipes/measure_initialization.py`).
    """

    def uniform(*shape: int, fan_in: int) -> torch.Tensor:
        return (torch.rand(shape, **IN_FLOAT32) * 2 - 1) / math.sqrt(fan_in)

    sizes = (head_dim, proj_dim), (head_dim, proj_dim), (2 * proj_dim, first), (first, second), (second, 1)
    return ScorerWeights(
        *(tensor for fan_in, out in sizes for tensor in (uniform(out, fan_in, fan_in=fan_in), uniform(out, fan_in=fan_in)))
    )


def needs_weights(module: nn.Module) -> bool:
    """Whether a module has parameters in memory that `from_pretrained` has not loaded, and will not load or draw later.
    Only then is anything drawn, since that takes time, random numbers of the program, and threads that forked processes would
    miss."""
    parameters = list(module.parameters())
    return not (any(parameter.is_meta for parameter in parameters) or is_left_for_later() or all(map(is_loaded, parameters)))


def is_loaded(parameter: torch.Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def forget_loading(module: nn.Module) -> None:
    """Takes away the mark that parameters keep for ever once they are loaded."""
    for parameter in module.parameters():
        vars(parameter).pop("_is_hf_initialized", None)


def is_left_for_later() -> bool:
    """Whether Transformers makes a model now whose weights it loads or draws afterwards (`no_init_weights`), as it does under
    ZeRO-3. All initialisation of torch does nothing then."""
    return nn.init.zeros_(torch.empty(0)) is None


def mirrored_weights(head_dim: int, proj_dim: int, first: int, second: int) -> ScorerWeights:
    """An initialisation that no draw leaves dead and that starts with scores of standard deviation one.

    - `q_proj`, `k_proj`: orthonormal rows, so that nothing of the input is seen twice.
    - `linear1`: random directions, half of each one's length on the query and half on the key, so that both matter; units
      come in mirrored pairs (`x` and `-x`; an odd one stays alone), so one of each pair is active for every query and key.
    - `linear2`: non-negative, so its units are active wherever a unit of `linear1` is (everywhere, or for half the pairs
      where `hidden_dims[0]` is 1): none is dead, at any `proj_dim`.
    - `linear3`: random, scaled so that scores have standard deviation `INITIAL_SCORE_STD` on unit-normal queries and keys,
      as those of the scaled dot product do. All ReLUs of `linear2` being open, a score is a weighted sum of ReLUs of
      jointly normal numbers, whose variance has a closed form (Cho and Saul 2009, "Kernel methods for deep learning",
      arc-cosine kernel of order 1): no sample is needed.
    - biases: zero. `linear2`'s therefore gets a zero gradient at the very start, as it moves all scores of a row together.
    """
    q_weight, k_weight = (nn.init.orthogonal_(torch.empty(proj_dim, head_dim, **IN_FLOAT32).float()) for _ in range(2))
    halves = torch.randn(2, (first + 1) // 2, proj_dim, **IN_FLOAT32).float()
    halves = halves / halves.norm(dim=-1, keepdim=True) / math.sqrt(2)
    directions = torch.cat(tuple(halves), dim=-1)
    weight1 = torch.stack((directions, -directions), dim=1).flatten(0, 1)[:first]
    weight2 = torch.rand(second, first, **IN_FLOAT32) + 0.1
    weight2 = weight2 / weight2.norm(dim=-1, keepdim=True)
    weight3 = torch.randn(1, second, **IN_FLOAT32).float()
    if first == 1:
        weight3 = weight3.abs()  # avoids that equal units of linear2 cancel

    mixed = torch.cat((weight1[:, :proj_dim] @ q_weight, weight1[:, proj_dim:] @ k_weight), dim=-1)
    coefficients = (weight3 @ weight2).squeeze(0)
    weight3 = weight3 * (INITIAL_SCORE_STD / relu_sum_std(coefficients, mixed @ mixed.T))
    zeros = partial(torch.zeros, **IN_FLOAT32)
    return ScorerWeights(
        q_weight, zeros(proj_dim), k_weight, zeros(proj_dim), weight1, zeros(first), weight2, zeros(second), weight3, zeros(1)
    )  # fmt: skip


def relu_sum_std(coefficients: torch.Tensor, covariance: torch.Tensor) -> float:
    """Standard deviation of `sum_c coefficients[c] * relu(x_c)` for `x` normal with mean zero and this covariance."""
    covariance, coefficients = covariance.double(), coefficients.double()
    deviation = covariance.diagonal().sqrt()
    mean = coefficients @ deviation / math.sqrt(2 * math.pi)
    return (coefficients @ relu_moments(covariance, deviation) @ coefficients - mean**2).sqrt().item()


def relu_sum_spread(coefficients: torch.Tensor, of_query: torch.Tensor, of_key: torch.Tensor) -> float:
    """Root of the mean variance of `sum_c coefficients[c] * relu(u_c + w_c)` for one `u` and many `w`, normal with mean zero
    and these covariances: the spread of scores within rows. Less than the deviation of all scores, since the means of rows
    differ, which a softmax does not see."""
    of_query, of_key, coefficients = of_query.double(), of_key.double(), coefficients.double()
    deviation = (of_query + of_key).diagonal().sqrt()
    # leaves in the second moments of one `u` and two `w` what rows have in common
    within = relu_moments(of_query + of_key, deviation) - relu_moments(of_query, deviation)
    return (coefficients @ within @ coefficients).clamp_min(0.0).sqrt().item()


def relu_moments(covariance: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Second moments of `relu(x_c)` and `relu(y_d)`, for normal numbers with these deviations and covariances of `x_c` and
    `y_d`."""
    scale = deviation[:, None] * deviation
    angle = (covariance / scale).clamp(-1.0, 1.0).acos()
    return scale * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)


class CompactWeights(NamedTuple):
    """What a compact attention module starts with, or is folded to. Biases of the first layer are included."""

    query_weight: torch.Tensor  # [H, h1, d_model]
    query_bias: torch.Tensor  # [H, h1]
    key_weight: torch.Tensor  # [H, h1, d_model]
    key_bias: torch.Tensor  # [H, h1]
    of_pairs: ScorerWeights  # without a first layer


def draw_compact_weights(
    init: str,
    hidden_size: int,
    hidden_dims: tuple[int, int],
    num_heads: int,
    per_head: bool,
    mode: str = "replace",
    of_pairs: ScorerWeights | None = None,
) -> CompactWeights:
    """New weights, in float32 on the CPU: those of one scorer a head that sees hidden states as its queries and keys.

    With `"mirrored"`, scores of all heads start with standard deviation `INITIAL_SCORE_STD` on unit-normal hidden states,
    which is what a LayerNorm hands on. Where the layers that act on pairs are not of the same draw as a head's first layer
    (heads share them, or they are given as `of_pairs`), the first layer is scaled to that.
    """
    drawn = draw_weights(init, hidden_size, hidden_dims[0], (hidden_dims[0], hidden_dims[1] or 1), num_heads)
    if mode == "thin":
        nothing: Any = ScorerWeights(*[None] * len(ScorerWeights._fields))  # type: ignore[arg-type]
        return CompactWeights(*drawn[:4], nothing)  # type: ignore[arg-type]
    query_weight, query_bias = first_layer_of_query(drawn)
    key_weight, key_bias = first_layer_of_key(drawn)
    is_drawn_together = per_head and of_pairs is None
    if of_pairs is None:
        of_pairs = drawn.without_first_layer()
        if not per_head:
            of_pairs = ScorerWeights(*(None if layer is None else layer[0] for layer in of_pairs))  # type: ignore[arg-type]
    if init == "mirrored" and not is_drawn_together:
        coefficients = (of_pairs.weight3 @ of_pairs.weight2).squeeze(-2).expand(num_heads, -1)
        for head in range(num_heads):
            units = torch.cat((query_weight[head], key_weight[head]), dim=-1)
            gain = INITIAL_SCORE_STD / relu_sum_std(coefficients[head], units @ units.T)
            query_weight[head] *= gain
            key_weight[head] *= gain
    return CompactWeights(query_weight, query_bias, key_weight, key_bias, of_pairs)
