"""Models of stock families on their way to the compact form, and the families and settings that tests of it run over."""

from typing import Any

import pytest
import torch

from hf_neural_attention import patch
from tests.helpers.neural_models import scorers
from tests.helpers.stock_models import FAMILIES, Family


GPT2 = FAMILIES["gpt2"]
FOLDED = ("gpt2", "vit", "bert", "roberta", "distilbert", "t5", "bart", "dinov2")
WITH_CLASSES = ("gpt2", "vit")
SETTINGS = {
    "shared": {"hidden_dims": (4, 2)},
    "per head": {"hidden_dims": (3, 2), "per_head": True},  # fills no whole number of heads
    "paper": {"proj_dim": 5, "init": "paper"},
    "thin": {"mode": "thin", "proj_dim": 4},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
folded_families = pytest.mark.parametrize("family", [FAMILIES[name] for name in FOLDED], ids=FOLDED)


def neural(
    family: Family = GPT2,
    layers: Any = "all",
    dtype: torch.dtype = torch.float32,
    implementation: str = "sdpa",
    **settings,
) -> Any:
    """A patched model whose scorers have learned something, their biases too."""
    torch.manual_seed(0)
    defaults = {} if settings.get("mode") == "thin" else {"hidden_dims": (4, 2)}
    model = patch(family.model(implementation), layers, **({"mode": "replace"} | defaults | settings))
    with torch.no_grad():
        for scorer in scorers(model):
            for parameter in scorer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def inputs_of(family: Family, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in family.inputs().items()}
