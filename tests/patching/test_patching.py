"""What `patch` and its companions accept, refuse, report and leave alone."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_neural_attention
from hf_neural_attention import NeuralScorer, explain, patch, patch_status, patched, unpatch
from hf_neural_attention.models.neural_attention_interface import attach_scorer
from hf_neural_attention.patching import (
    AlreadyPatchedError,
    NoPatchableLayerError,
    PatchError,
    ProbeError,
    UnsupportedLayerError,
)
from hf_neural_attention.patching.sizes import size_of
from tests.helpers.comparing import assert_far, assert_near, run
from tests.helpers.neural_models import scorers
from tests.helpers.stock_models import FAMILIES, SIZES


GPT2, T5, LLAMA = FAMILIES["gpt2"], FAMILIES["t5"], FAMILIES["llama"]


class Attention(nn.Module):
    """One that is like Transformers' own, with what a test wants to be peculiar about it."""

    def __init__(self, config: Any, size: int = 8, **arguments: Any):
        super().__init__()
        self.config, self.size, self.arguments = config, size, arguments
        self.projection = nn.Linear(32, 96)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projection(hidden_states).unflatten(-1, (3, -1, self.size)).transpose(1, -2).unbind(2)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return function(self, query, key, value, self.arguments.pop("attention_mask", None), **self.arguments)[0].flatten(2)


class Homemade(nn.Module):
    """Two layers that nobody at Transformers knows."""

    def __init__(self, **arguments: Any):
        super().__init__()
        self.config = PreTrainedConfig(attn_implementation="sdpa")
        self.layers = nn.ModuleList([Attention(self.config), Attention(self.config, **arguments)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = states + layer(states)
        return states


STATES = {"states": torch.randn(2, 6, 32)}


def tiny(model_type: str, **fields) -> Any:
    return AutoModel.from_config(AutoConfig.for_model(model_type, vocab_size=99, **fields))


def names(model: nn.Module, layers: Any, **settings) -> list[str]:
    return [layer.layer for layer in patch(model, layers, dry_run=True, **settings).layers]


def assert_refused(model: Any, error: type, match: str, *arguments, **settings) -> None:
    """And the model, its config and the random numbers are what they were."""
    before = copy.deepcopy(model.state_dict()), [id(getattr(module, "config", None)) for module in model.modules()]
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    with pytest.raises(error, match=match) as raised:
        patch(model, *arguments, **settings)
    assert isinstance(raised.value, ValueError)
    assert before[0].keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())
    assert before[1] == [id(getattr(module, "config", None)) for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), random) and modes == [module.training for module in model.modules()]


@pytest.mark.parametrize(
    ("layers", "indices"),
    [((0,), [0]), ([-1], [2]), ([2, 0], [0, 2]), (range(1, 3), [1, 2]), ("all", [0, 1, 2]), ([0, -1], [0, 2])],
    ids=str,
)
def test_indices_count_each_stack_by_itself(layers: Any, indices: list[int]):
    for family in (GPT2, T5):
        assert names(family.model(), layers) == [stack.replace("*", str(i)) for stack in family.stacks for i in indices]


def test_names_and_predicates():
    model = T5.model()
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert names(model, [cross, "encoder.block.0.layer.0.SelfAttention"]) == ["encoder.block.0.layer.0.SelfAttention", cross]
    assert names(model, lambda name, module: module.is_causal) == T5.layers[3:]
    assert len(names(model, lambda name, module: True)) == 9


def test_stacks_of_every_kind():
    clip = AutoConfig.for_model("clip")
    for part in (clip.text_config, clip.vision_config):
        part.hidden_size, part.num_hidden_layers, part.num_attention_heads, part.intermediate_size = 32, 3, 4, 48
    clip.text_config.vocab_size, clip.vision_config.image_size, clip.vision_config.patch_size = 99, 16, 4
    model = AutoModel.from_config(clip)
    assert names(model, [-1]) == ["text_model.encoder.layers.2.self_attn", "vision_model.encoder.layers.2.self_attn"]
    crossing = GPT2.model(add_cross_attention=True)
    assert names(crossing, "all") == GPT2.layers
    assert names(crossing, lambda name, module: module.is_cross_attention)[0] == "transformer.h.0.crossattention"
    # counts stages of blocks as one stack, and shared weights as one layer
    swin = tiny("swin", embed_dim=16, depths=[1, 2], num_heads=[2, 4], image_size=32, window_size=4, patch_size=2)
    blocks = ["0.blocks.0", "1.blocks.0", "1.blocks.1"]
    assert names(swin, "all") == [f"encoder.layers.{block}.attention" for block in blocks]
    assert {layer.head_dim for layer in patch(swin, "all", dry_run=True).layers} == {8}
    albert = tiny("albert", embedding_size=16, **SIZES)
    assert names(albert, "all") == ["encoder.albert_layer_groups.0.albert_layers.0.attention"]
    # mixes two kinds of attention, of which one fetches its function
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    assert names(tiny("qwen3_next", num_experts=2, num_experts_per_tok=1, head_dim=8, layer_types=kinds, **SIZES), [0]) == [
        "layers.1.self_attn"
    ]


BAD_LAYERS = {
    "out of range": ([3], PatchError, r"3 is no layer of 'transformer.h.\*.attn', which has 3 \(indices from -3 to 2\)"),
    "empty": ([], NoPatchableLayerError, "`layers` is empty"),
    "twice": ([0, 0], PatchError, "names a layer twice"),
    "twice in effect": ([0, -3], PatchError, "names a layer of 'transformer.h.*' twice, as it has 3"),
    "word": ("first", PatchError, r"`layers` is 'first'; it must be \"all\", a list of indices, a list of names"),
    "number": (0, PatchError, "`layers` is 0; it must be"),
    "bool": ([True], PatchError, "it must be"),
    "mixed": ([0, "transformer.h.1.attn"], PatchError, "it must be"),
    "unknown name": (
        ["transformer.h.9.attn"],
        PatchError,
        "`layers` names 'transformer.h.9.attn'; the attention modules .* are",
    ),
    "nothing": (lambda name, module: False, NoPatchableLayerError, "true for none of .*: 'transformer.h.0.attn', "),
}


@pytest.mark.parametrize(("layers", "error", "match"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_bad_layers(layers: Any, error: type, match: str):
    assert_refused(GPT2.model(), error, match, layers)


BAD_SETTINGS = [
    ({"proj_dim": 0}, "`proj_dim` is 0; it must be None or an integer of at least 1"),
    ({"proj_dim": 2.0}, "`proj_dim` is 2.0"),
    ({"hidden_dims": (4,)}, r"`hidden_dims` is \(4,\); it must be None or two integers"),
    ({"hidden_dims": 4}, "`hidden_dims` is 4"),
    ({"mode": "both"}, "`mode` is 'both'; it must be one of 'replace', 'residual'"),
    ({"init": "zeros"}, "`init` is 'zeros'; it must be one of"),
    ({"per_head": 1}, "`per_head` is 1; it must be True or False"),
]


@pytest.mark.parametrize(("settings", "match"), BAD_SETTINGS, ids=str)
def test_bad_settings(settings: dict, match: str):
    assert_refused(GPT2.model(), ValueError, match, **settings)


def test_models_without_the_interface():
    assert_refused(
        nn.Linear(2, 2), NoPatchableLayerError, "Linear cannot be patched.*none of its modules looks like attention"
    )
    bloom = tiny("bloom", hidden_size=32, n_layer=1, n_head=4)
    assert_refused(bloom, NoPatchableLayerError, r"BloomModel cannot be patched.*\(BloomAttention compute it themselves\)")
    with pytest.raises(TypeError, match="takes a model, not a GPT2Config"):
        patch(GPT2.model().config)


UNSUPPORTED = {
    "gemma2": ({"head_dim": 8, "num_key_value_heads": 2}, "soft-capping of attention scores (`softcap`)"),
    "gpt_oss": ({"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 4}, "attention sinks (`s_aux`)"),
    "deepseek_v32": (
        {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1}
        | {"topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        "sparse attention to keys that an indexer has selected (`indices`)",
    ),
}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_features_that_a_score_network_cannot_honour(model_type: str):
    fields, feature = UNSUPPORTED[model_type]
    match = f"'layers.0.self_attn', 'layers.1.self_attn', 'layers.2.self_attn': {re.escape(feature)}.*Nothing was changed"
    assert_refused(tiny(model_type, **SIZES, **fields), UnsupportedLayerError, match, "all")


PECULIAR = {
    "unknown argument": ({"tilt": 0.5}, "an argument `tilt` of its attention function, of which it is not known"),
    "flat mask": ({"attention_mask": torch.ones(2, 6)}, r"masks that are not \[batch, heads, queries, keys\] \(torch.Size"),
    "odd mask": ({"attention_mask": "block"}, r"masks that are not .* \(str\)"),
}


@pytest.mark.parametrize(("arguments", "match"), PECULIAR.values(), ids=PECULIAR)
def test_peculiar_layers(arguments: dict, match: str):
    model = Homemade(**arguments)
    assert_refused(model, UnsupportedLayerError, f"'layers.1': {match}", "all", example_inputs=STATES)
    # checks that the layer beside it can still be patched
    assert names(Homemade(**arguments), ["layers.0"], example_inputs=STATES) == ["layers.0"]


def test_unclear_heads():
    class Twice(Attention):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            self.size = 24 - self.size
            return super().forward(hidden_states)

    model = Homemade()
    model.layers[0] = model.layers[1] = Twice(model.config)
    with pytest.raises(UnsupportedLayerError, match="heads whose number or size is not always the same"):
        patch(model, ["layers.0"], example_inputs=STATES)


def test_a_scorer_of_somebody_else():
    model = GPT2.model()
    model.transformer.h[1].attn.scorer = nn.Linear(2, 2)
    assert_refused(model, UnsupportedLayerError, "'transformer.h.1.attn': its GPT2Attention has an attribute `scorer`", "all")


@pytest.mark.parametrize(
    ("implementation", "match"),
    [
        ("flash_attention_2", "its masks come in a form"),
        ("flex_attention", "its masks"),
    ],
)
def test_implementations_that_are_not_supported(implementation: str, match: str):
    model = GPT2.model()
    model.config._attn_implementation = implementation
    assert_refused(
        model, UnsupportedLayerError, f"cannot use `attn_implementation={re.escape(repr(implementation))}`.*{match}"
    )


def test_models_that_cannot_be_run():
    assert_refused(Homemade(), ProbeError, r"'layers.\*' do could not be seen.*Give `example_inputs=`")
    assert_refused(Homemade(), ProbeError, "'layers.0' would ask .* could not be seen", ["layers.0"])
    assert_refused(Homemade(), ProbeError, r"Homemade said: TypeError: .*wrong", example_inputs={"wrong": 1})
    model = patch(Homemade(), "all", example_inputs=STATES)
    assert len(patch_status(model)) == 2 and model(**STATES).shape == (2, 6, 32)


class Branching(Homemade):
    """Looks at numbers, which the probe without them cannot."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.seen = (self.training, torch.is_grad_enabled(), type(states))
        return super().forward(states * float(states.sum() > 0) + torch.rand(()))


def test_models_that_branch_run_once_and_notice_nothing():
    model = Branching().train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert names(model, "all", example_inputs=STATES) == ["layers.0", "layers.1"]
    assert model.seen == (False, False, torch.Tensor)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.layers[0].config is model.config


def test_the_probe_calls_no_hook_and_needs_no_numbers():
    with torch.device("meta"):
        huge = GPT2LMHeadModel(GPT2Config(n_embd=12288, n_layer=8, n_head=96))  # takes GPT-3's width, for 15 billion numbers
    huge.register_forward_hook(lambda *arguments: pytest.fail("a hook of the model was called"))
    plan = patch(huge, dry_run=True)
    assert plan.layers[0].head_dim == 128 and plan.model_parameters > 1.4e10
    patch(huge)
    assert scorers(huge)[0].linear1.weight.is_meta


def test_patched_already():
    model = patch(GPT2.model(), [1])
    for layers in ([1], [0]):
        with pytest.raises(AlreadyPatchedError, match=r"is patched already, in 'transformer.h.1.attn'.*unpatch"):
            patch(model, layers)
    assert [layer.layer for layer in patch_status(model)] == ["transformer.h.1.attn"]
    unpatch(model)
    for _ in range(2):
        with pytest.raises(PatchError, match="is not patched"):
            unpatch(model)


def test_models_that_are_neural_by_their_class():
    model = hf_neural_attention.NeuralGPT2LMHeadModel(hf_neural_attention.NeuralGPT2Config(n_embd=32, n_layer=2, n_head=4))
    assert_refused(model, AlreadyPatchedError, "has neural layers by its class.*neural_layers", [1])
    with pytest.raises(PatchError, match="by its class and config"):
        unpatch(model)
    assert len(patch_status(model)) == 1


def test_after_wrapping_it_is_too_late(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(GPT2.model())
        assert_refused(model, PatchError, "DistributedDataParallel has taken over the parameters")
    finally:
        torch.distributed.destroy_process_group()


SETTINGS = {"proj_dim": 4, "hidden_dims": [6, 3], "mode": "replace", "per_head": True, "init": "paper"}


def test_dry_run_says_what_patch_then_does():
    model = GPT2.model()
    random = torch.get_rng_state()
    plan = patch(model, [0, 2], dry_run=True, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), random) and not scorers(model) and not patch_status(model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    patch(model, [0, 2], **SETTINGS)
    assert patch_status(model) == plan.layers and explain(model) == plan.backends
    added = sum(parameter.numel() for scorer in scorers(model) for parameter in scorer.parameters())
    assert (plan.layers.num_parameters, plan.layers.num_bytes, plan.model_parameters) == (added, 4 * added, numbers)
    assert plan.stock == size_of(GPT2.model()) and plan.patched == size_of(model) and plan.stock.cache_bytes_per_token == 768
    text = str(plan)
    assert repr(plan) == text and f"2 attention layers would become neural, with {added:,} new parameters" in text
    assert re.search(r"transformer.h.2.attn +8 +4 +\(6, 3\) +replace +True +paper", text) and "backend" in text


def test_status_is_plain_data():
    model = GPT2.model()
    assert not patch_status(model) and str(patch_status(model)) == "no neural layer"
    patch(model, "all", **SETTINGS)
    status = patch_status(model)
    first, *_ = json.loads(json.dumps([layer._asdict() for layer in status]))
    assert first == {
        "layer": "transformer.h.0.attn",
        "head_dim": 8,
        **SETTINGS,
        "compact": False,
        "num_parameters": 604,
        "num_bytes": 2416,
    }
    assert str(status).splitlines()[-1].split() == ["total", "1,812", "7,248"]


def test_settings_reach_the_scorers():
    scorer = scorers(patch(LLAMA.model(), **SETTINGS))[0]
    assert (scorer.proj_dim, scorer.hidden_dims, scorer.mode, scorer.num_heads, scorer.init) == (
        4,
        (6, 3),
        "replace",
        4,
        "paper",
    )
    trainable = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in scorer.named_parameters()} - {"linear3.bias"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("training", (False, True))
def test_scorers_are_as_their_layer(dtype: torch.dtype, training: bool):
    model = patch(GPT2.model().to(dtype).train(training))
    (scorer,) = scorers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(module.training == training for module in scorer.modules())


def test_frozen_models_stay_frozen():
    model = GPT2.model().requires_grad_(False)
    patch(model)
    assert {name.split(".scorer.")[-1] for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in NeuralScorer(8).named_parameters() if parameter.requires_grad
    }


def test_patched_restores_after_an_exception():
    model, inputs = GPT2.model(), GPT2.inputs()
    expected = run(model, **inputs)

    def fail() -> None:
        with patched(model, "all", mode="replace") as same:
            assert same is model
            assert_far(run(model, **inputs), expected)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert not patch_status(model) and torch.equal(run(model, **inputs), expected)
    with patched(model):
        unpatch(model)
    with pytest.raises(PatchError), patched(model, [7]):
        pytest.fail("the block ran")
    assert torch.equal(run(model, **inputs), expected)


def test_no_other_model_notices():
    model, inputs = GPT2.model(), GPT2.inputs()
    twin = GPT2LMHeadModel(model.config).eval()  # shares the config object
    assert twin.config is model.config
    twin.load_state_dict(model.state_dict())
    expected, functions = run(twin, **inputs), dict(ALL_ATTENTION_FUNCTIONS)
    patch(model, "all", mode="replace")
    assert_far(run(model, **inputs), expected)
    assert torch.equal(run(twin, **inputs), expected) and not patch_status(twin)
    assert torch.equal(run(GPT2.model(), **inputs), expected)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions and model.config._attn_implementation == "sdpa"
    with patched(twin, [1]):
        assert len(patch_status(model)) == 3
    assert torch.equal(run(twin, **inputs), expected)


def test_unpatching_what_was_attached_by_hand():
    model, inputs = GPT2.model(), GPT2.inputs()
    expected = run(model, **inputs)
    attach_scorer(model.transformer.h[0].attn, NeuralScorer(8))
    assert [layer.mode for layer in patch_status(model)] == ["replace"]
    assert torch.equal(run(unpatch(model), **inputs), expected)


def test_position_biases_count_in_both_modes():
    model, inputs = T5.model(), T5.inputs()
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    for mode in ("residual", "replace"):
        with patched(model, "all", mode=mode):
            expected = run(model, **inputs)
            with torch.no_grad():
                bias.weight.mul_(-3)
                assert_far(run(model, **inputs), expected)
                bias.weight.div_(-3)
            model(**inputs).logits.square().mean().backward()
            assert bias.weight.grad.abs().max() > 0
            model.zero_grad()
            assert_near(run(model, **inputs), expected)
