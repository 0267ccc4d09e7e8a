"""Tiny models that several processes train together, and the weights that one process ends with.

Scorers start with random weights, biases too: at birth, some gradients are nothing but rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_neural_attention import compact, patch
from tests.helpers.comparing import assert_near
from tests.helpers.neural_models import COMPACT, GPT2, VIT, scorers
from tests.helpers.stock_models import FAMILIES


STEPS, RATE = 3, 0.1
LLAMA, BERT = FAMILIES["llama"], FAMILIES["bert"]  # the heads of this Llama share keys in groups


@dataclass(frozen=True)
class SpreadModel:
    """A model, and the class of its layers, by which FSDP shards it."""

    make: Callable[[], Any]
    layer: str
    takes: str = "text"  # "text" to be continued, or "texts" or "images" to be classified

    def build(self) -> Any:
        torch.manual_seed(0)
        model = self.make().train()
        with torch.no_grad():
            for scorer in scorers(model):
                for parameter in scorer.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """`STEPS` batches of two examples, one for each process."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 98, (STEPS, 2, 12), generator=generator)
        pixels = torch.randn(STEPS, 2, 3, 16, 16, generator=generator)
        labels = ids if self.takes == "text" else torch.randint(5, (STEPS, 2), generator=generator)
        name, inputs = ("pixel_values", pixels) if self.takes == "images" else ("input_ids", ids)
        return [{name: each, "labels": label} for each, label in zip(inputs, labels, strict=True)]

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.batches()[0].items() if name != "labels"}


def patched_llama(**settings: Any) -> Any:
    return patch(LLAMA.model(), "all", proj_dim=4, **settings)


def compact_bert() -> Any:
    """A classifier, since accelerate shards no bias that two modules share, as those of masked language models do."""
    config = BertConfig(**BERT.fields, num_labels=5)
    return compact(patch(BertForSequenceClassification(config), "all", mode="replace", hidden_dims=(3, 2)))


SPREAD_MODELS = {
    "replace": SpreadModel(lambda: patched_llama(mode="replace"), "LlamaDecoderLayer"),
    "residual": SpreadModel(lambda: patched_llama(mode="residual"), "LlamaDecoderLayer"),
    "per head": SpreadModel(lambda: patched_llama(mode="replace", per_head=True), "LlamaDecoderLayer"),
    "compact GPT-2": SpreadModel(lambda: GPT2.neural(neural_layers="all", **COMPACT), "GPT2Block"),
    "compact ViT": SpreadModel(lambda: VIT.neural(neural_layers="all", neural_per_head=True, **COMPACT), "ViTLayer", "images"),
    "compact BERT": SpreadModel(compact_bert, "BertLayer", "texts"),
}


WHOLE = ("replace", "compact GPT-2")  # of those, what is trained from weights that are whole as well

# Sets fields of new models of this package
BORN: dict[str, dict[str, Any]] = {
    "shared": {},
    "per head": {"neural_per_head": True},
    "residual": {"neural_mode": "residual"},
    "paper": {"neural_init": "paper"},
    "compact": {"neural_compact": True},
    "compact per head": {"neural_compact": True, "neural_per_head": True},
    "compact thin": {"neural_compact": True, "neural_mode": "thin"},
}


def share_of(batch: dict[str, torch.Tensor], process: int) -> dict[str, torch.Tensor]:
    return {name: tensor[process : process + 1] for name, tensor in batch.items()}


def train_alone(spread: SpreadModel) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of one process."""
    model, losses = spread.build(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in spread.batches():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def assert_trained(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], born: dict[str, torch.Tensor]) -> None:
    """Weights as one process has them after training, up to rounding, and other ones than before, where it has others."""
    assert ours.keys() == expected.keys() == born.keys()
    for name, tensor in expected.items():
        assert_near(ours[name], tensor, 1e-4) if tensor.any() else None
        learned = (tensor - born[name]).abs().max() > 1e-5
        assert not learned or not torch.equal(ours[name], born[name]), name
        # leaves out biases, of which some move all scores of a row together
        assert learned or name.endswith("bias"), name
