"""Kernels as `torch.library` operators: one for forward and one for backward, with their shapes for tracing and autograd.

Operators take flat arguments, so that compiled graphs hold tensors and nothing else. Their one list is the fields of a
NamedTuple: schemas are made of it, and all functions around the operators take it whole and go by names.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch


# Gives each copy of this file, from several models on the Hub, its own operators, as one name would void the first's
NAMESPACE = "hf_neural_attention" if __name__.startswith("hf_neural_attention.") else __name__.replace(".", "_")

Tensors = dict[str, torch.Tensor]


class Operators(NamedTuple):
    # maps (fields) to output, statistics
    forward: Any
    # maps (grad_output, output, statistics, mask_needs_grad, fields) to a gradient per differentiable field; empty: not wanted
    backward: Any


def gradient_of_sinks(weight: torch.Tensor, grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Gradient `[H]` of the logits of keys without value: that of a softmax, whose product with the value is zero.

    Args:
        weight: their share of each row, `[B, H, Tq]`.
        grad_output, output: `[B, H, Tq, Dv]`.
    """
    along = (grad_output.to(weight.dtype) * output.to(weight.dtype)).sum(-1)
    return -(weight * along).sum((0, 2))


def schema_of(parameters: dict[str, Any], returns: Any) -> str:
    """As `torch.library` infers it from a function with these parameters, annotated so."""

    def prototype(*arguments): ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    prototype.__signature__ = inspect.Signature(listed, return_annotation=returns)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=())


def define_operators(
    name: str,
    arguments_type: type,
    *,
    allocate_outputs: Callable[[Any], tuple[torch.Tensor, torch.Tensor]],
    run_forward: Callable[[Any, torch.Tensor, torch.Tensor], None],
    allocate_gradient: Callable[[str, torch.Tensor], torch.Tensor],
    run_backward: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, Tensors], None],
    device_types: str | None = None,
    saves_output: bool = True,
) -> Operators:
    """Registers the operators `{name}_forward` and `{name}_backward`, and the autograd of the first by the second.

    Args:
        arguments_type: a NamedTuple whose fields, annotated with types that an operator takes, are the arguments of a call.
            Tensors but for `dropout_seed` are differentiable, `attn_mask` where its gradient is wanted.
        allocate_outputs: function(arguments) -> output and statistics, what backward must know of each softmax.
        run_forward: function(arguments, output, statistics), which fills both.
        allocate_gradient: function(name, tensor) -> memory for the gradient of a field.
        run_backward: function(arguments, grad_output, output, statistics, gradients), which fills the gradients, by field;
            fields that are None have none, nor has a mask whose gradient nobody wants.
        device_types: kinds of devices that it is for; None: all.
        saves_output: whether backward needs the output. If not, it gets an empty tensor.
    """
    fields = get_type_hints(arguments_type)
    tensors = [field for field, kind in fields.items() if kind in (torch.Tensor, torch.Tensor | None)]
    differentiable = [field for field in tensors if field != "dropout_seed"]
    mask_place = list(fields).index("attn_mask")

    def wanted(arguments: Any, mask_needs_grad: bool) -> list[str]:
        present = [field for field in differentiable if getattr(arguments, field) is not None]
        return [field for field in present if field != "attn_mask" or mask_needs_grad]

    def allocate_gradients(arguments: Any, mask_needs_grad: bool) -> Tensors:
        names = wanted(arguments, mask_needs_grad)
        return {field: allocate_gradient(field, getattr(arguments, field)) for field in names}

    def in_order(gradients: Tensors, grad_output: torch.Tensor) -> list[torch.Tensor]:
        return [gradients[field] if field in gradients else grad_output.new_empty(0) for field in differentiable]

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}_forward",
        mutates_args=(),
        device_types=device_types,
        schema=schema_of(fields, tuple[torch.Tensor, torch.Tensor]),
    )
    def forward(*inputs):
        arguments = arguments_type(*inputs)
        output, statistics = allocate_outputs(arguments)
        run_forward(arguments, output, statistics)
        return output, statistics

    @forward.register_fake
    def _(*inputs):
        return allocate_outputs(arguments_type(*inputs))

    given = {"grad_output": torch.Tensor, "output": torch.Tensor, "statistics": torch.Tensor, "mask_needs_grad": bool}

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        mutates_args=(),
        device_types=device_types,
        schema=schema_of(given | fields, list[torch.Tensor]),
    )
    def backward(grad_output, output, statistics, mask_needs_grad, *inputs):
        arguments = arguments_type(*inputs)
        gradients = allocate_gradients(arguments, mask_needs_grad)
        run_backward(arguments, grad_output, output, statistics, gradients)
        return in_order(gradients, grad_output)

    @backward.register_fake
    def _(grad_output, output, statistics, mask_needs_grad, *inputs):
        return in_order(allocate_gradients(arguments_type(*inputs), mask_needs_grad), grad_output)

    def setup_context(ctx, inputs, output):
        arguments = arguments_type(*inputs)
        ctx.mark_non_differentiable(output[1])
        kept = output if saves_output else (output[0].new_empty(0), output[1])
        ctx.save_for_backward(*kept, *(getattr(arguments, field) for field in tensors))
        ctx.others = arguments._replace(**dict.fromkeys(tensors))

    def differentiate(ctx, grad_output, _):
        output, statistics, *saved = ctx.saved_tensors
        arguments = ctx.others._replace(**dict(zip(tensors, saved, strict=True)))
        mask_needs_grad = arguments.attn_mask is not None and ctx.needs_input_grad[mask_place]
        gradients = backward(grad_output, output, statistics, mask_needs_grad, *arguments)
        found = dict(zip(differentiable, gradients, strict=True))
        asked = wanted(arguments, mask_needs_grad)
        return tuple(found[field] if field in asked else None for field in fields)

    forward.register_autograd(differentiate, setup_context=setup_context)
    return Operators(forward, backward)
