"""Loading draws no weights that the checkpoint has: it takes time, moves random numbers, and starts threads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_neural_attention.models import neural_attention_compact, neural_attention_scorer
from tests.helpers.neural_models import Family, all_variants, both_families


@pytest.fixture
def draws(monkeypatch) -> list[Any]:
    """What has been drawn: one entry a scorer."""
    found: list[Any] = []
    for module, name in ((neural_attention_scorer, "draw_weights"), (neural_attention_compact, "draw_compact_weights")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, original=original: found.append(args) or original(*args))
    return found


@both_families
@all_variants
def test_loading_draws_only_what_is_missing(family: Family, fields: dict, draws: list[Any], tmp_path: Path):
    model = family.neural(**fields)
    model.save_pretrained(tmp_path)
    assert draws
    draws.clear()
    before = torch.get_rng_state()
    loaded = type(model).from_pretrained(tmp_path)
    assert not draws and torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in loaded.named_parameters() if name.endswith("linear3.bias")}


@both_families
def test_missing_scorers_are_drawn(family: Family, draws: list[Any], tmp_path: Path):
    family.neural(neural_layers=[0]).save_pretrained(tmp_path)
    draws.clear()
    family.neural_class().from_pretrained(tmp_path, neural_layers=[0, 2])
    assert len(draws) == 1
