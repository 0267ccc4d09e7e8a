"""What `patch` refuses, with which words, and that nothing has changed then."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_neural_attention
from hf_neural_attention import patch, patch_status, unpatch
from hf_neural_attention.patching import (
    AlreadyPatchedError,
    NoPatchableLayerError,
    PatchError,
    ProbeError,
    UnsupportedLayerError,
)
from tests.helpers.neural_models import planned_layers, scorers
from tests.helpers.stock_models import FAMILIES, SIZES, small_model


GPT2 = FAMILIES["gpt2"]


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
    ({"hidden_dims": (4,)}, r'`hidden_dims` is \(4,\); it must be "auto", "paper" or two integers'),
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
        nn.Linear(2, 2), NoPatchableLayerError, "Linear cannot be reached.*none of its modules looks like attention"
    )
    bloom = small_model("bloom", hidden_size=32, n_layer=1, n_head=4)
    assert_refused(bloom, NoPatchableLayerError, r"BloomModel cannot be reached.*\(BloomAttention compute it themselves\)")
    with pytest.raises(TypeError, match="takes a model, not a GPT2Config"):
        patch(GPT2.model().config)


UNSUPPORTED = {
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
    assert_refused(small_model(model_type, **SIZES, **fields), UnsupportedLayerError, match, "all")


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
    assert planned_layers(Homemade(**arguments), ["layers.0"], example_inputs=STATES) == ["layers.0"]


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


def test_modules_without_an_implementation_are_eager():
    model = Homemade()
    for layer in model.layers:
        layer.config = PreTrainedConfig()
    assert layer.config._attn_implementation is None
    patch(model, "all", example_inputs=STATES)
    assert model(**STATES).shape == STATES["states"].shape


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
    assert planned_layers(model, "all", example_inputs=STATES) == ["layers.0", "layers.1"]
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
