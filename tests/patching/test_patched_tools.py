"""A patched model in the hands of other tools: copying, saving, training, compiling, adapters, caches."""

import copy
import io
import warnings
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    EncoderDecoderCache,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_neural_attention import (
    NeuralCache,
    compact,
    explain,
    from_pretrained,
    load_patch,
    patch,
    patch_status,
    save_patch,
    unpatch,
)
from hf_neural_attention.models.neural_attention_interface import neural_attention_forward
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import assert_far, assert_near, assert_same_gradients, assert_same_state, backward, run
from tests.helpers.neural_models import eager_and_sdpa, liven, scorers
from tests.helpers.stock_models import FAMILIES, Family
from tests.helpers.versions import CACHE, CHECKPOINTING


GPT2, LLAMA, MISTRAL, BERT, T5, VIT = (FAMILIES[name] for name in ("gpt2", "llama", "mistral", "bert", "t5", "vit"))
BIGCODE = FAMILIES["gpt_bigcode"]  # makes queries, keys and values in one linear layer, with one head of keys
ALL: dict[str, Any] = {"layers": "all", "proj_dim": 4}


def name_of(value: Any) -> Any:
    return value.model_type if isinstance(value, Family) else value


a_few_families = pytest.mark.parametrize("family", (LLAMA, BIGCODE, BERT, T5, VIT), ids=name_of)
FORMS = [(family, mode) for family in (LLAMA, BIGCODE, BERT, T5, VIT) for mode in ("residual", "replace")]
FORMS += [(family, "compact") for family in (BERT, T5, VIT)]  # can be packed
every_form = pytest.mark.parametrize(("family", "mode"), FORMS, ids=name_of)


def neural(family: Family, implementation: str = "sdpa", mode: str = "residual", **settings) -> Any:
    """Patched, its scorers moved off their start; in mode "compact", one of mode "replace" has been made compact."""
    settings = {**ALL, "mode": "replace" if mode == "compact" else mode, **settings}
    model = liven(patch(family.model(implementation), **settings))
    return compact(model) if mode == "compact" else model


def with_labels(family: Family) -> dict[str, torch.Tensor]:
    inputs = family.inputs()
    return {**inputs, "labels": inputs.get("decoder_input_ids", inputs.get("input_ids", torch.tensor([0, 1])))}


def pickled(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_form
@pytest.mark.parametrize("copied", (copy.deepcopy, pickled))
def test_copies_are_patched_and_independent(family: Family, mode: str, copied: Any):
    stock, model, inputs = family.model(), neural(family, mode=mode), family.inputs()
    expected = run(model, **inputs)
    other = copied(model)
    assert patch_status(other) == patch_status(model) and torch.equal(run(other, **inputs), expected)
    if mode == "compact":
        torch.nn.init.zeros_(scorers(other)[0].linear3.weight)
        assert_far(run(other, **inputs), expected)
    else:
        assert_same_state(unpatch(other), stock)
        assert torch.equal(run(other, **inputs), run(stock, **inputs))
    assert torch.equal(run(model, **inputs), expected)


@every_form
def test_other_dtypes(family: Family, mode: str):
    model = neural(family, mode=mode)
    inputs = family.inputs()
    expected = run(model, **inputs)
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        # allows for a handful of roundings of 2^-8, as in the tests of our own models
        assert_near(family.seen(run(model, **cast)).float(), family.seen(expected), 1e-5 if dtype == torch.float64 else 6e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.float()(**with_labels(family)).loss
    loss.backward()
    assert all(scorer.linear3.weight.grad.abs().max() > 0 for scorer in scorers(model))


@pytest.mark.parametrize(("family", "mode"), [(LLAMA, "residual"), (BERT, "compact")], ids=name_of)
def test_set_attn_implementation(family: Family, mode: str):
    model, inputs = neural(family, mode=mode), family.inputs()
    expected = run(model, **inputs)
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 3 and all(maps.shape == (2, 4, 9, 9) for maps in attentions)
    assert not torch.equal(run(model, **inputs), expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(model, **inputs), expected)
    # sets by hand what a stock class takes and its neural layers do not
    model.config._attn_implementation = "flex_attention"
    attention = model.get_submodule(family.layers[0])
    with pytest.raises(ValueError, match=r"neural \w+Attention cannot use `attn_implementation='flex_attention'`: its masks"):
        neural_attention_forward(attention, *torch.randn(3, 1, 4, 5, 8), None)
    model.set_attn_implementation("eager")
    assert model(**inputs).logits.isfinite().all()


def test_implementations_for_dot_products_alone_are_refused(tmp_path):
    stock, model = LLAMA.model(), neural(LLAMA)
    model.save_pretrained(tmp_path)
    names = ("_supports_flash_attn", "_supports_flex_attn", "supports_context_parallel")
    for name in ("flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn2"):
        message = f"LlamaForCausalLM cannot use `attn_implementation='{name}'`: its masks"
        again = from_pretrained(tmp_path)
        for patched in (model, again, copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path)):
            with pytest.raises(ValueError, match=message):
                patched.set_attn_implementation(name)
            assert patched.config._attn_implementation == patched.model.config._attn_implementation == "sdpa"
            assert not any(getattr(each, flag) for each in (patched, patched.model) for flag in names)
        for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=message):
                load(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match='Specified `attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    unpatch(model)
    assert all(getattr(model, name) == getattr(stock, name) for name in names)
    model.set_attn_implementation("flex_attention")


@every_form
def test_gradient_checkpointing_changes_no_gradient(family: Family, mode: str):
    model, inputs, calls = neural(family, mode=mode).train(), with_labels(family), []
    expected = backward(model, **inputs)
    layer = "linear2" if mode == "compact" else "linear1"
    assert all(any(f"{name}.scorer.{layer}.weight" == each for each in expected) for name in family.layers)
    scorers(model)[0].register_forward_hook(lambda *arguments: calls.append(None))
    getattr(model, f"{CHECKPOINTING}_enable")()
    assert_same_gradients(backward(model, **inputs), expected)
    assert len(calls) == 2


OF_MODES = ((LLAMA, "residual"), (T5, "residual"), (BERT, "compact"))
SLOW = [pytest.param(family, mode, marks=pytest.mark.slow) for family, mode in OF_MODES]


@pytest.mark.parametrize(("family", "mode"), [*SLOW, (VIT, "residual")], ids=name_of)
def test_compiled(family: Family, mode: str):
    torch.compiler.reset()
    model, inputs = neural(family, mode=mode), with_labels(family)
    expected, gradients = run(model, **inputs), backward(model, **inputs)
    compiled = torch.compile(model, backend="aot_eager")
    assert_near(run(compiled, **inputs), expected)
    assert_same_gradients({n.removeprefix("_orig_mod."): g for n, g in backward(compiled, **inputs).items()}, gradients)
    if mode == "compact":
        return
    # checks that a compiled model can be patched too, and is afterwards what it was
    unpatch(compiled)
    stock = family.model()
    assert_near(run(compiled, **inputs), run(stock, **inputs))
    assert_far(run(patch(compiled, mode="replace"), **inputs), run(stock, **inputs))


GRAPHS = [(LLAMA, "residual"), (BERT, "compact"), pytest.param(T5, "compact", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "mode"), GRAPHS, ids=name_of)
def test_compiled_as_one_graph(family: Family, mode: str):
    torch.compiler.reset()
    model, inputs = neural(family, "eager", mode), family.inputs()
    assert_near(run(torch.compile(model, backend="aot_eager", fullgraph=True), **inputs), run(model, **inputs))


LORA = {
    "llama": {"target_modules": ["q_proj", "v_proj"]},
    "gpt_bigcode": {"target_modules": ["c_attn"]},
    "bert": {"target_modules": ["query", "value"]},
    "t5": {"target_modules": ["q", "v"]},
    "vit": {"target_modules": ["q_proj", "v_proj"]},
}


def train(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


@a_few_families
@pytest.mark.parametrize("patch_first", (True, False), ids=("patch, LoRA", "LoRA, patch"))
def test_lora(family: Family, patch_first: bool):
    from peft import LoraConfig, get_peft_model

    inputs = with_labels(family)
    # excludes the scorer, whose layers are named as attention's own are, and trains it whole
    only_attention = LoraConfig(r=4, exclude_modules=r".*\.scorer\..*", modules_to_save=["scorer"], **LORA[family.model_type])
    without_scorer = LoraConfig(r=4, **LORA[family.model_type])
    if patch_first:
        base = patch(family.model(), **ALL)
        status = patch_status(base)
        model = get_peft_model(base, only_attention)
        assert patch_status(model).num_parameters == status.num_parameters, "counts no copies"
    else:
        model = patch(get_peft_model(family.model(), without_scorer), **ALL)
    assert len(patch_status(model)) == len(family.layers)
    born = run(model.eval(), **inputs)
    assert_near(family.seen(born), family.seen(run(family.model(), **inputs)))
    train(model.train(), inputs)
    trained = run(model.eval(), **inputs)
    assert_far(trained, born)
    moved = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().max() > 0}
    for part in ("lora_A", "lora_B", "linear3.weight", "linear1.weight"):
        assert any(part in name for name in moved), part

    merged = model.merge_and_unload()
    assert len(patch_status(merged)) == len(family.layers) and not any("lora" in name for name in merged.state_dict())
    assert_near(run(merged, **inputs), trained, 1e-4)
    unpatch(merged)
    assert list(merged.state_dict()) == list(family.model().state_dict())
    assert not torch.equal(run(merged, **inputs), trained)


@pytest.mark.parametrize("family", (LLAMA, MISTRAL, T5), ids=lambda family: family.model_type)
@eager_and_sdpa
def test_neural_cache(family: Family, implementation: str):
    model = neural(family, implementation, mode="replace", proj_dim=2)
    inputs = {name: tensor for name, tensor in family.inputs().items() if name != "decoder_input_ids"}
    arguments = {"max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
    cache: Any = NeuralCache(model)
    if family is T5:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
    tokens = model.generate(**inputs, **arguments, **{CACHE: cache})
    assert torch.equal(tokens, model.generate(**inputs, **arguments, use_cache=False))
    assert len(tokens[:, -6:].unique()) > 6
    another = copy.deepcopy(model)
    cache = EncoderDecoderCache(NeuralCache(model), DynamicCache(config=model.config)) if family is T5 else NeuralCache(model)
    with pytest.raises(ValueError, match="got keys from a NeuralCache made for another model"):
        another.generate(**inputs, **arguments, **{CACHE: cache})


def test_saving_keeps_the_stock_weights_and_ties(tmp_path):
    stock = GPT2.model(tie_word_embeddings=True)
    model = patch(copy.deepcopy(stock), "all")
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert_same_state(again, model)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("mode", ("residual", "compact"))
def test_resizing_embeddings_leaves_neural_layers_alone(mode: str):
    model = neural(GPT2, mode=mode)
    before = copy.deepcopy(model)
    model.resize_token_embeddings(120)
    for name in GPT2.layers:
        assert_same_state(model.get_submodule(name), before.get_submodule(name))
    assert model(**GPT2.inputs()).logits.shape[-1] == 120


@pytest.mark.parametrize(
    ("mode", "parts"),
    (
        ("residual", ("scorer.linear3", "scorer.linear1", "scorer.q_proj")),
        ("compact", ("scorer.linear3", "scorer.linear2", "query")),
    ),
    ids=("residual", "compact"),
)
def test_trainer(mode: str, parts: tuple[str, ...], tmp_path):
    model = patch(BERT.model(), **ALL) if mode == "residual" else neural(BERT, mode=mode)
    before = copy.deepcopy(model.state_dict())
    rows = [{name: tensor[0] for name, tensor in with_labels(BERT).items()}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", save_steps=3)
    Trainer(model, arguments, train_dataset=rows).train()
    for name in (f"{layer}.{part}.weight" for layer in BERT.layers for part in parts):
        assert not torch.equal(model.state_dict()[name], before[name]), name
    assert len(patch_status(model)) == 3
    assert_same_state(from_pretrained(tmp_path / "checkpoint-3"), model)


def test_offloaded_models():
    from accelerate import cpu_offload

    model, inputs = GPT2.model(), GPT2.inputs()
    expected = run(model, **inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    patch(model, "all")
    assert {parameter.device.type for scorer in scorers(model) for parameter in scorer.parameters()} == {"cpu"}
    assert_near(GPT2.seen(run(model, **inputs)), GPT2.seen(expected))
    assert_far(run(liven(model), **inputs), expected)
    assert torch.equal(run(unpatch(model), **inputs), expected)


def test_offloaded_packed_layers():
    from accelerate import cpu_offload

    model, inputs = neural(BERT, mode="compact"), BERT.inputs()
    expected = run(model, **inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule(BERT.layers[0]).query.weight.is_meta
    assert_near(run(model, **inputs), expected)


def test_quantised_models():
    from optimum.quanto import freeze, qint8, quantize

    model, inputs = LLAMA.model(), LLAMA.inputs()
    quantize(model, weights=qint8)
    freeze(model)
    expected = run(model, **inputs)
    patch(model, "all")
    assert {parameter.dtype for scorer in scorers(model) for parameter in scorer.parameters()} == {torch.float32}
    assert_near(LLAMA.seen(run(model, **inputs)), LLAMA.seen(expected))
    assert torch.equal(run(unpatch(model), **inputs), expected)


def test_quantised_scorers(tmp_path):
    # checks that such a model saves whole, and that it has no patch to be saved alone
    pytest.importorskip("bitsandbytes")
    neural(LLAMA, mode="replace", proj_dim=16).save_pretrained(tmp_path / "plain")
    model = from_pretrained(tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert scorers(model)[0].linear1.weight.dtype == torch.int8
    with pytest.raises(PatchError, match=r"adapters, or quantised weights.*`save_pretrained` saves all"):
        save_patch(model, tmp_path / "patch")
    model.save_pretrained(tmp_path / "quantised")
    again = from_pretrained(tmp_path / "quantised")
    assert len(patch_status(again)) == 3 and scorers(again)[0].linear1.weight.dtype == torch.int8
    assert torch.equal(run(again, **LLAMA.inputs()), run(model, **LLAMA.inputs()))


def test_scorers_of_a_model_that_was_quantised_before(tmp_path):
    pytest.importorskip("bitsandbytes")
    LLAMA.model().save_pretrained(tmp_path / "stock")
    eight_bits = BitsAndBytesConfig(load_in_8bit=True)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", quantization_config=eight_bits)
    model = liven(patch(quantised, "all"))
    expected = run(model, **LLAMA.inputs())
    with pytest.raises(PatchError, match=r"quantised before it was patched.* Use `save_patch`, and `load_patch`"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    save_patch(model, tmp_path / "patch")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", quantization_config=eight_bits)
    assert torch.equal(run(load_patch(again, tmp_path / "patch"), **LLAMA.inputs()), expected)
    model.config.quantization_config.llm_int8_skip_modules = ["lm_head", "scorer"]
    with pytest.raises(PatchError, match="quantised before it was patched"):
        model.save_pretrained(tmp_path / "whole")
    # is told to leave scorers alone, and keeps what it leaves alone by default
    model.config.quantization_config.llm_int8_skip_modules = ["lm_head", ".*scorer"]
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(run(from_pretrained(tmp_path / "whole"), **LLAMA.inputs()), expected)


@pytest.mark.parametrize("mode", ("replace", "compact"))
def test_dynamically_quantised_scorers(mode: str):
    model = neural(VIT, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignores that torch moves it to torchao
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert "dynamic" in type(scorers(quantised)[0].linear2).__module__
    for scorer, plain in zip(scorers(quantised), scorers(model), strict=True):
        for ours, exact in zip(scorer.weights(), plain.weights(), strict=True):
            if exact is None:  # is a first layer, which a compact scorer has not
                continue
            assert (ours - exact).abs().max() <= 0.02 * max(exact.abs().max(), 1)  # rounds inputs and weights to 8 bits
    assert run(quantised, **VIT.inputs()).isfinite().all()
    assert "quantised or wrapped" in str(explain(quantised))


@pytest.mark.parametrize("mode", ("replace", "compact"))
def test_pruned_scorers_train(mode: str):
    from torch.nn.utils import prune

    model, inputs = neural(GPT2, mode=mode), with_labels(GPT2)
    for scorer in scorers(model):
        prune.l1_unstructured(scorer.linear2, "weight", amount=0.5)
    train(model.train(), inputs)
    zeros = [int((scorer.linear2.weight == 0).sum()) for scorer in scorers(model)]
    assert zeros == [scorer.linear2.weight.numel() // 2 for scorer in scorers(model)]
    assert all(scorer.linear2.weight_orig.grad.any() for scorer in scorers(model))


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers refuses peft before {MIN_PEFT_VERSION} in `add_adapter`, of any model",
)
@pytest.mark.parametrize(("family", "mode"), [(LLAMA, "replace"), (BERT, "compact")], ids=name_of)
@pytest.mark.parametrize("modules_to_save", (None, ["scorer"]))
def test_adapters_of_transformers_own(family: Family, mode: str, modules_to_save: Any, tmp_path):
    from peft import LoraConfig

    model = neural(family, mode=mode)
    model.save_pretrained(tmp_path / "base")
    targets = r".*self_attn\.(q_proj|v_proj)" if family is LLAMA else r".*self\.(query|value)"
    model.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, modules_to_save=modules_to_save))
    if modules_to_save:
        liven(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").exists() and not (tmp_path / "adapter/config.json").exists()
    again = from_pretrained(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter")
    assert_near(run(again, **family.inputs()), run(model, **family.inputs()))


def test_assisted_decoding_of_an_encoder_decoder_with_a_neural_cache():
    model = patch(T5.model(), "all", mode="replace")
    ids = T5.inputs()["input_ids"]
    arguments = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = model.generate(ids[:1], **arguments)
    cache = EncoderDecoderCache(NeuralCache(model), DynamicCache(config=model.config))
    assert torch.equal(model.generate(ids[:1], **arguments, **{CACHE: cache}), expected)
    assert cache.self_attention_cache.nbytes > 0
