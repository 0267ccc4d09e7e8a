"""Loading draws no weights that the checkpoint has: it takes time, moves random numbers, and starts threads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_neural_attention import from_pretrained, patch
from hf_neural_attention.models import neural_attention_compact, neural_attention_scorer
from tests.helpers.neural_models import Family, all_variants, both_families
from tests.helpers.running import run_in
from tests.helpers.stock_models import FAMILIES


FORKING = """
import os, signal, sys, torch
torch.set_num_threads(2)
from hf_neural_attention import from_pretrained
model = from_pretrained(sys.argv[1])
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends it where it waits for threads that it does not have
    model(torch.arange(9)[None])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


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


@pytest.mark.parametrize("per_head", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_patched_models_draw_nothing_and_may_fork(per_head: bool, draws: list[Any], tmp_path: Path):
    patch(FAMILIES["llama"].model(), "all", proj_dim=16, per_head=per_head).save_pretrained(tmp_path)
    draws.clear()
    before = torch.get_rng_state()
    from_pretrained(tmp_path)
    assert not draws and torch.equal(torch.get_rng_state(), before)
    script = tmp_path / "forking.py"
    script.write_text(FORKING)
    run_in(tmp_path, script, tmp_path)
