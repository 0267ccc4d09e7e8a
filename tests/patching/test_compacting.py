"""`compact`: the same outputs with fewer numbers, round trips, what is refused, and what is said beforehand."""

import copy
import json
import re
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention

from hf_neural_attention import (
    NeuralCache,
    calibrate,
    compact,
    explain,
    from_pretrained,
    load_patch,
    patch,
    patch_status,
    save_patch,
    unpatch,
)
from hf_neural_attention.patching import AlreadyPatchedError, PatchError, UnsupportedLayerError
from hf_neural_attention.patching.sizes import size_of
from tests.helpers import neural_models
from tests.helpers.comparing import assert_far, assert_near, assert_same_state, run
from tests.helpers.stock_models import FAMILIES, IMAGE, SIZES, TEXT, Family
from tests.helpers.versions import CACHE


GPT2, VIT, BERT, T5, BART, LLAMA = (FAMILIES[name] for name in ("gpt2", "vit", "bert", "t5", "bart", "llama"))
FOLDED = ("gpt2", "vit", "bert", "roberta", "distilbert", "t5", "bart", "dinov2")
WITH_CLASSES = ("gpt2", "vit")
SETTINGS = {
    "shared": {"hidden_dims": (4, 2)},
    "per head": {"hidden_dims": (3, 2), "per_head": True},  # fills no whole number of heads
    "paper": {"proj_dim": 5, "init": "paper"},
}
# Of the outputs' size: rounding of one product more or less, through three layers
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}

every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
folded_families = pytest.mark.parametrize("family", [FAMILIES[name] for name in FOLDED], ids=FOLDED)


def neural(family: Family = GPT2, layers: Any = "all", dtype: torch.dtype = torch.float32, **settings) -> Any:
    """A patched model whose scorers have learned something, their biases too."""
    torch.manual_seed(0)
    model = patch(family.model(), layers, mode="replace", **({"hidden_dims": (4, 2)} | settings))
    with torch.no_grad():
        for scorer in neural_models.scorers(model):
            for parameter in scorer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def inputs_of(family: Family, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in family.inputs().items()}


def assert_refused(model: Any, error: type[Exception], match: str, **arguments) -> None:
    """With the reason, and the model is what it was, also after asking for a plan."""
    before, modules = copy.deepcopy(model), list(model.modules())
    for dry_run in (True, False):
        with pytest.raises(error, match=match):
            compact(model, dry_run=dry_run, **arguments)
    assert [*map(id, model.modules())] == [*map(id, modules)] and patch_status(model) == patch_status(before)
    assert_same_state(model, before)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]


@folded_families
@every_setting
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_outputs_stay(family: Family, settings: dict, dtype: torch.dtype):
    model, inputs = neural(family, dtype=dtype, **settings), inputs_of(family, dtype)
    expected, stock = run(model, **inputs), run(family.model().to(dtype), **inputs)
    assert compact(model) is model
    assert_near(family.seen(run(model, **inputs)), family.seen(expected), BOUNDS[dtype])
    assert_far(family.seen(expected), family.seen(stock))
    assert all(layer.compact and layer.proj_dim is None for layer in patch_status(model))


@pytest.mark.parametrize("family", (GPT2, VIT, BERT), ids=("gpt2", "vit", "bert"))
def test_half_precision_loses_no_more(family: Family):
    """The 2x rule, against the same model in float64."""
    exact, rounded = neural(family), neural(family, dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    truth = family.seen(run(exact.double(), **inputs_of(family, torch.float64)))

    def error() -> float:
        outputs = family.seen(run(rounded, **inputs_of(family, torch.bfloat16)))
        return (outputs.double() - truth).abs().max().item()

    before = error()
    compact(rounded)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert error() <= 2 * before


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_training_goes_on_alike(implementation: str):
    """Gradients of what both forms have, in training mode."""
    whole = neural(BERT, dtype=torch.float64).train()
    whole.set_attn_implementation(implementation)
    made = compact(copy.deepcopy(whole))
    inputs, gradients = BERT.inputs(), []
    for model in (whole, made):
        (model(**inputs).logits[inputs["attention_mask"].bool()] ** 2).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.scorer.linear2.weight"):
        assert_near(gradients[1][name], gradients[0][name], 1e-9)
    query = made.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert type(query) is nn.Linear and query.weight.shape == (16, 32) and query.weight.grad.abs().sum() > 0
    assert all(parameter.requires_grad for name, parameter in made.named_parameters() if not name.endswith("linear3.bias"))
    assert all(module.training for module in made.modules())


def test_rows_that_fill_a_head_stay_zero():
    model = compact(neural(BERT, hidden_dims=(3, 2)))
    key = model.get_submodule("bert.encoder.layer.0.attention.self.key")
    assert key.weight.shape == (16, 32) and not key.weight[12:].any() and key.weight[:12].any()
    model(**BERT.inputs()).logits.sum().backward()
    assert not key.weight.grad[12:].any() and not key.bias.grad[12:].any() and key.weight.grad[:12].any()


@pytest.mark.parametrize("layers", ([0], [1, 2]))
@pytest.mark.parametrize("family", (GPT2, BERT), ids=("gpt2", "bert"))
def test_other_layers_stay_to_the_bit(family: Family, layers: list[int]):
    model = neural(family, layers)
    before, others = copy.deepcopy(model), set(range(3)) - set(layers)
    compact(model)
    for index in others:
        name = family.layers[index]
        assert type(model.get_submodule(name)) is type(before.get_submodule(name))
        assert_same_state(model.get_submodule(name), before.get_submodule(name))


@pytest.mark.parametrize("family", (T5, BART), ids=("t5", "bart"))
@pytest.mark.parametrize("settings", ({}, {"per_head": True}), ids=("shared", "per head"))
def test_cross_attention(family: Family, settings: dict):
    model = neural(family, lambda name, module: re.search("encoder_attn|EncDec", name), **settings)
    expected = run(model, **family.inputs())
    tokens = model.generate(family.inputs()["input_ids"], max_new_tokens=6, do_sample=False)
    compact(model)
    assert_near(run(model, **family.inputs()), expected)
    assert torch.equal(model.generate(family.inputs()["input_ids"], max_new_tokens=6, do_sample=False), tokens)


def test_several_parts():
    side = {**SIZES, "num_hidden_layers": 2, "projection_dim": 16}
    config = CLIPConfig(
        text_config={**side, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 98},
        vision_config={**side, "image_size": 16, "patch_size": 4},
    )
    torch.manual_seed(0)
    clip = patch(CLIPModel(config).eval(), "all", mode="replace")
    inputs = {"input_ids": torch.randint(3, 98, (2, 9)), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image
        assert_near(compact(clip)(**inputs).logits_per_image, expected)
    assert len(patch_status(clip)) == 4


WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_conv_pos_embeddings": 4}
MORE = {
    "AlbertForMaskedLM": {**TEXT, "embedding_size": 16},  # one attention module for all layers
    "ElectraForMaskedLM": {**TEXT, "embedding_size": 16},
    "DeiTForImageClassification": IMAGE,
    "SwinForImageClassification": WINDOWS,  # hands its attention windows of an image as examples of a batch
    "Wav2Vec2ForCTC": {**SIZES, **CONVOLUTIONS, "num_conv_pos_embedding_groups": 2, "vocab_size": 99},
}


@pytest.mark.parametrize("name", MORE)
def test_more_families(name: str):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**MORE[name])).eval()
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.randint(3, 98, (2, 9))}
    if "Image" in name:
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif "CTC" in name:
        inputs = {"input_values": torch.randn(2, 800)}
    before = size_of(model)
    expected = run(patch(model, "all", mode="replace"), **inputs)
    assert_near(run(compact(model), **inputs), expected)
    assert size_of(model).num_parameters < before.num_parameters


def test_our_classes_inside_another_model(tmp_path):
    decoder = {**GPT2.model().config.to_dict(), "add_cross_attention": True, "is_decoder": True}
    config = VisionEncoderDecoderConfig(encoder=VIT.model().config.to_dict(), decoder=decoder)
    torch.manual_seed(0)
    model = patch(VisionEncoderDecoderModel(config).eval(), "all", mode="replace", hidden_dims=(4, 2))
    inputs = VIT.inputs() | {"decoder_input_ids": torch.randint(3, 98, (2, 5))}
    expected, before = run(model, **inputs), size_of(model).cache_bytes_per_token
    compact(model)
    assert_near(run(model, **inputs), expected)
    assert (before, size_of(model).cache_bytes_per_token) == (768, 576)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(from_pretrained(tmp_path), **inputs), run(model, **inputs))


@pytest.mark.parametrize("family", (GPT2, T5, BART), ids=("gpt2", "t5", "bart"))
@pytest.mark.parametrize("arguments", ({}, {"use_cache": False}, {"num_beams": 2}), ids=str)
def test_generation(family: Family, arguments: dict):
    model, inputs = neural(family, dtype=torch.float64), family.inputs()
    inputs.pop("decoder_input_ids", None)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, **arguments)
    assert torch.equal(compact(model).generate(**inputs, max_new_tokens=8, do_sample=False, **arguments), expected)


def test_a_cache_holds_what_the_plan_says():
    config = BertConfig(**{**TEXT, "is_decoder": True})
    for make in (GPT2.model, lambda: BertLMHeadModel(config).eval()):
        model = patch(make(), "all", mode="replace", hidden_dims=(4, 2))
        plan = compact(model, dry_run=True)
        compact(model)
        cache = model(torch.arange(3, 8).unsqueeze(0), use_cache=True)[CACHE]
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert held == 5 * plan.compact.cache_bytes_per_token == 5 * 0.75 * plan.stock.cache_bytes_per_token > 0


# --- models of this package


@neural_models.both_families
@pytest.mark.parametrize("fields", ({"neural_layers": "all"}, {"neural_layers": [1], "neural_per_head": True}), ids=str)
def test_models_of_this_package(family: Any, fields: dict, tmp_path):
    model, inputs = family.neural(neural_proj_dim=4, **fields), family.inputs(labels=False)
    expected, plan = run(model, **inputs), compact(model, dry_run=True)
    assert not model.config.neural_compact and torch.equal(run(model, **inputs), expected)
    compact(model)
    assert_near(run(model, **inputs), expected)
    assert model.config.neural_compact and model.config.neural_folded_from == type(model).__name__
    assert plan.layers == patch_status(model) and plan.compact == size_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(from_pretrained(tmp_path), **inputs), run(model, **inputs))


# --- plans


@pytest.mark.parametrize("family", (GPT2, BERT, T5), ids=("gpt2", "bert", "t5"))
def test_dry_run_says_what_compact_then_does(family: Family):
    model = neural(family).train()
    before, modules, random = copy.deepcopy(model), [*map(id, model.modules())], torch.get_rng_state()
    plan = compact(model, dry_run=True)
    assert [*map(id, model.modules())] == modules and torch.equal(torch.get_rng_state(), random)
    assert_same_state(model, before)
    assert (plan.stock, plan.whole) == (size_of(family.model()), size_of(model))
    assert plan.whole.num_bytes == model.get_memory_footprint()
    compact(model)
    assert plan.layers == patch_status(model) and plan.compact == size_of(model) and plan.backends == explain(model)
    assert plan.compact.num_bytes == model.get_memory_footprint() < plan.stock.num_bytes < plan.whole.num_bytes
    text = str(plan)
    assert repr(plan) == text and f"{len(plan.layers)} attention layers would be compact" in text
    assert re.search(rf"compact +{plan.compact.num_parameters:,} +{plan.compact.num_bytes:,}", text)
    assert ("no cache" in text) == (family is BERT)


def test_status_is_plain_data():
    first, *_ = json.loads(json.dumps([layer._asdict() for layer in patch_status(compact(neural(GPT2)))]))
    assert first == {
        "layer": "transformer.h.0.attn",
        "head_dim": 4,
        "proj_dim": None,
        "hidden_dims": [4, 2],
        "mode": "replace",
        "per_head": False,
        "init": "mirrored",
        "compact": True,
        "num_parameters": 13,
        "num_bytes": 52,
    }


# --- what is refused


@pytest.mark.parametrize(
    ("model_type", "match"),
    [
        ("llama", "queries are not what a linear layer makes.*rotary"),
        ("qwen3", "rotary positions, a norm"),
        ("gpt_neox", "put together of several parts"),
        ("modernbert", "not what a linear layer makes"),
        ("opt", "counts heads by itself"),
    ],
)
def test_families_that_are_refused(model_type: str, match: str):
    assert_refused(neural(FAMILIES[model_type]).train(), UnsupportedLayerError, match)


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
        (lambda query: torch.zeros_like(query), "do not come from a linear layer"),
    ],
)
def test_queries_that_are_treated(meddle: Any, match: str):
    model = neural(FAMILIES["dinov2"], [1])
    attention = model.get_submodule(FAMILIES["dinov2"].layers[1])
    attention.q_proj = Meddling(attention, meddle)
    assert_refused(model, UnsupportedLayerError, f"queries.*{match}")


def test_a_constant_factor_of_the_module_is_folded():
    model, inputs = neural(FAMILIES["dinov2"], [1]), FAMILIES["dinov2"].inputs()
    attention = model.get_submodule(FAMILIES["dinov2"].layers[1])
    attention.q_proj = Meddling(attention, lambda query: query * attention.scaling)
    expected = run(model, **inputs)
    assert_near(run(compact(model), **inputs), expected)


class KeysForMore(Dinov2Attention):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(hidden_states, **kwargs)
        return output + self.k_proj(hidden_states).mean(), weights


def test_keys_that_serve_for_more_than_scores():
    model = neural(FAMILIES["dinov2"], [1])
    model.get_submodule(FAMILIES["dinov2"].layers[1]).__class__ = KeysForMore
    assert_refused(model, UnsupportedLayerError, "would change beyond rounding, so its queries and keys are used for more")


def test_a_layer_that_makes_values_as_well_stays_for_these():
    model, inputs = neural(FAMILIES["dinov2"], [1]), FAMILIES["dinov2"].inputs()
    attention = model.get_submodule(FAMILIES["dinov2"].layers[1])
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


def test_neural_cache_is_not_for_compact_models():
    for model in (compact(neural(GPT2)), neural_models.GPT2.neural(neural_layers="all", **neural_models.COMPACT)):
        with pytest.raises(ValueError, match="which is compact: its layers hand every cache keys that are projected already"):
            NeuralCache(model)
    with pytest.raises(ValueError, match="which is compact"):
        model.generate(torch.tensor([[3]]), cache_implementation="neural", max_new_tokens=2)
