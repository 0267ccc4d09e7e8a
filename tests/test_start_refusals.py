"""What `start_scores` and the statistics of scores cannot do, or would do wrong, is said with its reason."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3Model,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2Model,
)

from hf_neural_attention import analysis, patch, start_scores
from hf_neural_attention.analysis import ScoreCallback
from tests.helpers.comparing import assert_same_state
from tests.test_scores import refused


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"input_ids": torch.arange(3, 67).reshape(4, 16)}


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=99, **fields)).eval()


def test_a_layer_that_runs_again_and_again_is_looked_at_each_time_and_not_started():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3}
    model: Any = AlbertModel(AlbertConfig(**sizes, vocab_size=99, embedding_size=16)).eval()
    states: dict[str, list[torch.Tensor]] = {"query": [], "key": []}
    attention = model.encoder.albert_layer_groups[0].albert_layers[0].attention
    for name, found in states.items():
        hook = lambda layer, args, output, found=found: found.append(output.unflatten(-1, (4, 8)).transpose(1, 2))  # noqa: E731
        getattr(attention, name).register_forward_hook(hook)
    with torch.no_grad():
        model(**IDS)
    scores = torch.stack([query @ key.mT / 8**0.5 for query, key in zip(*states.values(), strict=True)])
    (layer,) = analysis.score_statistics(model, **IDS)
    assert len(scores) == 3 and layer.spread == pytest.approx(scores.var(-1).mean().sqrt().item(), rel=1e-4)
    refused(model, "it runs several times in one forward, on other states each time", IDS)
    # is right in every run where it is zero
    start_scores(model, IDS, 0.0)
    assert analysis.score_statistics(model, **IDS)[0].spread == 0.0


class Pairs(torch.nn.Module):
    """Runs one model on two batches of the same kind, as training on pairs does."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, others: torch.Tensor) -> Any:
        return self.model(input_ids).logits - self.model(others).logits


def test_a_layer_that_runs_again_on_the_like_is_started():
    torch.manual_seed(0)
    model = Pairs(llama())
    first, second = torch.randint(3, 99, (2, 32, 24))
    start_scores(model, {"input_ids": first, "others": second})
    found = analysis.score_statistics(model, input_ids=first, others=second)
    assert [layer.spread for layer in found] == pytest.approx([1.0, 1.0], rel=0.02)


def test_the_health_of_a_scorer_is_that_of_all_its_calls():
    torch.manual_seed(0)
    model: Any = AlbertModel(AlbertConfig(**{**SIZES, "num_hidden_layers": 3}, vocab_size=99, embedding_size=16)).eval()
    patch(model, mode="replace", proj_dim=4)
    (layer,) = analysis.scorer_health(model, **IDS)
    (statistics,) = analysis.score_statistics(model, **IDS)
    assert layer.entropy == pytest.approx(statistics.entropy, rel=1e-5)
    assert layer.dead == 0 and 0 < layer.active_pairs <= 1


def test_layers_that_the_inputs_do_not_reach_are_named():
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_id=98, mm_tokens_per_image=4)
    model: Any = Gemma3Model(config).eval()
    names = ["vision_tower.encoder.layers.0.self_attn", "language_model.layers.0.self_attn"]
    refused(model, rf"No run of the model reached '{names[0]}', which `layers` names", IDS, layers=names)
    report = start_scores(model, IDS)
    assert report.unreached == tuple(f"vision_tower.encoder.layers.{number}.self_attn" for number in (0, 1))
    assert f"not reached, and left as they were: {names[0]!r}" in str(report) and len(report) == 2
    assert start_scores(model).unreached == ()
    for layers in ("all", [0], lambda name, module: True):  # mean layers of each stack, and not that one
        assert start_scores(model, IDS, layers=layers, allow_trained=True).unreached[0] == names[0]


def test_states_that_are_small_beside_the_constant_of_a_norm_have_no_closed_form():
    torch.manual_seed(0)
    model: Any = Olmo2Model(Olmo2Config(**SIZES, vocab_size=99, pad_token_id=0, eos_token_id=1)).eval()
    refused(model, "what a norm before its scores hands on has not the size of its gains; give `inputs`")
    start_scores(model, IDS)
    assert [layer.spread for layer in analysis.score_statistics(model, **IDS)] == pytest.approx([1.0, 1.0], rel=0.01)


def test_scores_that_are_no_numbers_show_in_the_statistics():
    model = llama()
    model.model.embed_tokens.weight.data[3] = torch.nan  # is the first token of one example of four
    for layer in analysis.score_statistics(model, **IDS):
        assert all(np.isnan([layer.spread, layer.entropy, layer.saturated])) and layer.uniform_entropy > 1.0
    refused(model, "its queries or keys are no numbers", IDS)
    # leaves keys out that are padding; what the layer makes of their values is no number
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, 0] = 0
    padded = analysis.score_statistics(model, **IDS, attention_mask=mask)
    assert list(np.isnan([layer.spread for layer in padded])) == [False, True]


def test_latent_attention_has_no_closed_form():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    torch.manual_seed(0)
    config = DeepseekV3Config(**SIZES, **latent, num_key_value_heads=4, vocab_size=99, first_k_dense_replace=2, pad_token_id=0)
    model: Any = DeepseekV3ForCausalLM(config).eval()
    refused(model, "more than one of its layers makes its queries or its keys; give `inputs`")
    assert len(start_scores(model, IDS)) == 2


def test_reasons_are_those_of_the_case():
    zero = llama()
    start_scores(zero, IDS, 0.0)
    refused(zero, "its queries or keys are zero, which no factor changes", IDS)
    broken = llama()
    broken.model.layers[0].self_attn.q_proj.weight.data.fill_(torch.nan)
    refused(broken, "its queries or keys are no numbers, or too large", IDS)
    refused(llama(), "its scores are no numbers, or too large", IDS, 1e30)
    refused(llama(), "no query of these inputs may see two keys or more", {"input_ids": torch.tensor([[5]])})
    torch.manual_seed(0)
    capped: Any = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, vocab_size=99)).eval()
    refused(capped, r"cannot spread by 8\.0: dot products are capped at 50\.0 there, and spread by 7\.\d+ instead", IDS, 8.0)


def test_arguments_of_other_types():
    for spread in (np.float32(1), np.int64(1), 1):
        assert len(start_scores(llama(), IDS, spread, layers=[np.int64(0)])) == 1
    for spread in (float("inf"), float("nan"), 10**400, -1, True, "1", None):
        refused(llama(), "it must be a finite number of at least zero", IDS, spread)
    for inputs, name in ((IDS["input_ids"], "Tensor"), ([IDS], "list")):
        refused(llama(), f"`inputs` is a {name}; expected a dict of what the model's forward takes", inputs)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=99))
    with pytest.raises(ValueError, match="has weights without numbers"):
        analysis.score_statistics(empty, **IDS)


def test_virtual_tokens_are_refused():
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model: Any = get_peft_model(llama(), prefix)
    with pytest.raises(ValueError, match="Start the model that `get_peft_model` gets"):
        start_scores(model, IDS)
    assert_same_state(model.get_base_model(), llama())


@pytest.mark.parametrize("every", (0, -1, 1.5, None, "2", True))
def test_a_callback_looks_at_every_so_many_th_log(every: Any):
    with pytest.raises(ValueError, match=r"`every` is .*; it must be a whole number of at least one"):
        ScoreCallback(IDS, every=every)
