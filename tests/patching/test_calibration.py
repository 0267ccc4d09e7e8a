"""`calibrate`: that attention comes nearer to the dot product's, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AlbertConfig, AlbertModel, LlamaConfig, LlamaModel

from hf_neural_attention import calibrate, patch, unpatch
from hf_neural_attention.models.neural_attention_scorer import NeuralScorer
from hf_neural_attention.patching import PatchError, calibration
from hf_neural_attention.patching.calibration import Call, divergence
from tests.helpers.comparing import assert_far, assert_near, run
from tests.helpers.neural_models import GPT2, scorers
from tests.helpers.stock_models import FAMILIES, Family


WIDE = {"mode": "replace", "proj_dim": 8, "hidden_dims": (16, 8), "per_head": True}
QUICK: dict[str, Any] = {"steps": 120, "max_batches": 12, "progress": False}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def batches(family: Family, number: int = 12) -> list[dict[str, torch.Tensor]]:
    """Different ones."""
    made = []
    for shift in range(number):
        inputs = family.inputs()
        for name, tensor in inputs.items():
            if tensor.is_floating_point():
                inputs[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(shift))
            elif name != "attention_mask":
                inputs[name] = torch.where(tensor >= 3, (tensor + 17 * shift) % 90 + 3, tensor)
        made.append(inputs)
    return made


@every_family
def test_attention_comes_nearer(family: Family):
    model = patch(family.model(), "all", **WIDE)
    state, expected = copy.deepcopy(model.state_dict()), run(family.model(), **family.inputs())
    before = (family.seen(run(model, **family.inputs()) - expected)).abs().mean()
    random = torch.get_rng_state()
    report = calibrate(model, batches(family), **QUICK)
    assert torch.equal(torch.get_rng_state(), random) and not model.training
    assert [layer.layer for layer in report] == family.layers
    for layer in report:
        assert 0 <= layer.kl_after < 0.7 * layer.kl_before, report
    assert (family.seen(run(model, **family.inputs()) - expected)).abs().mean() < before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) != (".scorer." in name and not name.endswith("linear3.bias")), name
    assert torch.equal(run(unpatch(model), **family.inputs()), expected)


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_both_implementations_and_runs_are_alike(implementation: str):
    first, second = (patch(FAMILIES["gpt2"].model("sdpa"), "all", **WIDE) for _ in range(2))
    second.load_state_dict(first.state_dict())
    second.set_attn_implementation(implementation)
    reports = [calibrate(model, batches(FAMILIES["gpt2"]), **QUICK) for model in (first, second)]
    for one, other in zip(*reports, strict=True):
        assert one.kl_after == pytest.approx(other.kl_after, rel=1e-2)


def test_a_layer_that_runs_several_times_is_fitted_to_all_of_its_calls():
    config = AlbertConfig(vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    config.intermediate_size, config.initializer_range = 64, 0.3
    torch.manual_seed(0)
    stock = AlbertModel(config).eval()
    inputs = [{"input_ids": torch.randint(3, 99, (4, 12))} for _ in range(8)]
    model = patch(copy.deepcopy(stock), "all", **WIDE)
    (name,) = [layer.layer for layer in calibrate(copy.deepcopy(model), inputs, **QUICK)]
    calls = calibration.capture(model, name, model.get_submodule(name), inputs[:2], 4)
    assert [len(each) for each in calls] == [4, 4]
    # gets what dot products have made of the calls before
    queries: list[torch.Tensor] = []
    attention = stock.get_submodule(name)
    handle = attention.query.register_forward_hook(lambda module, args, output: queries.append(output))
    run(stock, **inputs[0])
    handle.remove()
    for call, query in zip(calls[0], queries, strict=True):
        assert_near(call.query, query.view(4, 12, 4, 8).transpose(1, 2))

    def of_all_calls(patched: Any) -> float:
        return calibration.mean_divergence(patched.get_submodule(name).scorer, [call for each in calls for call in each])

    first_alone, whole = copy.deepcopy(model), copy.deepcopy(model)
    calibrate(whole, inputs, **QUICK)
    with pytest.MonkeyPatch.context() as context:  # as it was when the first call was all that was looked at
        context.setattr(calibration, "numbers_of_calls", lambda *_: {name: 1})
        calibrate(first_alone, inputs, **QUICK)
    assert of_all_calls(whole) < 0.9 * of_all_calls(first_alone)


def test_few_steps_see_every_batch():
    batches = [[(batch, call) for call in range(5)] for batch in range(3)]
    mixed = calibration.in_turns(batches)
    assert [batch for batch, _ in mixed] == [0, 1, 2] * 5 and sorted(mixed) == sorted(
        call for batch in batches for call in batch
    )
    assert calibration.in_turns([["a"], ["b"]]) == ["a", "b"]


def test_layers_are_fitted_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        """Has its layers in another order than it runs them in."""

        def __init__(self, first: Any, second: Any):
            super().__init__()
            self.second, self.first = second, first

        def forward(self, **inputs: Any) -> Any:
            return self.second(inputs_embeds=self.first(**inputs).last_hidden_state)

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    model = Backwards(*(patch(LlamaModel(LlamaConfig(**sizes)), "all", **WIDE) for _ in range(2)))
    layers = calibration.once({name: module for name, module, _ in calibration.neural_layers(model)})
    assert [name.split(".")[0] for name in layers] == ["second", "first"]
    batch = {"input_ids": torch.arange(3, 12)[None]}
    assert [name.split(".")[0] for name in calibration.numbers_of_calls(model, layers, [batch])] == ["first", "second"]


def test_the_divergence_is_the_one_of_the_formula():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[0, 0, 2] = False  # adds a query that sees nothing, which must not count
    scorer, rows = NeuralScorer(8), torch.tensor([0, 2, 4])
    found, seen_queries = divergence(scorer, Call(query, key, mask, False, 0.3), rows)
    total, count = 0.0, 0
    weights = scorer(query, key, key, mask, need_weights=True)[1]
    target = torch.softmax((query @ key.mT * 0.3).masked_fill(~mask, -1e30), -1)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in (0, 2, 4) if mask[b, 0, i].any()):
        seen = mask[b, 0, i]
        total += (target[b, h, i][seen] * (target[b, h, i][seen] / weights[b, h, i][seen]).log()).sum()
        count += 1
    assert count == seen_queries == 15 and torch.isclose(found, torch.as_tensor(total), rtol=1e-5)


def test_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Of an evaluation, as of a step."""
    torch.manual_seed(0)
    call = Call(torch.randn(2, 3, 50, 8), torch.randn(2, 3, 50, 8), None, True, 0.3)
    scorer, sizes = NeuralScorer(8), []
    whole = [calibration.mean_divergence(each, [call]) for each in (scorer, None)]
    monkeypatch.setattr(calibration, "NUMBERS_AT_ONCE", 7 * 2 * 3 * 50 * scorer.hidden_dims[0])
    monkeypatch.setattr(
        calibration, "divergence", lambda scorer, call, rows: sizes.append(len(rows)) or divergence(scorer, call, rows)
    )
    parts = [calibration.mean_divergence(each, [call]) for each in (scorer, None)]
    assert parts == pytest.approx(whole, rel=1e-5) and sizes[:8] == [7] * 7 + [1]


def test_models_of_a_class_with_neural_layers():
    stock = GPT2.stock()
    model = GPT2.twin(stock, neural_layers=[1], neural_proj_dim=8, neural_per_head=True)
    report = calibrate(model, [GPT2.inputs() for _ in range(4)], **QUICK)
    assert [layer.layer for layer in report] == ["transformer.h.1.attn"] and report[0].kl_after < report[0].kl_before


def test_low_precision_and_training_mode_are_kept():
    model = patch(FAMILIES["llama"].model().to(torch.bfloat16).train(), **WIDE)
    report = calibrate(model, batches(FAMILIES["llama"]), **QUICK)
    assert report[0].kl_after < report[0].kl_before and model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [parameter.requires_grad for parameter in scorers(model)[0].parameters()].count(False) == 1


def test_a_layer_that_would_become_worse_keeps_what_it_has():
    model = patch(FAMILIES["gpt2"].model(), **WIDE)
    state = copy.deepcopy(model.state_dict())
    report = calibrate(model, batches(FAMILIES["gpt2"]), steps=3, learning_rate=1e4, progress=False)
    assert report[0].kl_after == report[0].kl_before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_data_of_every_kind(capsys: pytest.CaptureFixture):
    ids = [{"input_ids": torch.randint(3, 98, (12,))} for _ in range(6)]
    model = patch(FAMILIES["gpt2"].model(), **WIDE)
    report = calibrate(model, DataLoader(ids, batch_size=2), steps=5)
    assert "calibrating" in capsys.readouterr().err
    assert str(report).splitlines()[0].split() == ["layer", "kl_before", "kl_after", "kl_uniform", "seconds"]
    endless = (batch for batch in iter(lambda: {"input_ids": torch.randint(3, 98, (2, 12))}, None))
    calibrate(model, endless, **QUICK | {"max_batches": 1})
    with pytest.raises(ValueError, match="no batches"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="`steps` is 0"):
        calibrate(model, ids, steps=0)


def test_what_cannot_be_calibrated():
    model = FAMILIES["gpt2"].model()
    with pytest.raises(PatchError, match="has no neural layer"):
        calibrate(model, batches(FAMILIES["gpt2"]))
    with pytest.raises(ValueError, match="`data` is one batch; expected several"):
        calibrate(patch(FAMILIES["gpt2"].model(), mode="replace"), next(iter(batches(FAMILIES["gpt2"]))))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of `torch\.inference_mode\(\)`"):
        calibrate(patch(FAMILIES["gpt2"].model(), mode="replace"), batches(FAMILIES["gpt2"]))
    patch(model)
    with pytest.raises(PatchError, match=r'transformer.h.0.attn: mode "residual"'):
        calibrate(model, batches(FAMILIES["gpt2"]))
    model = patch(FAMILIES["t5"].model(), "all", **WIDE)
    encoder_alone = [{"encoder_outputs": (torch.randn(2, 9, 32),), "decoder_input_ids": torch.randint(3, 98, (2, 6))}]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PatchError, match=r"does not reach 'encoder.block.0.layer.0.SelfAttention'"):
        calibrate(model, encoder_alone, **QUICK)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert_far(run(model, **FAMILIES["t5"].inputs()), run(FAMILIES["t5"].model(), **FAMILIES["t5"].inputs()))
