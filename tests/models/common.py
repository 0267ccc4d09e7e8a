"""What the tests of the models share: tiny models of both families, the stock models that they are held against, and
how numbers are compared."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_neural_attention
from hf_neural_attention import NeuralScorer


# Weights of standard deviation 0.2 instead of 0.02: attention then shows in the logits of such tiny models
GPT2_FIELDS = {
    "vocab_size": 99,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 98,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "summary_first_dropout": 0.0,
}
VIT_FIELDS = {
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 5,
    "initializer_range": 0.2,
}
LAYERS = {"one layer": {"neural_layers": [0]}, "all layers": {"neural_layers": "all"}}
VARIANTS = {
    **LAYERS,
    "residual": {"neural_layers": "all", "neural_mode": "residual"},
    "per head": {"neural_layers": "all", "neural_per_head": True, "neural_proj_dim": 4},
}


@dataclass(frozen=True)
class Family:
    """A model family: its names, and tiny models of it."""

    stem: str
    base: str  # the stock class without a head
    heads: tuple[str, ...]
    fields: dict
    attention_name: str  # of an attention module, under its layer

    def config(self, **fields) -> Any:
        return getattr(hf_neural_attention, f"Neural{self.stem}Config")(**{**self.fields, **fields})

    def stock_config(self, **fields) -> Any:
        return getattr(transformers, f"{self.stem}Config")(**{**self.fields, **fields})

    def neural_class(self, head: str | None = None) -> Any:
        return getattr(hf_neural_attention, f"Neural{head or self.heads[0]}")

    def stock_class(self, head: str | None = None) -> Any:
        return getattr(transformers, head or self.heads[0])

    def neural(self, head: str | None = None, **fields) -> Any:
        """A neural model in evaluation mode; in residual mode its scorers are moved off their neutral start."""
        return liven(self.neural_class(head)(self.config(**fields))).eval()

    def stock(self, head: str | None = None, **fields) -> Any:
        return self.stock_class(head)(self.stock_config(**fields)).eval()

    def twin(self, stock: Any, **neural_fields) -> Any:
        """A neural model with the stock model's weights, its scorers as they are born."""
        config_class = getattr(hf_neural_attention, f"Neural{self.stem}Config")
        config = config_class(**{**stock.config.to_diff_dict(), **neural_fields})
        config._attn_implementation = stock.config._attn_implementation
        model = self.neural_class(type(stock).__name__)(config)
        keys = model.load_state_dict(stock.state_dict(), strict=False)
        assert not keys.unexpected_keys and all(".scorer." in key for key in keys.missing_keys), keys
        return model.train(stock.training)

    def inputs(self, batch: int = 2, labels: bool = True) -> dict[str, torch.Tensor]:
        """Random inputs, with labels that fit the first head."""
        if self.stem == "GPT2":
            ids = torch.randint(3, 98, (batch, 12))
            return {"input_ids": ids, **({"labels": ids} if labels else {})}
        pixels = torch.randn(batch, 3, 16, 16)
        return {"pixel_values": pixels, **({"labels": torch.randint(5, (batch,))} if labels else {})}


GPT2 = Family(
    "GPT2",
    "GPT2Model",
    (
        "GPT2LMHeadModel",
        "GPT2DoubleHeadsModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
    ),
    GPT2_FIELDS,
    "attn",
)
VIT = Family("ViT", "ViTModel", ("ViTForImageClassification", "ViTForMaskedImageModeling"), VIT_FIELDS, "attention")

both_families = pytest.mark.parametrize("family", (GPT2, VIT), ids=lambda family: family.stem)
every_model = pytest.mark.parametrize(
    ("family", "head"),
    [(family, head) for family in (GPT2, VIT) for head in (family.base, *family.heads)],
    ids=lambda value: value if isinstance(value, str) else "",
)
one_and_all_layers = pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS.keys())
all_variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
eager_and_sdpa = pytest.mark.parametrize("implementation", ("eager", "sdpa"))


def scorers(model: nn.Module) -> list[NeuralScorer]:
    return [module for module in model.modules() if isinstance(module, NeuralScorer)]


@torch.no_grad()
def liven(model: Any) -> Any:
    """Gives the scorers of residual mode, which start as the plain dot product, something to say."""
    for scorer in scorers(model):
        if scorer.mode == "residual":
            scorer.linear3.weight.normal_()
    return model


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
    return main_output(model(**inputs))


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
        assert actual_state[name].dtype == tensor.dtype and torch.equal(actual_state[name], tensor), name


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
