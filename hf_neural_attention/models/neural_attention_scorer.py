"""The network that scores a query against a key, as a module: its weights and its forward."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import initialization

from .configuration_neural_attention import INITIALIZATIONS, MODES, HiddenDims, resolve_sizes
from .neural_attention_blockwise import without_autocast
from .neural_attention_functional import scorer_attention
from .neural_attention_initialization import draw_weights, forget_loading, is_loaded, needs_weights
from .neural_attention_parallel import weights_of_share
from .neural_attention_reference import ScorerWeights, expand_heads, key_features, query_features
from .neural_attention_zero3 import bring_in, check_together, gathered, is_hook_of_deepspeed, is_run_by_deepspeed


try:
    from accelerate.utils import align_module_device
except ImportError:  # does nothing then, since nothing is offloaded without accelerate
    align_module_device = nullcontext


class PerHeadLinear(nn.Module):
    """`num_heads` linear layers side by side: weight `[H, out, in]`, bias `[H, out]`."""

    def __init__(self, num_heads: int, in_features: int, out_features: int):
        super().__init__()
        self.num_heads, self.in_features, self.out_features = num_heads, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_heads, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_heads, out_features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., H, T, in]` to `[..., H, T, out]`; only called for layers something has changed (`effective_weights`)."""
        return inputs @ self.weight.mT + self.bias[:, None]

    def __str__(self) -> str:
        # goes into peft's error about a target that it has no adapter for, as such layers are by their names
        return (
            f"{self!r} (a layer per head inside a scorer of Neural Attention: `exclude_modules=r'.*\\.scorer\\..*'` leaves "
            'these out, `modules_to_save=["scorer"]` trains scorers whole)'
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, in_features={self.in_features}, out_features={self.out_features}"


class Scorer(nn.Module):
    """What scorers have in common: they attend by what their network says of pairs."""

    # follow the fields of `ScorerWeights` in pairs of weight and bias; None where the network has no such layer
    layers: tuple[Any, ...]
    linear3: Any  # the last layer; None in mode "thin"
    mode: str
    num_heads: int | None  # None: all heads share one set of weights
    hidden_dims: tuple[int, int]
    head_dim: int  # size of the queries and keys that it takes
    mesh_of_heads: Any = None  # the processes that share the heads, if there are any (see `share_heads`)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights by `self.init`, for all heads."""
        forget_loading(self)
        self.fill()

    def fill(self) -> None:
        """Draws weights where `from_pretrained` has loaded none."""
        raise NotImplementedError

    def write_weights(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sets weights and biases of the layers that it has, in their order, but for those that are loaded already. Under
        ZeRO-3, where all parameters are apart, all processes must do so."""
        targets = [parameter for layer in self.layers if layer is not None for parameter in (layer.weight, layer.bias)]
        with gathered(target for target in targets if not is_loaded(target)):
            for target, source in zip(targets, tensors, strict=True):
                initialization.copy_(target, source)

    def freeze_idle(self) -> None:
        """Freezes the bias of the last layer, which has no effect; loading makes everything trainable, and so thaws it."""
        if self.linear3 is not None:
            self.linear3.bias.requires_grad_(False)

    def weights(self) -> ScorerWeights:
        """The weights as plain tensors. A layer that an adapter or a quantiser has wrapped is asked for what it computes:
        its effective weight is its response to the identity matrix."""
        if is_run_by_deepspeed(self):
            bring_in(self)
        pairs = ((None, None) if layer is None else effective_weights(layer) for layer in self.layers)
        weights = ScorerWeights(*(tensor for pair in pairs for tensor in pair))  # type: ignore[arg-type]
        return weights if self.mesh_of_heads is None else weights_of_share(weights, self.mesh_of_heads)

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
        sinks: torch.Tensor | None = None,
        softcap: float | None = None,
        keys_projected: bool = False,
        queries_projected: bool = False,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the operation, `scorer_attention`; everything but what follows is as in
        `hf_neural_attention.neural_attention`.

        Args:
            need_weights: also return the attention weights, which only the reference holds; `backend` is then ignored.

        Returns:
            Output `[B, H, Tq, Dv]`, and the attention weights `[B, H, Tq, Tk]` after dropout, or None.
        """
        check_parts(self, query, key)
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
            sinks=sinks,
            softcap=softcap,
            keys_projected=keys_projected,
            queries_projected=queries_projected,
            need_weights=need_weights,
        )


def linear_layer(num_heads: int | None, in_features: int, out_features: int) -> nn.Linear | PerHeadLinear:
    if num_heads is None:
        return nn.Linear(in_features, out_features)
    return PerHeadLinear(num_heads, in_features, out_features)


def check_choices(sizes: dict[str, int], mode: str, init: str) -> None:
    """Raises a ValueError that names what is wrong."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` is {size}; a size must be at least 1.")
    if mode not in MODES:
        raise ValueError(f"`mode` is {mode!r}; it must be one of {', '.join(map(repr, MODES))}.")
    if init not in INITIALIZATIONS:
        raise ValueError(f"`init` is {init!r}; it must be one of {', '.join(map(repr, INITIALIZATIONS))}.")


class NeuralScorer(Scorer):
    """Scores queries against keys with a small feed-forward network and attends by those scores.

    Neural Attention (DiGiugno and Mahmood, arXiv 2502.17206, section 3). With `p = proj_dim`, `h1, h2 = hidden_dims`:

        q' = q_proj(q)                      head_dim -> p
        k' = k_proj(k)                      head_dim -> p
        s  = linear3(relu(linear2(relu(linear1([q'; k'])))))     2p -> h1 -> h2 -> 1

    There is no `1 / sqrt(head_dim)`. Parameters are named as in the authors' code, so `load_state_dict` takes the scorer of
    a model that was trained with it. `linear3.bias` is kept for that reason alone: it moves all scores of a row together,
    which the softmax does not see, so it is frozen. Only beside attention sinks it counts, which learn the same.

    Args:
        head_dim (`int`): Size of a query and a key.
        proj_dim (`int`, *optional*): `p`. Default: `max(2, head_dim // 32)`, the paper's.
        hidden_dims (`tuple[int, int]`, `"auto"` or `"paper"`): `h1, h2`, or a rule for them: "paper" is
            `(p, max(1, p // 2))`, and "auto" is `(p, 2)` if `p` is 8 or more, which costs less and is worth as much
            (docs/evidence/images.md), and the paper's else. None is "paper". Default: "auto".
        mode (`str`): `"replace"` scores by the network alone, as the paper does. `"residual"` adds the network's score to
            the scaled dot product and starts, with `linear3` at zero, as exactly that. `"thin"` has no network: it scores by
            `q' . k' / sqrt(p)`, the dot product of what the network would see, and has `q_proj` and `k_proj` alone.
            Default: `"replace"`.
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
        hidden_dims: HiddenDims = "auto",
        mode: str = "replace",
        num_heads: int | None = None,
        init: str = "mirrored",
    ):
        super().__init__()
        proj_dim, (first, second) = resolve_sizes(head_dim, proj_dim, hidden_dims, mode)
        sizes = {"head_dim": head_dim, "proj_dim": proj_dim}
        if mode != "thin":
            sizes |= {"hidden_dims[0]": first, "hidden_dims[1]": second}
        check_choices(sizes | {"num_heads": 1 if num_heads is None else num_heads}, mode, init)
        self.head_dim, self.proj_dim, self.hidden_dims = head_dim, proj_dim, (first, second)
        self.mode, self.num_heads, self.init = mode, num_heads, init
        self.linear1: Any
        self.linear2: Any

        self.q_proj = linear_layer(num_heads, head_dim, proj_dim)
        self.k_proj = linear_layer(num_heads, head_dim, proj_dim)
        has_network = mode != "thin"
        self.linear1 = linear_layer(num_heads, 2 * proj_dim, first) if has_network else None
        self.linear2 = linear_layer(num_heads, first, second) if has_network else None
        self.linear3 = linear_layer(num_heads, second, 1) if has_network else None
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, init={self.init!r}"

    @property
    def layers(self) -> tuple[nn.Linear | PerHeadLinear | None, ...]:  # type: ignore[override]
        return self.q_proj, self.k_proj, self.linear1, self.linear2, self.linear3

    @torch.no_grad()
    def fill(self) -> None:
        # freezes it here, since `from_pretrained` makes everything trainable, and DDP stops at a parameter without a gradient
        self.freeze_idle()
        if not needs_weights(self):
            return
        first, second = self.hidden_dims
        drawn: Any = draw_weights(self.init, self.head_dim, self.proj_dim, (first, second or 1), self.num_heads)
        if self.mode == "residual":
            drawn = (*drawn[:-2], *map(torch.zeros_like, drawn[-2:]))
        self.write_weights(drawn if self.linear3 is not None else drawn[:4])

    def project_queries(self, query: torch.Tensor) -> torch.Tensor:
        """The part of queries in the first hidden layer, its bias included.

        Args:
            query: `[B, H, Tq, D]`.

        Returns:
            `[B, H, Tq, h1]` in float32 (float64 for float64 queries). Goes into `forward` with `queries_projected=True`.

        Raises:
            ValueError: in `mode="residual"`, whose dot product needs the queries themselves.
        """
        if self.mode == "residual":
            raise ValueError('`mode="residual"` needs whole queries for its dot product; they cannot be projected beforehand.')
        with without_autocast(query):
            return query_features(query, self.weights().to(torch.promote_types(query.dtype, torch.float32)))

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
            return key_features(key if weights.num_heads is None else expand_heads(key, weights.num_heads), weights)


class CompactScorer(Scorer):
    """The layers of a scorer that act on pairs, for attention modules that project hidden states straight to its first layer.

    In mode `"replace"`, and where nothing happens to queries and keys between their projection and the scorer, both steps are
    linear: `u = A (W_Q x + b_Q) + a` and `w = C (W_K x + b_K) + c` are projections of the hidden state `x` to `h1` numbers a
    head, which take the place of queries and keys (`CompactAttentionMixin`). With `h1, h2 = hidden_dims`:

        s = linear3(relu(linear2(relu(u + w))))     h1 -> h2 -> 1

    Args:
        hidden_dims (`tuple[int, int]`): `h1, h2`.
        num_heads (`int`, *optional*): Number of query heads, to give each weights of its own. Default: None, one set for all.
        init (`str`): `"mirrored"` or `"paper"`, as of `NeuralScorer`. Default: `"mirrored"`.
        mode (`str`): `"replace"`, or `"thin"`: `s = u . w / sqrt(h1)`, without any weights; `h2` is then 0. Default:
            `"replace"`.

    Raises:
        ValueError: on a size below one, or an unknown mode or initialisation.
    """

    def __init__(
        self,
        hidden_dims: tuple[int, int] | list[int],
        num_heads: int | None = None,
        init: str = "mirrored",
        mode: str = "replace",
    ):
        super().__init__()
        first, second = hidden_dims
        if mode == "residual":
            raise ValueError(
                '`mode` is "residual", whose dot product needs whole queries and keys; a compact scorer has none.'
            )
        sizes = {"hidden_dims[0]": first, "num_heads": 1 if num_heads is None else num_heads}
        if mode == "thin":
            resolve_sizes(first, first, (first, second), mode)
        else:
            sizes["hidden_dims[1]"] = second
        check_choices(sizes, mode, init)
        self.head_dim, self.hidden_dims, self.num_heads, self.init, self.mode = first, (first, second), num_heads, init, mode
        self.linear2 = None if mode == "thin" else linear_layer(num_heads, first, second)
        self.linear3 = None if mode == "thin" else linear_layer(num_heads, second, 1)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, init={self.init!r}"

    @property
    def layers(self) -> tuple[nn.Linear | PerHeadLinear | None, ...]:  # type: ignore[override]
        return None, None, None, self.linear2, self.linear3

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights by `self.init`, for all heads. They do not know of the first layer, which is not here:
        `CompactAttentionMixin.reset_parameters` draws both, so that scores spread by one."""
        super().reset_parameters()

    @torch.no_grad()
    def fill(self, drawn: ScorerWeights | None = None) -> None:
        """Sets weights that `from_pretrained` has not loaded to these, or to new ones."""
        self.freeze_idle()
        if self.linear2 is None or self.linear3 is None or not needs_weights(self):
            return
        if drawn is None:
            drawn = self.draw()
        self.write_weights(drawn[6:])

    def draw(self) -> ScorerWeights:
        return draw_weights(self.init, self.hidden_dims[0], self.hidden_dims[0], self.hidden_dims, self.num_heads)

    def draw_ahead(self) -> None:
        """Draws weights, and keeps a copy for the attention module around, whose first layer shall fit them. Under ZeRO-3 that
        module cannot draw both, since Transformers brings in what it has itself, and its children, and no more."""
        if self.linear2 is not None:
            self.drawn_ahead = self.draw()
            self.fill(self.drawn_ahead)


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor around others that its own linear layer knows to read, as torchao makes them. A DTensor,
    which any operator takes, is none."""
    return hasattr(type(weight), "__tensor_flatten__") and not hasattr(type(weight), "full_tensor")


def is_compact(scorer: Any) -> bool:
    """Whether a scorer is one without a first layer, as a `CompactScorer` is. Asks what it has, not its class, since every
    model from the Hub that brings its code has classes of its own."""
    return hasattr(scorer, "linear3") and not hasattr(scorer, "linear1")


def check_parts(scorer: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises a ValueError if a compact scorer of mode "thin", which has no weights to tell its size, gets parts of another."""
    size = scorer.hidden_dims[0]
    if scorer.mode == "thin" and is_compact(scorer) and (query.shape[-1], key.shape[-1]) != (size, size):
        raise ValueError(
            f"`query` and `key` have sizes {query.shape[-1]} and {key.shape[-1]}; this compact scorer expects both projected, "
            f"to {size} numbers a head."
        )


LARGE = 64.0  # a power of two, which multiplies without rounding


def effective_weights(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[out, in]` and bias `[out]` of a linear layer (`[H, ...]` per head) that is plain, quantised or wrapped."""
    # passes over layers with hooks of others, since torch's pruning computes the weight in one, before each call
    hooks = layer._forward_pre_hooks
    if type(layer) in (nn.Linear, PerHeadLinear) and (not hooks or all(map(is_hook_of_deepspeed, hooks.values()))):
        if not is_quantised(layer.weight):
            check_together(layer)
            # brings in what accelerate keeps on the CPU or on disk
            with align_module_device(layer) if layer.weight.is_meta else nullcontext():
                return layer.weight, layer.bias
        if type(layer.weight).dequantize is not torch.Tensor.dequantize:
            # takes NaN for zero, since float8 divides a row of zeros by its largest number: `linear3` of a new residual scorer
            return layer.weight.dequantize().nan_to_num(), layer.bias
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    stored = base.bias() if callable(base.bias) else base.bias  # calls the method of torch's dynamically quantised layers
    dtype = stored.dtype if stored.is_floating_point() else torch.float32
    # makes the weight's share large beside the bias, since a layer in half precision rounds their sum
    inputs = LARGE * torch.eye(base.in_features, device=stored.device, dtype=dtype)
    if stored.dim() > 1:
        inputs = inputs.expand(len(stored), -1, -1)
    with without_autocast(stored):  # keeps the difference from being one of rounded numbers
        bias = layer(torch.zeros_like(inputs[..., :1, :]))
        return ((layer(inputs) - bias) / LARGE).mT.contiguous(), bias.squeeze(-2)
