"""The network that scores a query against a key, as a module: its weights, their initialisation, its forward."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import initialization

from .configuration_neural_attention import INITIALIZATIONS, MODES
from .neural_attention_blockwise import without_autocast
from .neural_attention_functional import scorer_attention
from .neural_attention_reference import ScorerWeights, expand_heads, key_features


try:
    from accelerate.utils import align_module_device
except ImportError:  # does nothing then, since nothing is offloaded without accelerate
    align_module_device = nullcontext


# Standard deviation of the scores that "mirrored" starts with, on unit-normal queries and keys: what the scaled dot
# product has there
INITIAL_SCORE_STD = 1.0


class PerHeadLinear(nn.Module):
    """`num_heads` linear layers side by side: weight `[H, out, in]`, bias `[H, out]`, inputs `[B, H, ..., in]`."""

    def __init__(self, num_heads: int, in_features: int, out_features: int):
        super().__init__()
        self.num_heads, self.in_features, self.out_features = num_heads, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_heads, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_heads, out_features))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, in_features={self.in_features}, out_features={self.out_features}"


class NeuralScorer(nn.Module):
    """Scores queries against keys with a small feed-forward network and attends by those scores.

    Neural Attention (DiGiugno and Mahmood, arXiv 2502.17206, section 3). With `p = proj_dim`, `h1, h2 = hidden_dims`:

        q' = q_proj(q)                      head_dim -> p
        k' = k_proj(k)                      head_dim -> p
        s  = linear3(relu(linear2(relu(linear1([q'; k'])))))     2p -> h1 -> h2 -> 1

    There is no `1 / sqrt(head_dim)`. Parameters are named as in the authors' code, so `load_state_dict` takes the scorer of
    a model that was trained with it. `linear3.bias` is kept for that reason alone: it moves all scores of a row together,
    which the softmax does not see, so it is frozen.

    Args:
        head_dim (`int`): Size of a query and a key.
        proj_dim (`int`, *optional*): `p`. Default: `max(2, head_dim // 32)`, the paper's.
        hidden_dims (`tuple[int, int]`, *optional*): `h1, h2`. Default: `(p, max(1, p // 2))`, the paper's.
        mode (`str`): `"replace"` scores by the network alone, as the paper does. `"residual"` adds the network's score to
            the scaled dot product and starts, with `linear3` at zero, as exactly that. Default: `"replace"`.
        num_heads (`int`, *optional*): Number of query heads, to give each a set of weights of its own. Default: None, one
            set for all heads, as in the paper.
        init (`str`): `"mirrored"` (see `mirrored_weights`) or `"paper"` (`nn.Linear`'s own, which the released code
            uses). Default: `"mirrored"`.

    Raises:
        ValueError: on a size below one, or an unknown mode or initialisation.
    """

    def __init__(
        self,
        head_dim: int,
        proj_dim: int | None = None,
        hidden_dims: tuple[int, int] | list[int] | None = None,
        mode: str = "replace",
        num_heads: int | None = None,
        init: str = "mirrored",
    ):
        super().__init__()
        proj_dim = max(2, head_dim // 32) if proj_dim is None else proj_dim
        first, second = (proj_dim, max(1, proj_dim // 2)) if hidden_dims is None else hidden_dims
        sizes = {"head_dim": head_dim, "proj_dim": proj_dim, "hidden_dims[0]": first, "hidden_dims[1]": second}
        for name, size in {**sizes, "num_heads": 1 if num_heads is None else num_heads}.items():
            if size < 1:
                raise ValueError(f"`{name}` is {size}; a size must be at least 1.")
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; it must be one of {', '.join(map(repr, MODES))}.")
        if init not in INITIALIZATIONS:
            raise ValueError(f"`init` is {init!r}; it must be one of {', '.join(map(repr, INITIALIZATIONS))}.")
        self.head_dim, self.proj_dim, self.hidden_dims = head_dim, proj_dim, (first, second)
        self.mode, self.num_heads, self.init = mode, num_heads, init

        def layer(in_features: int, out_features: int) -> nn.Linear | PerHeadLinear:
            if num_heads is None:
                return nn.Linear(in_features, out_features)
            return PerHeadLinear(num_heads, in_features, out_features)

        self.q_proj = layer(head_dim, proj_dim)
        self.k_proj = layer(head_dim, proj_dim)
        self.linear1 = layer(2 * proj_dim, first)
        self.linear2 = layer(first, second)
        self.linear3 = layer(second, 1)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, init={self.init!r}"

    @property
    def layers(self) -> tuple[nn.Linear | PerHeadLinear, ...]:
        return self.q_proj, self.k_proj, self.linear1, self.linear2, self.linear3

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights by `self.init`. Weights that `from_pretrained` has just loaded are left as they are."""
        # freezes it here, since `from_pretrained` makes everything trainable, and DDP stops at a parameter without a gradient
        self.linear3.bias.requires_grad_(False)
        if self.linear1.weight.is_meta:
            return
        draw = mirrored_weights if self.init == "mirrored" else paper_weights
        sets = [draw(self.head_dim, self.proj_dim, *self.hidden_dims) for _ in range(self.num_heads or 1)]
        drawn = sets[0] if self.num_heads is None else ScorerWeights(*map(torch.stack, zip(*sets, strict=True)))
        targets = [parameter for layer in self.layers for parameter in (layer.weight, layer.bias)]
        for target, source in zip(targets, drawn, strict=True):
            initialization.copy_(target, source)
        if self.mode == "residual":
            initialization.zeros_(self.linear3.weight)
            initialization.zeros_(self.linear3.bias)

    def weights(self) -> ScorerWeights:
        """The weights as plain tensors. A layer that an adapter or a quantiser has wrapped is asked for what it computes:
        its effective weight is its response to the identity matrix."""
        return ScorerWeights(*(tensor for layer in self.layers for tensor in effective_weights(layer)))

    def project_keys(self, key: torch.Tensor) -> torch.Tensor:
        """What a cache has to keep of keys: their part of the first hidden layer, `hidden_dims[0]` numbers each.

        Args:
            key: `[B, Hkv, Tk, D]`.

        Returns:
            `[B, Hkv, Tk, h1]`, or `[B, H, Tk, h1]` with weights per head, in float32 (float64 for float64 keys), as every
            backend computes it: a rounded one would change scores. Goes into `forward` with `keys_projected=True`.

        Raises:
            ValueError: in `mode="residual"`, whose dot product needs the keys themselves.
        """
        if self.mode == "residual":
            raise ValueError('`mode="residual"` needs whole keys for its dot product; they cannot be projected beforehand.')
        with without_autocast(key):
            weights = self.weights().to(torch.promote_types(key.dtype, torch.float32))
            return key_features(key if self.num_heads is None else expand_heads(key, self.num_heads), weights)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        backend: str | None = None,
        keys_projected: bool = False,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the operation, `scorer_attention`; everything but what follows is as in
        `hf_neural_attention.neural_attention`.

        Args:
            need_weights: also return the attention weights, which only the reference holds; `backend` is then ignored.

        Returns:
            Output `[B, H, Tq, Dv]`, and the attention weights `[B, H, Tq, Tk]` after dropout, or None.
        """
        return scorer_attention(
            query,
            key,
            value,
            self.weights(),
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            mode=self.mode,
            backend=backend,
            keys_projected=keys_projected,
            need_weights=need_weights,
        )


def effective_weights(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[out, in]` and bias `[out]` of a linear layer, plain, per head (leading dimension H), or wrapped."""
    # passes over layers with hooks, since torch's pruning computes the weight in one, before each call
    if type(layer) in (nn.Linear, PerHeadLinear) and not layer._forward_pre_hooks:
        # brings in what accelerate keeps on the CPU or on disk
        with align_module_device(layer) if layer.weight.is_meta else nullcontext():
            return layer.weight, layer.bias
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    stored = base.bias() if callable(base.bias) else base.bias  # calls the method of torch's dynamically quantised layers
    dtype = stored.dtype if stored.is_floating_point() else torch.float32
    inputs = torch.eye(base.in_features, device=stored.device, dtype=dtype)
    bias = layer(torch.zeros_like(inputs[:1]))[0]
    return (layer(inputs) - bias).T.contiguous(), bias


def paper_weights(head_dim: int, proj_dim: int, first: int, second: int) -> ScorerWeights:
    """The released code's initialisation: `nn.Linear`'s, uniform in +-1/sqrt(fan_in), biases included.

    On unit-normal inputs a third of such scorers with `proj_dim` 2 have a last hidden layer that is zero for every pair
    ("dead": uniform attention, no gradient, for ever), and the living start almost uniform
    (`recipes/measure_initialization.py`).
    """

    def uniform(*shape: int, fan_in: int) -> torch.Tensor:
        return (torch.rand(shape) * 2 - 1) / math.sqrt(fan_in)

    sizes = (head_dim, proj_dim), (head_dim, proj_dim), (2 * proj_dim, first), (first, second), (second, 1)
    return ScorerWeights(
        *(tensor for fan_in, out in sizes for tensor in (uniform(out, fan_in, fan_in=fan_in), uniform(out, fan_in=fan_in)))
    )


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
    # overrides torch's defaults, since it has no QR decomposition in half precision, nor float64 on every device
    where: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    q_weight, k_weight = (nn.init.orthogonal_(torch.empty(proj_dim, head_dim, **where)) for _ in range(2))
    halves = torch.randn(2, (first + 1) // 2, proj_dim, **where)
    halves = halves / halves.norm(dim=-1, keepdim=True) / math.sqrt(2)
    directions = torch.cat(tuple(halves), dim=-1)
    weight1 = torch.stack((directions, -directions), dim=1).flatten(0, 1)[:first]
    weight2 = torch.rand(second, first, **where) + 0.1
    weight2 = weight2 / weight2.norm(dim=-1, keepdim=True)
    weight3 = torch.randn(1, second, **where)
    if first == 1:
        weight3 = weight3.abs()  # avoids that equal units of linear2 cancel

    mixed = torch.cat((weight1[:, :proj_dim] @ q_weight, weight1[:, proj_dim:] @ k_weight), dim=-1)
    coefficients = (weight3 @ weight2).squeeze(0)
    weight3 = weight3 * (INITIAL_SCORE_STD / relu_sum_std(coefficients, mixed @ mixed.T))
    zeros = torch.zeros
    return ScorerWeights(
        q_weight, zeros(proj_dim), k_weight, zeros(proj_dim), weight1, zeros(first), weight2, zeros(second), weight3, zeros(1)
    )  # fmt: skip


def relu_sum_std(coefficients: torch.Tensor, covariance: torch.Tensor) -> float:
    """Standard deviation of `sum_c coefficients[c] * relu(x_c)` for `x` normal with mean zero and this covariance."""
    covariance, coefficients = covariance.double(), coefficients.double()
    deviation = covariance.diagonal().sqrt()
    scale = deviation[:, None] * deviation
    angle = (covariance / scale).clamp(-1.0, 1.0).acos()
    second_moment = scale * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    mean = coefficients @ deviation / math.sqrt(2 * math.pi)
    return (coefficients @ second_moment @ coefficients - mean**2).sqrt().item()
