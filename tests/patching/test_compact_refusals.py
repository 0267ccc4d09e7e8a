"""What cannot be made compact, and what a compact model cannot do: said with the reason, and nothing is changed."""

import copy
import warnings
from importlib.metadata import version
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention

from hf_neural_attention import (
    NeuralCache,
    calibrate,
    compact,
    from_pretrained,
    load_patch,
    patch,
    patch_status,
    save_patch,
    unpatch,
)
from hf_neural_attention.patching import AlreadyPatchedError, PatchError, UnsupportedLayerError
from tests.helpers import neural_models
from tests.helpers.compacted_models import neural
from tests.helpers.comparing import assert_near, assert_same_state, run
from tests.helpers.stock_models import FAMILIES, Family


GPT2, VIT, BERT, T5, BART, DINO = (FAMILIES[name] for name in ("gpt2", "vit", "bert", "t5", "bart", "dinov2"))


def assert_refused(model: Any, error: type[Exception], match: str, **arguments) -> None:
    """With the reason, and the model is what it was, also after asking for a plan."""
    before, modules = copy.deepcopy(model), list(model.modules())
    for dry_run in (True, False):
        with pytest.raises(error, match=match):
            compact(model, dry_run=dry_run, **arguments)
    assert [*map(id, model.modules())] == [*map(id, modules)] and patch_status(model) == patch_status(before)
    assert_same_state(model, before)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]


@pytest.mark.parametrize(
    ("model_type", "match"),
    [
        ("llama", "queries are not what a linear layer makes.*rotary"),
        ("qwen3", "rotary positions, a norm"),
        ("gpt_neox", "put together of several parts"),
        ("gpt_bigcode", "a part of what a larger layer makes"),
        ("modernbert", "not what a linear layer makes"),
        ("opt", "counts heads by itself"),
    ],
)
def test_families_that_are_refused(model_type: str, match: str):
    assert_refused(neural(FAMILIES[model_type]).train(), UnsupportedLayerError, match)


def test_models_that_are_not_whole_or_not_ours_alone():
    model = neural(GPT2)
    assert_refused(model.transformer.h[0].attn, PatchError, "is an attention module by itself")
    assert_refused(nn.ModuleList([neural_models.GPT2.neural()]), PatchError, "a part of it is of a class with neural layers")
    model.config._attn_implementation = "flash_attention_2"  # as a model has it that was loaded so, on a machine with a GPU
    assert_refused(model, PatchError, "it runs under 'flash_attention_2'; `model.set_attn_implementation` changes it")


@pytest.mark.parametrize("model_type", ("bert", "opt"))
def test_a_run_that_fails_after_attention_shows_nothing(model_type: str):
    """Its outputs cannot be compared afterwards, and opt's would differ."""
    inputs = FAMILIES[model_type].inputs()
    wrong = inputs["input_ids"].new_zeros(1, 3)
    model = neural(FAMILIES[model_type])
    assert_refused(model, UnsupportedLayerError, "no run of the model reached it", example_inputs=inputs | {"labels": wrong})


class Meddling(nn.Module):
    """Put in place of a query layer's own output: what it does to queries."""

    def __init__(self, attention: Any, meddle: Any):
        super().__init__()
        self.linear, self.meddle = attention.q_proj, meddle

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.meddle(self.linear(states))


@pytest.mark.parametrize(
    ("meddle", "match"),
    [
        (
            lambda query: query * torch.ones(query.shape[1], 1),
            "multiplied by what is no constant",
        ),  # as long-context models do
        (lambda query: query * 0.123, "0.123, which is no constant of the module"),
        (lambda query: query.flip(-1), "`Flip`"),
        (
            lambda query: query.view(*query.shape[:-1], 8, 4).transpose(-1, -2).flatten(-2),
            "not the heads, one after the other",
        ),
        (lambda query: torch.zeros_like(query), "do not come from a plain `nn.Linear`"),
    ],
)
def test_queries_that_are_treated(meddle: Any, match: str):
    model = neural(DINO, [1])
    attention = model.get_submodule(DINO.layers[1])
    attention.q_proj = Meddling(attention, meddle)
    assert_refused(model, UnsupportedLayerError, f"queries.*{match}")


def test_a_constant_factor_of_the_module_is_folded():
    model, inputs = neural(DINO, [1]), DINO.inputs()
    attention = model.get_submodule(DINO.layers[1])
    attention.q_proj = Meddling(attention, lambda query: query * attention.scaling)
    expected = run(model, **inputs)
    assert_near(run(compact(model), **inputs), expected)


class KeysForMore(Dinov2Attention):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(hidden_states, **kwargs)
        return output + self.k_proj(hidden_states).mean(), weights


def test_keys_that_serve_for_more_than_scores():
    model = neural(DINO, [1])
    model.get_submodule(DINO.layers[1]).__class__ = KeysForMore
    assert_refused(model, UnsupportedLayerError, "would change beyond rounding, so its queries and keys are used for more")


def test_a_layer_that_makes_values_as_well_stays_for_these():
    model, inputs = neural(DINO, [1]), DINO.inputs()
    attention = model.get_submodule(DINO.layers[1])
    attention.v_proj = attention.k_proj
    expected = run(model, **inputs)
    assert_near(run(compact(model), **inputs), expected)


def test_residual_and_stock_models():
    assert_refused(patch(GPT2.model(), [0]), PatchError, "mode .residual., whose dot product needs whole queries and keys")
    assert_refused(GPT2.model(), PatchError, "has no neural layer")
    with pytest.raises(TypeError, match="takes a model, not a str"):
        compact("gpt2")


def test_what_is_around_a_model(tmp_path):
    compiled = torch.compile(neural(GPT2))
    with pytest.raises(PatchError, match="it is compiled; make it compact before"):
        compact(compiled)
    hooked = neural(BERT)
    hooked.get_submodule(BERT.layers[0]).query.register_forward_hook(lambda *_: None)
    assert_refused(hooked, PatchError, "has forward hooks, which would be lost")
    dispatched = neural(GPT2)
    add_hook_to_module(dispatched.get_submodule(GPT2.layers[0]), ModelHook())
    with pytest.raises(PatchError, match="offloaded or dispatched by accelerate"):
        compact(dispatched)
    pruned = neural(VIT)
    prune.l1_unstructured(pruned.get_submodule(VIT.layers[0]).q_proj, "weight", 0.5)
    with pytest.raises(PatchError, match="has forward hooks, which would be lost"):
        compact(pruned)
    normed = neural(VIT)
    parametrizations.weight_norm(normed.get_submodule(VIT.layers[0]).q_proj)
    with pytest.raises(PatchError, match="ParametrizedLinear, whose weights are not plain"):
        compact(normed)
    for family in (VIT, BERT):
        normed = neural(family)
        parametrizations.weight_norm(neural_models.scorers(normed)[0].linear2)
        with pytest.raises(PatchError, match=r"scorer.linear2' is parametrised \(.*\), which would be lost"):
            compact(normed)
    rounded = neural(VIT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignores that torch moves it to torchao
        torch.ao.quantization.quantize_dynamic(rounded.get_submodule(VIT.layers[0]).scorer, {nn.Linear}, inplace=True)
    with pytest.raises(PatchError, match="is a Linear with quantised weights"):
        compact(rounded)
    quantised = neural(VIT)
    weight = torch.zeros(32, 32, dtype=torch.int8)
    quantised.get_submodule(VIT.layers[0]).q_proj.weight = nn.Parameter(weight, requires_grad=False)
    assert_refused(quantised, PatchError, r"Parameter of torch.int8: sharded or quantised")
    with torch.device("meta"):
        meta = GPT2.model()
    with pytest.raises(PatchError, match="on the meta device, without numbers"):
        compact(patch(meta, "all", mode="replace"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(PatchError, match="taken over for training by several processes"):
            compact(nn.parallel.DistributedDataParallel(neural(GPT2)))
    finally:
        torch.distributed.destroy_process_group()


def test_adapters():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(neural(BERT), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(PatchError, match="it is inside a PeftModel; merge adapters"):
        compact(adapted)
    with pytest.raises(PatchError, match="is under an adapter; merge it first"):
        compact(adapted.get_base_model())
    assert all(layer.compact for layer in patch_status(compact(adapted.merge_and_unload())))
    # adapts a compact model by the defaults of its family, as it does the stock one
    model = compact(neural(BERT))
    expected = run(model, **BERT.inputs())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="FEATURE_EXTRACTION"))
    adapted(**BERT.inputs()).logits.sum().backward()
    assert any(
        "query.lora_B" in name and each.grad.any() for name, each in adapted.named_parameters() if each.grad is not None
    )
    assert_near(run(adapted.merge_and_unload(), **BERT.inputs()), expected)


@pytest.mark.parametrize("family", (GPT2, BERT), ids=("gpt2", "bert"))
def test_what_needs_queries_and_keys_refuses(family: Family, tmp_path):
    model = compact(neural(family))
    before = copy.deepcopy(model)
    gone = r"compact, whose queries and keys, and the layers that made them, are gone\. Load the checkpoint again"
    for call in (lambda: unpatch(model), lambda: save_patch(model, tmp_path), lambda: calibrate(model, [family.inputs()] * 2)):
        with pytest.raises(PatchError, match=gone):
            call()
    save_patch(neural(family), tmp_path)
    for call in (lambda: patch(model), lambda: load_patch(model, tmp_path)):
        with pytest.raises(AlreadyPatchedError, match="and compact: its stock queries and keys are gone"):
            call()
    assert_same_state(model, before)
    assert_refused(model, PatchError, "it is compact already")


@neural_models.both_families
def test_our_own_compact_models_refuse_as_well(family: Any):
    model = family.neural(neural_layers="all", **neural_models.COMPACT)
    with pytest.raises(PatchError, match="compact, whose queries and keys"):
        calibrate(model, [family.inputs()] * 2)
    with pytest.raises(PatchError, match="by its class and config"):
        unpatch(model)
    with pytest.raises(PatchError, match="it is compact already"):
        compact(model)


@pytest.mark.parametrize("loaded", (False, True), ids=("made", "loaded"))
@pytest.mark.parametrize("family", (T5, BART), ids=("t5", "bart"))
def test_packed_keys_do_not_fit_caches_of_fixed_size(family: Family, loaded: bool, tmp_path):
    model, ids = compact(neural(family)), family.inputs()["input_ids"]
    if loaded:
        model.save_pretrained(tmp_path)
        model = from_pretrained(tmp_path)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **arguments)
    with pytest.raises(ValueError, match=r"packs the keys of 4 heads into 2, but not the values.*Use a DynamicCache"):
        model.generate(ids, **arguments, cache_implementation="static")
    assert torch.equal(model.generate(ids, **arguments, cache_implementation="dynamic"), expected)
    # says nothing of a model whose layers are as they were, nor where there are as many heads as before
    stock = family.model().generate(ids, **arguments, cache_implementation="static")
    assert torch.equal(stock, family.model().generate(ids, **arguments))
    wide = compact(neural(family, hidden_dims=(8, 2)))
    assert torch.equal(wide.generate(ids, **arguments, cache_implementation="static"), wide.generate(ids, **arguments))


def test_neural_cache_is_not_for_compact_models():
    for model in (compact(neural(GPT2)), neural_models.GPT2.neural(neural_layers="all", **neural_models.COMPACT)):
        with pytest.raises(ValueError, match="which is compact: its layers hand every cache keys that are projected already"):
            NeuralCache(model)
    with pytest.raises(ValueError, match="which is compact"):
        model.generate(torch.tensor([[3]]), cache_implementation="neural", max_new_tokens=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about itself
@pytest.mark.parametrize("family", (GPT2, T5, BART), ids=("gpt2", "t5", "bart"))
def test_keys_of_prefix_tuning_are_whole_ones(family: Family):
    from peft import PrefixTuningConfig, get_peft_model

    task = "CAUSAL_LM" if family is GPT2 else "SEQ_2_SEQ_LM"
    if task == "SEQ_2_SEQ_LM" and Version(version("peft")) < Version("0.21"):
        pytest.skip("until 0.21 peft asks encoders with decoders, stock ones too, for a method that Transformers 5.18 has not")
    inputs = {name: tensor for name, tensor in family.inputs().items() if name != "decoder_input_ids"}
    for model in (neural(family), compact(neural(family))):
        tuned = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=3))
        if patch_status(model)[0].compact:
            with pytest.raises(ValueError, match=r"is compact.*prefix tuning, another model\) made whole ones"):
                tuned(**inputs, labels=inputs["input_ids"])
        else:
            assert tuned(**inputs, labels=inputs["input_ids"]).loss.isfinite()


@pytest.mark.slow  # compiles C++ for quanto
def test_groups_of_a_quantised_cache_must_divide_the_keys():
    model = neural_models.GPT2.neural(neural_layers="all", neural_compact=True, neural_hidden_dims=[1, 1])
    settings = {"backend": "quanto", "nbits": 4, "residual_length": 3}
    arguments = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "quantized"}
    ids = torch.randint(3, 98, (1, 7))
    with pytest.raises(ValueError, match=r"1 numbers for each of 4 heads .*`q_group_size` that divides 4, such as 4"):
        model.generate(ids, cache_config=settings | {"q_group_size": 8}, **arguments)
    assert model.generate(ids, cache_config=settings | {"q_group_size": 4}, **arguments).shape == (1, 15)
