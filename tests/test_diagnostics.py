"""`explain`: what it says is what runs, and what is wrapped around a scorer is honoured."""

import copy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_neural_attention import (
    NeuralGPT2Config,
    NeuralGPT2ForSequenceClassification,
    NeuralGPT2LMHeadModel,
    NeuralScorer,
    NeuralViTConfig,
    NeuralViTForImageClassification,
    explain,
    neural_attention,
    set_backend,
    use_backend,
)
from hf_neural_attention.models import neural_attention_functional
from hf_neural_attention.models.neural_attention_backends import BACKENDS
from hf_neural_attention.models.neural_attention_pytorch import PYTORCH_BACKENDS
from hf_neural_attention.models.neural_attention_scorer import LARGE
from hf_neural_attention.ops import choice
from tests.helpers.numerics import CPU_BACKENDS, randomize


pytestmark = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="there is no native kernel")

SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 98}
VIT_SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(3, 15)[None]
LAYERS = ["transformer.h.0.attn", "transformer.h.2.attn"]
NOT_CALLED = "its forward hooks are not called, since the operation takes its weights and does not call it"
HONOURED = "what the layer makes of the identity matrix is used as its weight"


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    before = choice.process_choice
    set_backend(None)
    yield
    set_backend(before)


def gpt2(model_class: type = NeuralGPT2LMHeadModel, implementation: str = "sdpa", **fields) -> Any:
    """A model whose logits show what its scorers do."""
    torch.manual_seed(1)
    config = NeuralGPT2Config(**{**SIZES, "neural_layers": [0, -1], "neural_proj_dim": 4, "initializer_range": 0.2, **fields})
    config._attn_implementation = implementation
    model = model_class(config).eval()
    for module in model.modules():
        if isinstance(module, NeuralScorer):
            randomize(module)
    return model


def names(explanation) -> list[str | None]:
    return [layer.backend for layer in explanation]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_thin_scorers():
    query, scorer = torch.zeros(1, 2, 5, 8), NeuralScorer(8, 3, mode="thin")

    def said(**arguments) -> Any:
        (layer,) = explain(query, query, query, scorer, **arguments)
        return layer

    kind = 'mode="thin": a dot product, through SDPA, but with dropout through the reference, which keeps all scores in memory'
    assert said()[1:] == ("sdpa", True, None, (kind,))
    dropped = said(dropout_p=0.1)
    assert dropped[1:3] == ("reference", False) and "drops the pairs that every backend drops" in dropped.reason
    assert said(backend="reference").reason == "the argument `backend` asks for 'reference'"
    note = f"{kind}; the argument `backend` asks for 'native', of which it takes no notice"
    assert said(backend="native")[1:] == ("sdpa", True, None, (note,))


def test_sinks_and_caps_are_arguments_of_a_call():
    query, scorer = torch.zeros(1, 2, 5, 8), NeuralScorer(8, 2, mode="residual")
    assert names(explain(query, query, query, scorer, sinks=torch.zeros(2), softcap=30.0)) == ["native"]
    with pytest.raises(ValueError, match=r"`sinks` has shape \(3,\)"):
        explain(query, query, query, scorer, sinks=torch.zeros(3))
    with pytest.raises(TypeError, match="it got a model and more"):
        explain(gpt2(), softcap=30.0)


def test_a_module_without_a_model_runs_as_eager():
    model = gpt2()
    attention = model.transformer.h[0].attn
    attention.config.base._attn_implementation = None
    (layer,) = explain(nn.Sequential(attention))
    assert layer.backend == "reference" and 'attn_implementation="eager"' in layer.reason


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that have run."""
    found: list[str] = []

    def recording(name: str, function):
        def run(*arguments, **options):
            found.append(name)
            return function(*arguments, **options)

        return run

    for name, backend in list(BACKENDS.items()):
        monkeypatch.setitem(BACKENDS, name, backend._replace(run=recording(name, backend.run)))
    literal = neural_attention_functional.reference_attention  # records this function too, which returns attention weights
    monkeypatch.setattr(neural_attention_functional, "reference_attention", recording("reference", literal))
    return found


@pytest.mark.parametrize("asked", [None, "auto", *CPU_BACKENDS])
@pytest.mark.parametrize("way", ["argument", "context", "process", "environment"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_says_what_runs(implementation: str, way: str, asked: str | None, runs: list[str], monkeypatch: pytest.MonkeyPatch):
    model = gpt2(implementation=implementation)
    if asked is not None and way == "process":
        set_backend(asked)
    if asked is not None and way == "environment":
        monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, asked)
    with use_backend(asked) if asked is not None and way in ("argument", "context") else nullcontext():
        logits(model)
        found = explain(model) if way != "argument" else None
    found = found or explain(model, backend=asked)
    assert names(found) == runs and len(runs) == 2
    assert [layer.layer for layer in found] == LAYERS
    fused = runs[0] == "native"
    assert all(layer.is_fused == fused and (layer.reason is None) == fused and layer.notes == () for layer in found)


def test_models():
    classifier = gpt2(NeuralGPT2ForSequenceClassification, neural_layers="all", pad_token_id=0)
    assert [layer.layer for layer in explain(classifier)] == [f"transformer.h.{number}.attn" for number in range(3)]
    vit = NeuralViTForImageClassification(NeuralViTConfig(**VIT_SIZES, neural_layers="all"))
    assert [layer.layer for layer in explain(vit)] == ["vit.layers.0.attention", "vit.layers.1.attention"]
    assert names(explain(vit.bfloat16())) == ["native", "native"]
    assert [layer.layer for layer in explain(classifier.transformer.h[0].attn)] == ["scorer"]
    assert names(explain(gpt2().transformer.h[0].attn.scorer)) == ["native"]
    residual = explain(gpt2(neural_mode="residual"))
    assert all(layer.notes[0].startswith('mode="residual": the dot product is computed as well') for layer in residual)


def test_reasons(monkeypatch: pytest.MonkeyPatch):
    (first, _) = explain(gpt2(), backend="blockwise")
    assert first.reason == "the argument `backend` asks for 'blockwise' ('auto' would take 'native')"
    with use_backend("triton"):
        (first, _) = explain(gpt2())
    assert first.backend is None
    assert first.reason.startswith("`use_backend` asks for 'triton': The backend 'triton' cannot run here: ")
    (first, _) = explain(gpt2(implementation="eager"))
    assert first.reason.startswith('attn_implementation="eager" returns the attention weights, which only the reference holds')
    broken = BACKENDS["native"]._replace(reason_against=lambda inputs: "no compiler")
    monkeypatch.setitem(BACKENDS, "native", broken)
    (first, _) = explain(gpt2())
    assert first.backend == "blockwise" and first.reason.startswith("native: no compiler; triton: ")
    (first, _) = explain(gpt2(), backend="blockwise")
    assert first.reason == "the argument `backend` asks for 'blockwise'"


def test_table():
    model = gpt2()
    model.transformer.h[2].attn.scorer.k_proj.register_forward_hook(lambda *arguments: None)
    model.transformer.h[2].attn.scorer.linear1.register_forward_hook(lambda *arguments: None)
    assert str(explain(model, backend="reference")).splitlines() == [
        "layer                 backend    fused",
        "transformer.h.0.attn  reference  no     [1]",
        "transformer.h.2.attn  reference  no     [1][2]",
        "",
        "[1] the argument `backend` asks for 'reference' ('auto' would take 'native')",
        f"[2] scorer.k_proj, linear1: {NOT_CALLED}",
    ]
    assert repr(explain(gpt2())).splitlines()[1:] == [f"{name}  native   yes" for name in LAYERS]


def test_forward_hooks_are_not_called():
    model, calls = gpt2(), []
    model.transformer.h[0].attn.scorer.q_proj.register_forward_hook(lambda *arguments: calls.append(arguments))
    logits(model)
    assert not calls
    assert [layer.notes for layer in explain(model)] == [(f"scorer.q_proj: {NOT_CALLED}",), ()]
    # checks that what computes a weight, as pruning does, is called, and with the identity matrix
    model.transformer.h[0].attn.scorer.q_proj.register_forward_pre_hook(lambda layer, inputs: None)
    logits(model)
    assert torch.equal(calls[-1][1][0], LARGE * torch.eye(8))
    called = "called for its forward pre-hooks, which pruning and norms of weights use"
    assert [layer.notes for layer in explain(model)] == [(f"scorer.q_proj: {called}; {HONOURED}",), ()]


def test_calls(runs: list[str]):
    scorer, (query, key, value) = NeuralScorer(8), torch.randn(3, 1, 2, 5, 8)
    for backend in (None, *CPU_BACKENDS):
        neural_attention(query, key, value, scorer, backend=backend)
        (found,) = explain(query, key, value, scorer, backend=backend)
        assert (found.layer, found.backend) == ("inputs", runs[-1])
    assert names(explain(query, scorer.project_keys(key), value, scorer, keys_projected=True)) == ["native"]
    on_meta = (tensor.to("meta") for tensor in (query, key, value))
    assert names(explain(*on_meta, NeuralScorer(8).to("meta"))) == ["blockwise"]


def test_errors():
    scorer, query = NeuralScorer(8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="This GPT2LMHeadModel has no neural layer"):
        explain(GPT2LMHeadModel(GPT2Config(**SIZES)))
    with pytest.raises(TypeError, match="`model_or_query` is a str; expected a model or a query"):
        explain("gpt2")
    for more in ((query,), (None, None, None, None, 0.1), (None, None, None, None, 0.0, True)):
        with pytest.raises(TypeError, match="it got a model and more"):
            explain(gpt2(), *more)
    with pytest.raises(TypeError, match="needs `key`, `value` and `scorer` beside a query"):
        explain(query, query, query)
    with pytest.raises(ValueError, match="`key` has shape"):
        explain(query, query[0], query, scorer)
    with pytest.raises(ValueError, match="`value` is on device meta; expected that of `query`, cpu"):
        explain(query, query, query.to("meta"), scorer)
    for implementation in ("eager", "sdpa"):
        with pytest.raises(ValueError, match="`backend` is 'fast'; it must be one of"):
            explain(gpt2(implementation=implementation), backend="fast")
    (found,) = explain(*[query.to(torch.float8_e4m3fn)] * 3, scorer)
    assert found.backend is None and found.reason.startswith("Neural Attention cannot run: it computes in torch.float16")


def test_on_the_meta_device():
    with torch.device("meta"):
        model = gpt2()
    for layer in explain(model):
        assert layer.backend == "blockwise" and layer.notes == ("on the meta device: shapes only, no numbers",)
        assert layer.reason.startswith("native: it runs on the CPU, and the tensors are on 'meta'; triton: ")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_scorer_left_on_the_meta_device(implementation: str):
    model = gpt2(implementation=implementation)
    model.transformer.h[0].attn.scorer.to("meta")
    first, second = explain(model)
    assert first.backend is None and second.backend is not None
    assert first.reason == "the scorer's weights are on the meta device, without numbers, and the tokens on 'cpu'"
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        logits(model)


def test_offloaded_weights(runs: list[str]):
    model = gpt2()
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    runs.clear()
    assert_near(logits(model), expected)
    assert names(explain(model)) == runs == ["native", "native"]
    note = (
        "scorer.q_proj, k_proj, linear1, linear2, linear3: offloaded by accelerate; the weights are brought in for each call"
    )
    assert all(layer.notes == (note,) for layer in explain(model))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models(inside: bool):
    model = gpt2()
    if inside:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    for layer in explain(compiled):
        assert layer.backend == "native" and layer.layer.removeprefix("_orig_mod.") in LAYERS
        assert layer.notes == ("torch.compile: what is compiled already keeps the backend that it was compiled with",)


def test_code_of_the_hub_without_this_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NeuralScorer, "__module__", "of_the_hub.neural_attention_scorer")
    monkeypatch.setitem(sys.modules, "of_the_hub.neural_attention_backends", SimpleNamespace(BACKENDS=PYTORCH_BACKENDS))
    for layer in explain(gpt2()):
        assert layer.backend == "blockwise" and layer.reason.endswith("does not use this package's backends but copies of two")


def lora(**options) -> Any:
    return get_peft_model(gpt2(), LoraConfig(r=2, **{"target_modules": ["q_proj", "linear1"], **options}))


def train(adapted: Any) -> None:
    """Moves LoRA's layers off their start, where they do nothing."""
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_lora_is_noticed_and_honoured(backend: str, runs: list[str]):
    plain, adapted = gpt2(), lora()
    with use_backend(backend):
        before = logits(plain)
        assert_near(logits(adapted), before)
        train(adapted)
        trained = logits(adapted)
        assert (trained - before).abs().max() > 0.1
        with adapted.disable_adapter():
            assert_near(logits(adapted), before)
            assert [layer.notes[0] for layer in explain(adapted)] == [
                f"scorer.q_proj, linear1: under an adapter of peft, disabled; {HONOURED}"
            ] * 2
        assert names(explain(adapted)) == runs[-2:] == [backend] * 2
        assert [layer.notes for layer in explain(adapted)] == [
            (f"scorer.q_proj, linear1: under an adapter of peft; {HONOURED}",)
        ] * 2
        merged = copy.deepcopy(adapted).merge_and_unload()
        assert_near(logits(merged), trained)
        assert not any(layer.notes for layer in explain(merged))
        adapted.merge_adapter()
        assert_near(logits(adapted), trained)
        assert explain(adapted)[0].notes[0].startswith("scorer.q_proj, linear1: under an adapter of peft, merged;")
    assert [layer.layer for layer in explain(adapted)] == [f"base_model.model.{name}" for name in LAYERS]


def test_dropout_of_an_adapter_is_noticed():
    notes = explain(lora(lora_dropout=0.1))[0].notes
    assert len(notes) == 2 and "dropout drops an input of the layer for all tokens" in notes[1]


def test_a_scorer_that_peft_trains_whole(runs: list[str]):
    adapted = lora(target_modules=["c_attn"], modules_to_save=["scorer"], fan_in_fan_out=True)
    before = logits(adapted)
    found = explain(adapted)
    assert [layer.layer for layer in found] == [f"base_model.model.{name}" for name in LAYERS]
    assert names(found) == runs == ["native", "native"] and not found[0].notes
    adapted.base_model.model.transformer.h[0].attn.scorer.modules_to_save["default"].q_proj.weight.data += 1
    assert (logits(adapted) - before).abs().max() > 0.1


def quantised(model: Any, **options) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, include="*scorer*", **{"weights": quanto.qint8, **options})
    quanto.freeze(model)
    return model


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bits", ["qint8", "qint4"])
def test_quantisation_is_noticed_and_honoured(bits: str, backend: str):
    model = gpt2()
    ours = quantised(copy.deepcopy(model), weights=bits)
    with use_backend(backend):
        before, found = logits(model), logits(ours)
        assert names(explain(ours)) == [backend] * 2
        for layer in explain(ours):
            note = f"quantised or wrapped (optimum.quanto.nn.qlinear.QLinear); {HONOURED}"
            assert layer.notes == (f"scorer.q_proj, k_proj, linear1, linear2, linear3: {note}",)
        for name, module in ours.named_modules():
            if type(module).__name__ == "QLinear":
                model.get_submodule(name).weight.data.copy_(module.weight.dequantize())
        assert_near(found, logits(model))
    assert (found - before).abs().max() > 1e-3


def test_quantised_activations_are_noticed():
    notes = explain(quantised(gpt2(), activations="qint8"))[0].notes
    assert len(notes) == 2 and 'leave scorers out (`exclude="*scorer*"`)' in notes[1]
