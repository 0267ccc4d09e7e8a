"""The arms of an experiment start from the same weights, wherever they have the same ones."""

import copy

import pytest
import torch

from tests.helpers.neural_models import Family, both_families, whole_and_compact
from training.experiment import share_weights


@both_families
@whole_and_compact
def test_a_neural_arm_takes_all_weights_that_it_shares(family: Family, fields: dict):
    stock, model = family.stock(), family.neural(**fields)
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share_weights(model, copy.deepcopy(stock))
    differing = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, drawn[name])]
    theirs = stock.state_dict()
    whole = [name for name, tensor in theirs.items() if tensor.shape == drawn[name].shape]
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in whole)
    own = "c_attn" if family.stem == "GPT2" else "attention.q_proj"
    narrow = {name for name in theirs if name not in whole}
    assert bool(narrow) == fields.get("neural_compact", False) and all(own in name or "k_proj" in name for name in narrow)
    for name in narrow & {name for name in theirs if "c_attn.weight" in name}:  # ends with the values
        assert torch.equal(model.state_dict()[name][:, -32:], theirs[name][:, -32:])
    assert all(".scorer." in name or name in narrow or drawn[name].unique().numel() == 1 for name in differing)


def test_models_that_share_too_little(monkeypatch):
    from tests.helpers.neural_models import GPT2

    with pytest.raises(RuntimeError, match="share too little"):
        share_weights(GPT2.neural(), GPT2.stock("GPT2Model"))
