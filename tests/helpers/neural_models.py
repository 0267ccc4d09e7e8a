"""Tiny neural models of both families, and the stock models that they are held against."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_neural_attention
from hf_neural_attention import patch
from hf_neural_attention.models.modeling_neural_attention import fold_own_model
from hf_neural_attention.models.neural_attention_scorer import Scorer


# Draws weights of standard deviation 0.2 instead of 0.02, so that attention shows in the logits of such tiny models
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
ALL = {"neural_layers": "all", "neural_proj_dim": 4}
COMPACT = {"neural_compact": True, "neural_hidden_dims": [4, 2]}
LAYERS = {
    "one layer": {"neural_layers": [0]},
    "all layers": {"neural_layers": "all"},
    "one compact layer": {"neural_layers": [0], **COMPACT},
    "all layers compact": {"neural_layers": "all", **COMPACT},
}
WHOLE = ("one layer", "all layers")
COMPACT_LAYERS = ("one compact layer", "all layers compact")
VARIANTS = {
    **LAYERS,
    "residual": {"neural_layers": "all", "neural_mode": "residual"},
    "per head": {"neural_layers": "all", "neural_per_head": True, "neural_proj_dim": 4},
    "compact per head": {"neural_layers": "all", "neural_per_head": True, **COMPACT},
    "thin": {**ALL, "neural_mode": "thin"},
    "thin per head": {**ALL, "neural_mode": "thin", "neural_per_head": True},
    "compact thin": {**ALL, "neural_mode": "thin", "neural_compact": True},
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
        """A neural model with the stock model's weights, its scorers as they are born; compact, it is folded from that."""
        if neural_fields.pop("neural_compact", False):
            model = self.twin(stock, **neural_fields)
            fold_own_model(model)
            return model
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
# leaves out compact layers, for what is said of a stock model's queries and keys
one_and_all_whole_layers = pytest.mark.parametrize("fields", [LAYERS[name] for name in WHOLE], ids=WHOLE)
one_and_all_compact_layers = pytest.mark.parametrize("fields", [LAYERS[name] for name in COMPACT_LAYERS], ids=COMPACT_LAYERS)
all_variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
whole_and_compact = pytest.mark.parametrize("fields", (ALL, {**ALL, "neural_compact": True}), ids=("whole", "compact"))
eager_and_sdpa = pytest.mark.parametrize("implementation", ("eager", "sdpa"))


def planned_layers(model: nn.Module, layers: Any, **settings) -> list[str]:
    """The names of those that `patch` would take."""
    return [layer.layer for layer in patch(model, layers, dry_run=True, **settings).layers]


def scorers(model: nn.Module) -> list[Scorer]:
    return [module for module in model.modules() if isinstance(module, Scorer)]


@torch.no_grad()
def liven(model: Any) -> Any:
    """Gives the scorers of residual mode, which start as the plain dot product, something to say."""
    for scorer in scorers(model):
        if scorer.mode == "residual":
            scorer.linear3.weight.normal_()
    return model
