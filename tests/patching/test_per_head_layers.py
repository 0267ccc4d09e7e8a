"""Layers with weights per head in the hands of torch's and peft's tools, which know plain linear layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_neural_attention import patch
from hf_neural_attention.models.neural_attention_scorer import PerHeadLinear
from tests.helpers.comparing import assert_far, assert_near, run
from tests.helpers.neural_models import liven, scorers
from tests.helpers.stock_models import FAMILIES


LLAMA = FAMILIES["llama"]


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def doubled(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def double_before(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda layer, inputs: 2 * inputs[0])


def model_per_head() -> Any:
    return liven(patch(LLAMA.model(), "all", mode="replace", per_head=True, proj_dim=4))


def test_they_are_linear_layers_side_by_side():
    layer = PerHeadLinear(3, 4, 2)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    inputs = torch.randn(5, 3, 7, 4)
    for head in range(3):
        expected = nn.functional.linear(inputs[:, head], layer.weight[head], layer.bias[head])
        assert_near(layer(inputs)[:, head], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        doubled,
        double_before,
    ],
    ids=("pruning", "weight norm", "spectral norm", "parametrisation", "forward pre-hook"),
)
def test_what_torch_does_to_weights_is_honoured(change: Callable):
    model, inputs = model_per_head(), LLAMA.inputs()
    for scorer in scorers(model):
        nn.init.normal_(scorer.linear1.bias)
    before = run(model, **inputs)
    for scorer in scorers(model):
        change(scorer.linear1)
    outputs = run(model, **inputs)
    assert_near(outputs, before) if change is parametrizations.weight_norm else assert_far(outputs, before)
    scorer = scorers(model)[0]
    factor = 2 if change is double_before else 1
    assert_near(scorer.weights().weight1, factor * scorer.linear1.weight)
    assert_near(scorer.weights().bias1, scorer.linear1.bias)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(any(each.grad.any() for each in scorer.linear1.parameters()) for scorer in scorers(model))


@pytest.mark.parametrize("method", ("LoRA", "DoRA", "IA3", "AdaLoRA"))
def test_what_peft_has_no_adapter_for_says_what_to_type(method: str):
    import peft

    kinds: dict[str, Callable[..., Any]] = {
        "LoRA": peft.LoraConfig,
        "DoRA": lambda **settings: peft.LoraConfig(use_dora=True, **settings),
        "IA3": peft.IA3Config,
        "AdaLoRA": lambda **settings: peft.AdaLoraConfig(total_step=10, **settings),
    }
    words = r"PerHeadLinear\(.*`exclude_modules=r'\.\*\\\.scorer\\\.\.\*'` leaves these out.*is not supported"
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(model_per_head(), kinds[method](task_type="CAUSAL_LM"))
    model = model_per_head()
    expected = run(model, **LLAMA.inputs())
    settings = {"exclude_modules": r".*\.scorer\..*", "modules_to_save": ["scorer"]}
    adapted = peft.get_peft_model(model, kinds[method](task_type="CAUSAL_LM", **settings))
    assert_near(run(adapted, **LLAMA.inputs()), expected)
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert any(".scorer.modules_to_save.default.linear1.weight" in name for name in trained)


@pytest.mark.filterwarnings("ignore:target_modules")
def test_lora_by_parameters():
    import peft

    model = model_per_head()
    before = run(model, **LLAMA.inputs())
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["scorer.q_proj.weight"])
    )
    assert_near(run(adapted, **LLAMA.inputs()), before)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    changed = run(adapted, **LLAMA.inputs())
    assert_far(changed, before)
    assert_near(run(adapted.merge_and_unload(), **LLAMA.inputs()), changed)


def test_printed_models_stay_short():
    assert "exclude_modules" not in repr(model_per_head())
