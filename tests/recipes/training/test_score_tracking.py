"""What is recorded of attention scores, and of the gradients that reach them, while a model trains."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_neural_attention import patch
from tests.helpers.neural_models import GPT2
from tests.helpers.stock_models import FAMILIES
from training.score_tracking import WatchScores, query_and_key_gradients


def watched(folder: Any, model: Any, **arguments: Any) -> Trainer:
    ids = torch.randint(3, 98, (8, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"max_steps": 4, "logging_steps": 2, "logging_first_step": True, "per_device_train_batch_size": 4, **arguments}
    given = TrainingArguments(str(folder), report_to="none", use_cpu=True, **settings)
    trainer = Trainer(model, given, train_dataset=rows, callbacks=[WatchScores({"input_ids": ids[:2]})])
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ("gpt2", "llama", "patched llama"))
def test_gradients_of_queries_and_keys(kind: str, tmp_path: Any):
    model: Any = FAMILIES[kind.split()[-1]].model()
    if kind.startswith("patched"):
        patch(model, [0], mode="replace", proj_dim=4)
    layer = FAMILIES[kind.split()[-1]].layers[0]
    history = watched(tmp_path, model).state.log_history
    logged = [entry for entry in history if f"scores/{layer}/spread" in entry]
    assert [entry["step"] for entry in logged][:3] == [1, 2, 4]
    for entry in logged[:3]:
        assert 0 < entry[f"scores/{layer}/gradient"] < entry["grad_norm"]


def test_gradients_are_those_of_the_step_that_is_logged(tmp_path: Any):
    name, found = "scores/transformer.h.0.attn/gradient", []
    for settings in ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, {"logging_steps": 2}):
        torch.manual_seed(0)
        history = watched(tmp_path, GPT2.stock(), logging_first_step=False, **settings).state.log_history
        found.append({entry["step"]: entry[name] for entry in history if name in entry})
    assert found[0].keys() == {2, 4} and found[0] == pytest.approx(found[1])


def test_the_norm_is_that_before_clipping(tmp_path: Any):
    found = []
    for most in (0.01, 1e9):
        torch.manual_seed(0)
        history = watched(tmp_path, GPT2.stock(), max_grad_norm=most, max_steps=1).state.log_history
        found.append(history[0]["scores/transformer.h.0.attn/gradient"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    model = GPT2.stock().train()
    ids = torch.randint(3, 98, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    attention = model.transformer.h[0].attn
    (gradient,) = query_and_key_gradients(attention)
    width = attention.split_size
    assert torch.equal(gradient, attention.c_attn.weight.grad[:, : 2 * width]) and query_and_key_gradients(model) == []


def test_layers_without_such_a_gradient_are_named_once(tmp_path: Any, caplog: Any):
    model: Any = FAMILIES["llama"].model()
    attention = model.model.layers[0].self_attn
    for layer in (attention.q_proj, attention.k_proj):
        layer.requires_grad_(False)
    history = watched(tmp_path, model).state.log_history
    assert not any(f"scores/{FAMILIES['llama'].layers[0]}/gradient" in entry for entry in history)
    said = [record.getMessage() for record in caplog.records if "No gradient of queries and keys" in record.getMessage()]
    assert len(said) == 1 and FAMILIES["llama"].layers[0] in said[0] and FAMILIES["llama"].layers[1] not in said[0]
