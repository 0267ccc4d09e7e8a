"""Attention scores during training: how they spread, whether they are saturated, and whether a gradient reaches them."""

import logging
import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import IntervalStrategy

from hf_neural_attention.analysis import ScoreCallback
from hf_neural_attention.introspection import WRAPPERS, unwrap
from hf_neural_attention.patching.layers import listed


logger = logging.getLogger(__name__)

# Lists what families call the layers that make queries and keys alone
QUERY_AND_KEY_LAYERS = {"q_proj", "k_proj", "query", "key", "q", "k", "q_lin", "k_lin"}

GRADIENT = "gradient"


class WatchScores(ScoreCallback):
    """`ScoreCallback`, and for each layer the norm of the gradient that has reached its query and key weights before clipping
    (`scores/LAYER/gradient`), where layers of their own make queries and keys, or GPT-2's `c_attn`, and where `Trainer` logs
    the norm of the whole gradient, as it does while it clips."""

    def __init__(self, inputs: Any, every: int = 1):
        super().__init__(inputs, every)
        self.shares: dict[str, float] = {}  # layer -> of the norm of the whole gradient, which clipping leaves as it is
        self.step = 0  # that they are of
        self.has_warned = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step + 1
        is_rare = args.logging_strategy == IntervalStrategy.STEPS  # knows of no other strategy which steps are logged
        if is_rare and step > 1 and step % max(1, state.logging_steps):
            return
        self.step = step
        base = unwrap(model)
        whole = norm_of(parameter.grad for parameter in base.parameters() if parameter.grad is not None)
        self.shares = {}
        for name, module in base.named_modules():
            if gradients := query_and_key_gradients(module):
                self.shares[re.sub(WRAPPERS, "", name)] = norm_of(gradients) / whole if whole else 0.0

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        before = set(logs or ())
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)
        layers = {name.split("/")[1] for name in set(logs or ()) - before if name.startswith("scores/")}
        if logs is None or "grad_norm" not in logs or state.global_step != self.step:
            return
        if (without := sorted(layers - self.shares.keys())) and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "No gradient of queries and keys is recorded of %s: no layer there with a usual name (q_proj, query ...) has "
                "one. It may be fused, frozen, sharded, or named otherwise.",
                listed(without),
            )
        figures = {
            f"scores/{name}/{GRADIENT}": share * float(logs["grad_norm"])
            for name, share in self.shares.items()
            if name in layers
        }
        logs.update(figures)
        state.log_history[-1].update(figures)


def query_and_key_gradients(module: nn.Module) -> list[torch.Tensor]:
    """Of the weights that make an attention module's queries and keys; none for other modules."""
    children = dict(module.named_children())
    if "c_attn" in children and hasattr(module, "split_size"):
        fused: Any = children["c_attn"]
        gradient, width = fused.weight.grad, int(module.split_size)  # type: ignore[arg-type]
        if gradient is None:
            return []
        # leaves out the values, which come last
        return [gradient[:, :-width] if isinstance(fused, Conv1D) else gradient[:-width]]
    layers = [child for name, child in children.items() if name in QUERY_AND_KEY_LAYERS]
    weights: list[Any] = [getattr(layer, "weight", None) for layer in layers]
    return [weight.grad for weight in weights if weight is not None and weight.grad is not None]


def norm_of(tensors: Any) -> float:
    norms = [tensor.float().norm() for tensor in tensors]
    return torch.stack(norms).norm().item() if norms else 0.0
