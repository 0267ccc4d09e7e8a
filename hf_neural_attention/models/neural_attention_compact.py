"""The compact form: attention whose queries and keys are the first layer of its scorer.

A scorer sees a query and a key through linear maps to `h1` numbers each. In modes `"replace"` and `"thin"`, and where nothing
happens to queries and keys between their projection and the scorer, hidden states can be projected to these numbers at once:

    u = A (W_Q x + b_Q) + a = (A W_Q) x + (A b_Q + a)        d_model -> H * h1
    w = C (W_K x + b_K) + c = (C W_K) x + (C b_K + c)        d_model -> H * h1

That computes the same function with fewer parameters, and any cache holds `h1` numbers of a key and head. Families have an
attention class of `CompactAttentionMixin` and their stock one.
"""

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import Cache
from transformers.cache_utils import QuantizedLayer, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .neural_attention_initialization import CompactWeights, draw_compact_weights, forget_loading, is_loaded, needs_weights
from .neural_attention_interface import NeuralConfigView, is_neural, neural_modules
from .neural_attention_reference import ScorerWeights, first_layer_of_key, first_layer_of_query, in_float64
from .neural_attention_scorer import CompactScorer, is_compact
from .neural_attention_zero3 import gathered, is_shared_out


# Says where Transformers defines the hooks that record attentions and hidden states
RECORDING_HOOKS = "transformers.utils.output_capturing"


class CompactAttentionMixin:
    """Comes before a stock attention class among the bases of a compact one.

    A class says in `write_first_layer` where its projections are, and in `forward` how it splits what they make. The rest of
    the stock module (values, output projection, dropout) stays.
    """

    config: Any
    scorer: CompactScorer
    hidden_size: int
    num_attention_heads: int
    head_dim: int

    @classmethod
    def stock_class(cls) -> type:
        """The stock attention class whose place it takes."""
        return next(
            parent for parent in cls.__mro__ if issubclass(parent, nn.Module) and not issubclass(parent, CompactAttentionMixin)
        )

    def make_compact(
        self,
        config: Any,
        hidden_dims: tuple[int, int],
        num_heads: int,
        per_head: bool,
        init: str = "mirrored",
        mode: str = "replace",
    ) -> None:
        """Gives the module a scorer, and the view of its config that tells what is neural. The model's initialisation draws
        the weights."""
        self.hidden_size, self.num_attention_heads = config.hidden_size, num_heads
        self.scorer = CompactScorer(hidden_dims, num_heads if per_head else None, init, mode)
        self.config = NeuralConfigView(config)

    @property
    def projection_size(self) -> int:
        """Numbers to which a hidden state is projected as a query, and as a key: `H * h1`."""
        return self.num_attention_heads * self.scorer.hidden_dims[0]

    def write_first_layer(
        self, query_weight: torch.Tensor, query_bias: torch.Tensor, key_weight: torch.Tensor, key_bias: torch.Tensor
    ) -> None:
        """Sets the projections of hidden states: `[H * h1, d_model]` and `[H * h1]`, by `transformers.initialization`."""
        raise NotImplementedError

    def take_stock(self, stock: Any) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
        """Takes over what a stock module has beside queries and keys, and returns weight and bias of the layers that make
        these, as `fold` wants them."""
        raise NotImplementedError

    @torch.no_grad()
    def write_weights(self, weights: CompactWeights) -> None:
        self.write_projections(weights)
        self.scorer.fill(weights.of_pairs)

    @torch.no_grad()
    def write_projections(self, weights: CompactWeights) -> None:
        query_weight, query_bias, key_weight, key_bias, _ = weights
        self.write_first_layer(query_weight.flatten(0, 1), query_bias.flatten(), key_weight.flatten(0, 1), key_bias.flatten())

    def reset_parameters(self) -> None:
        """Draws new weights of what is not stock, which fit each other: the projections to the first layer, and the scorer."""
        forget_loading(self)  # type: ignore[arg-type]
        self.fill()

    def fill(self) -> None:
        """Draws weights of what is not stock where `from_pretrained` has loaded none."""
        ahead = vars(self.scorer).pop("drawn_ahead", None)
        if not needs_weights(self):  # type: ignore[arg-type]
            self.scorer.fill()
            return
        drawn = draw_compact_weights(
            self.scorer.init,
            self.hidden_size,
            self.scorer.hidden_dims,
            self.num_attention_heads,
            self.scorer.num_heads is not None,
            self.scorer.mode,
            ahead,
        )
        if ahead is None:
            self.scorer.fill(drawn.of_pairs)
        others = (child for child in self.children() if child is not self.scorer)  # type: ignore[attr-defined]
        with gathered(each for child in others for each in child.parameters() if not is_loaded(each)):
            self.write_projections(drawn)

    def split_heads(self, states: torch.Tensor, size: int) -> torch.Tensor:
        """`[B, T, H * size]` -> `[B, H, T, size]`."""
        return states.view(*states.shape[:-1], -1, size).transpose(1, 2)

    def update_cache(self, cache: Cache, w: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `w` `[B, H, Tk, h1]` and values to a cache, and returns all that it has of this layer.

        Raises:
            ValueError: if the cache does not take them, with the reason: a quantised one whose `q_group_size` does not divide
                their numbers, or one with the keys of another model in it.
        """
        index: Any = getattr(self, "layer_idx", None)
        make_room(cache, index, w, value)
        try:
            return cache.update(w, value, index)
        except (AssertionError, RuntimeError, ValueError) as error:
            _, num_heads, _, size = w.shape
            numbers = num_heads * size
            layer = layer_of(cache, index)
            held = getattr(layer, "keys", None)
            holds_others = isinstance(held, torch.Tensor) and held.dim() == 4 and held.shape[1::2] != w.shape[1::2]
            if not holds_others and not isinstance(layer, QuantizedLayer):  # out of memory, or of room
                raise
            advice = "Whatever put keys into it (prefix tuning, another model) made whole ones, as the dot product wants them."
            if isinstance(layer, QuantizedLayer):
                fitting = math.gcd(layer.q_group_size, numbers, num_heads * value.shape[-1])
                advice = (
                    f"Give it a `q_group_size` that divides {numbers}, such as {fitting}, so that it takes a prompt of any "
                    f"length: `cache_config={{..., 'q_group_size': {fitting}}}`."
                )
            raise ValueError(
                f"This {type(cache).__name__} does not take the keys of layer {index}, which is compact: {size} numbers for "
                f"each of {num_heads} heads ({error}). {advice}"
            ) from error

    def attend(
        self, u: torch.Tensor, w: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output `[B, Tq, H * Dv]` and attention weights or None, by the attention function that the module's config names."""
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = function(self, u, w, value, attention_mask, **kwargs)
        return output.flatten(-2), weights


def layer_of(cache: Cache, index: int) -> Any:
    """A cache's layer; None where it has not grown as far."""
    return cache.layers[index] if index < len(cache.layers) else None


def make_room(cache: Cache, index: Any, w: torch.Tensor, value: torch.Tensor) -> None:
    """Lets a layer of fixed size have room for a compact layer's keys where it was made, still empty, for those of the config:
    `generate` does so for prompts in chunks, and `torch.export` for all."""
    layer = layer_of(cache, index)
    if not isinstance(layer, StaticLayer) or layer.keys is None or layer.keys.shape[1::2] == w.shape[1::2]:
        return
    if int(layer.cumulative_length) == 0:
        layer.lazy_initialization(w[:, :, :0], value[:, :, :0])


def fold(
    weights: ScorerWeights,
    query: tuple[torch.Tensor, torch.Tensor | None],
    key: tuple[torch.Tensor, torch.Tensor | None],
    num_heads: int,
) -> CompactWeights:
    """A scorer's weights, and the projections of hidden states to its queries and keys, as one projection to its first layer.

    Computes in float64, and returns float64, on the CPU where the device has none: rounded once, to the dtype of the model.

    Args:
        weights: of a `NeuralScorer` of mode `"replace"` or `"thin"`.
        query, key: weight `[H * D, d_model]`, or `[Hkv * D, d_model]` of keys, and bias or None.
        num_heads: `H`.
    """
    weights = weights.in_float64()

    def by_head(layer: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = layer
        weight = in_float64(weight).unflatten(0, (-1, weights.head_dim))
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else in_float64(bias).unflatten(0, (-1, weights.head_dim))
        # gives every query head a key of its own only where it looks at it in a way of its own
        repeats = num_heads // weight.shape[0] if weights.per_head else 1
        return weight.repeat_interleave(repeats, dim=0), bias.repeat_interleave(repeats, dim=0)

    def through(
        matrix: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return matrix @ weight, (matrix @ bias.unsqueeze(-1)).squeeze(-1) + offset

    query_layer = through(*first_layer_of_query(weights), *by_head(query))
    key_layer = through(*first_layer_of_key(weights), *by_head(key))
    return CompactWeights(*query_layer, *key_layer, weights.without_first_layer())


def recording_hooks(module: nn.Module) -> list[Any]:
    """The hooks that Transformers leaves in a model that was once asked for its attentions or hidden states. It makes them
    once, so that whatever takes the module's place needs them too."""
    return [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", "") == RECORDING_HOOKS]


def cannot_unfold(name: Any) -> str:
    """Why a compact checkpoint is not loaded with `neural_compact=False`."""
    return (
        f"{name} is compact, which cannot be undone, and `neural_compact` is False. Leave it out, or load the checkpoint from "
        "before `compact`."
    )


def reason_against_folding(model: nn.Module) -> str | None:
    """Why the neural layers of a model cannot be folded now, or None."""
    neural = neural_modules(model)
    whole = {name: module for name, module in neural.items() if not is_compact(module.scorer)}
    if not whole:
        return "it is compact already" if neural else "it has no neural layer"
    if any(map(is_shared_out, whole.values())):
        return "its weights are shared out among processes (DeepSpeed ZeRO-3); make it compact in one, and save it"
    for name, module in whole.items():
        if module.scorer.mode == "residual":
            return f"the scorer of {name!r} has mode {module.scorer.mode!r}, whose dot product needs whole queries and keys"
        for part_name, part in module.named_modules():
            where = f"{name}.{part_name}".rstrip(".")
            if hasattr(part, "get_base_layer"):
                return f"{where!r} is under an adapter; merge it first (`merge_and_unload`)"
            if getattr(part, "_hf_hook", None) is not None:
                return f"{where!r} is offloaded or dispatched by accelerate; load the model whole"
            if part._forward_pre_hooks or len(part._forward_hooks) > len(recording_hooks(part)):
                return f"{where!r} has forward hooks, which would be lost; remove them first"
            if part._backward_hooks or part._backward_pre_hooks:
                return f"{where!r} has backward hooks, which would be lost; remove them first"
            if "forward" in vars(part):
                return (
                    f"{where!r} has a forward put there by hand, which would be lost; delete it (`del module.forward`) first"
                )
            if is_parametrized(part) and part_name.startswith("scorer."):
                return (
                    f"{where!r} is parametrised (weight norm or the like), which would be lost; remove that first "
                    "(`torch.nn.utils.parametrize.remove_parametrizations`)"
                )
            if inspect.ismethod(getattr(part, "weight", None)):  # is a method in torch's dynamically quantised layers
                return f"{where!r} is a {type(part).__name__} with quantised weights"
        for part_name, parameter in module.named_parameters():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
                return f"'{name}.{part_name}' is a {type(parameter).__name__} of {parameter.dtype}: sharded or quantised"
            if parameter.is_meta:
                return f"'{name}.{part_name}' is on the meta device, without numbers"
    return None


def fold_attention(attention: Any, compact_class: type) -> Any:
    """A compact module that computes what a stock attention module with a scorer computes, up to rounding.
    It takes over what the stock module has beside queries and keys, and leaves that module as it is."""
    scorer = attention.scorer
    arguments = {
        "layer_idx": getattr(attention, "layer_idx", None),
        "hidden_dims": scorer.hidden_dims,
        "per_head": scorer.num_heads is not None,
        "init": scorer.init,
        "mode": scorer.mode,
    }
    with torch.device("meta"):  # draws nothing
        compact = compact_class(attention.config.base, **arguments)
    place_like(compact, attention)
    take_settings(compact, attention)
    query, key = compact.take_stock(attention)
    compact.write_weights(fold(scorer.weights(), query, key, compact.num_attention_heads))
    for module in compact.modules():  # lets `init_weights`, should it run again, leave them
        module._is_hf_initialized = True
    for hook in recording_hooks(attention):
        compact.register_forward_hook(hook)
    # leaves parts alone that both modules have, since somebody may have set one of them by itself
    shared = set(attention.modules())
    for module in compact.modules():
        if module not in shared:
            module.training = attention.training
    return compact


def take_settings(compact: Any, attention: Any) -> None:
    """Sets on a compact module what somebody has set on the stock one by hand, such as `is_causal = False`."""
    stock_class = type(compact).stock_class()
    arguments = {"layer_idx": attention.layer_idx} if "layer_idx" in inspect.signature(stock_class).parameters else {}
    with torch.device("meta"):
        plain = stock_class(attention.config.base, **arguments)
    for name, value in vars(attention).items():
        if isinstance(value, (bool, int, float, str)) and name != "training" and value != vars(plain).get(name):
            setattr(compact, name, value)


def place_like(new: nn.Module, old: nn.Module) -> None:
    """Gives a module on the meta device memory, parameter by parameter: of dtype and device of the one of the same name in
    another module, and trainable where that one is. A bias that the other has not goes with its layer's weight."""
    known = dict(old.named_parameters())
    for name, parameter in list(new.named_parameters()):
        layer, _, leaf = name.rpartition(".")
        like = known[name] if name in known else known[f"{layer}.weight".lstrip(".")]
        made = torch.empty_like(parameter, dtype=like.dtype, device=like.device)
        setattr(new.get_submodule(layer), leaf, nn.Parameter(made, requires_grad=like.requires_grad))


def folded_modules(model: nn.Module, compact_classes: dict[type, type]) -> dict[str, Any]:
    """A compact module for every attention module of these classes that has a whole scorer, by name. The model stays as it is.

    Args:
        compact_classes: a stock attention class -> its compact one.
    """
    made: dict[nn.Module, Any] = {}  # holds one for a module that has several places
    places: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_neural(module) and type(module) in compact_classes:
            if module not in made:
                made[module] = fold_attention(module, compact_classes[type(module)])
            places[name] = made[module]
    return places
