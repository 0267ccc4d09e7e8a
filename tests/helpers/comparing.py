"""Runs models, and compares what comes out: outputs, states, gradients, and what Transformers logs."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.helpers.versions import named


def use(model: Any, implementation: str) -> Any:
    """A copy of the model under another attention implementation."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


def main_output(outputs: Any) -> torch.Tensor:
    """The tensor that a model is there for."""
    names = ("logits", "start_logits", "reconstruction", "last_hidden_state")
    return next(outputs[name] for name in names if outputs.get(name) is not None)


@torch.no_grad()
def run(model: Any, **inputs) -> torch.Tensor:
    return main_output(model(**named(inputs)))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Difference at most `tolerance` times the largest expected number, which must not be zero."""
    scale = expected.abs().max().item()
    assert scale > 0 and torch.isfinite(actual).all()
    assert (actual - expected).abs().max().item() <= tolerance * scale


def assert_far(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The inequality beside an equality: without it, a change that does nothing would pass."""
    assert (actual - expected).abs().max().item() > 1e-2 * expected.abs().max().item()


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """Names, dtypes and every bit of all parameters and buffers."""
    actual_state, expected_state = actual.state_dict(), expected.state_dict()
    assert list(actual_state) == list(expected_state)
    for name, tensor in expected_state.items():
        other = actual_state[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        assert ((other == tensor) | ((other != other) & (tensor != tensor))).all(), name  # takes NaN for what it was


def backward(model: Any, **inputs) -> dict[str, torch.Tensor]:
    """Gradients of the loss by parameter name."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Differences at most `tolerance` times each parameter's largest gradient, plus 1e-6 of the largest of all: gradients
    that cancel out (biases that the softmax does not see) are float32's rounding errors of terms of that size."""
    assert actual.keys() == expected.keys()
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max().item() <= tolerance * gradient.abs().max().item() + rounding, name


class LogRecords(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def transformers_log() -> Iterator[list[str]]:
    """What Transformers logs meanwhile (its loggers do not propagate to pytest's caplog)."""
    handler, logger = LogRecords(), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
