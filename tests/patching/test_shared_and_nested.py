"""Patched models that become parts of others, share modules or weights among layers, or are stopped half-way."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
)

from hf_neural_attention import (
    analysis,
    calibrate,
    compact,
    from_pretrained,
    load_patch,
    patch,
    patch_status,
    patched,
    save_patch,
    unpatch,
)
from hf_neural_attention.patching import PatchError
from tests.helpers.compacted_models import neural
from tests.helpers.comparing import assert_same_state, run
from tests.helpers.stock_models import FAMILIES
from tests.patching.test_patch_refusals import STATES, Homemade


GPT2, BERT = FAMILIES["gpt2"], FAMILIES["bert"]


def cross_attending(**fields: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=32, add_cross_attention=True, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("form", ("residual", "replace", "compact"))
def test_scorers_stay_what_they_are_in_a_larger_model(form: str):
    """Transformers' composite models initialise at the end what they do not know to be initialised."""
    encoder = patch(BERT.model(), "all") if form == "residual" else neural(BERT)
    encoder = compact(encoder) if form == "compact" else encoder
    before = copy.deepcopy(encoder.bert)
    decoder = BertLMHeadModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            vocab_size=99,
            is_decoder=True,
            add_cross_attention=True,
        )
    )
    whole = EncoderDecoderModel(encoder=encoder.bert, decoder=decoder)
    assert_same_state(whole.encoder, before)


class Tying(BertForMaskedLM):
    """Shares attention among layers by their weights, as Zamba does."""

    _tied_weights_keys = {
        **BertForMaskedLM._tied_weights_keys,
        r"bert.encoder.layer.(?!0\.)\d+.attention.self": "bert.encoder.layer.0.attention.self",
    }


@pytest.mark.parametrize("form", ("replace", "compact"))
def test_layers_that_share_weights_have_scorers_of_their_own(form: str):
    torch.manual_seed(0)
    model = Tying(BERT.model().config).eval()
    attention = [layer.attention.self for layer in model.bert.encoder.layer]
    assert attention[1].value.weight is attention[0].value.weight and attention[1].query.weight is attention[0].query.weight
    patch(model, "all", mode="replace", hidden_dims=(4, 2))
    if form == "compact":
        compact(model)
    own = [(layer.scorer.linear2.weight, layer.query.weight, layer.key.weight) for layer in attention]
    names, before = list(model.state_dict()), run(model, **BERT.inputs())
    model.tie_weights()
    assert list(model.state_dict()) == names and torch.equal(run(model, **BERT.inputs()), before)
    model.resize_token_embeddings(120)
    for layer, (*weights,) in zip(attention, own, strict=True):
        assert all(
            a is b for a, b in zip((layer.scorer.linear2.weight, layer.query.weight, layer.key.weight), weights, strict=True)
        )
    assert own[0][0] is not own[1][0] and (own[0][1] is own[1][1]) == (form == "replace")
    assert attention[1].value.weight is attention[0].value.weight
    if form == "replace":
        unpatch(model)
        assert "get_expanded_tied_weights_keys" not in vars(model)


def test_a_module_with_two_names_is_patched_once(tmp_path):
    def shared() -> Any:
        model = GPT2.model()
        model.transformer.h[2] = model.transformer.h[0]
        return model

    model, inputs = shared(), GPT2.inputs() | {"use_cache": False}
    stock = run(model, **inputs)
    patch(model, "all", mode="replace")
    expected = run(model, **inputs)
    status = patch_status(model)
    assert [layer.layer for layer in status] == [f"transformer.h.{index}.attn" for index in (0, 1)]
    drawn = [parameter.numel() for name, parameter in model.named_parameters() if ".scorer." in name]
    assert status.num_parameters == sum(drawn)
    save_patch(model, tmp_path)
    again = load_patch(shared(), tmp_path)
    assert torch.equal(run(again, **inputs), expected)
    assert len(calibrate(model, [inputs] * 2, steps=2, progress=False)) == 2
    unpatch(model)
    assert not patch_status(model) and torch.equal(run(model, **inputs), stock)
    with patched(model, "all"):
        assert patch_status(model)
    assert not patch_status(model)


def test_a_calibration_that_fails_changes_nothing():
    model = cross_attending()
    patch(model, lambda name, _: name.endswith(("attn", "crossattention")), mode="replace")
    before, inputs = copy.deepcopy(model), {"input_ids": torch.randint(3, 99, (2, 8))}
    with pytest.raises(PatchError, match=r"does not reach 'transformer.h.0.crossattention'"):
        calibrate(model, [inputs] * 2, steps=3, progress=False)
    assert_same_state(model, before)


def test_what_calibration_reports_is_what_the_model_has():
    model = neural(GPT2, [0], dtype=torch.bfloat16)
    data = [GPT2.inputs()] * 2
    reported = calibrate(model, data, steps=20, progress=False)
    again = calibrate(copy.deepcopy(model), data, steps=1, progress=False)
    assert [layer.kl_before for layer in again] == pytest.approx([layer.kl_after for layer in reported], rel=1e-5)


def test_padding_does_not_count_in_cross_attention_of_a_decoder_alone():
    model = patch(cross_attending(), lambda name, _: name.endswith("crossattention"), mode="replace")
    states, ids = torch.randn(1, 5, 32), torch.randint(3, 99, (1, 6))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "encoder_hidden_states": states}
    padding = torch.zeros(1, 3, dtype=ids.dtype)
    padded = short | {
        "input_ids": torch.cat((ids, padding), 1),
        "attention_mask": torch.cat((torch.ones_like(ids), padding), 1),
    }
    for look in (analysis.scorer_health, analysis.score_statistics):
        expected, found = ([layer for layer in look(model, **inputs) if "cross" in layer.layer] for inputs in (short, padded))
        for one, other in zip(expected, found, strict=True):
            assert one.entropy == pytest.approx(other.entropy, rel=1e-5)


def test_a_stock_model_loaded_from_a_neural_checkpoint_is_stock(tmp_path):
    from_neural = patch(GPT2.model(), "all")
    from_neural.save_pretrained(tmp_path)
    assert type(from_pretrained(tmp_path)).__name__ == "NeuralGPT2LMHeadModel"
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert hasattr(model.config, "neural_layers")
    assert len(patch_status(patch(model, [1]))) == 1


def test_modules_without_an_implementation_see_all_keys_in_statistics():
    """As in their forward, which is eager there."""
    found = []
    for implementation in ("eager", None):
        torch.manual_seed(0)
        model = Homemade()
        for layer in model.layers:
            layer.config = PreTrainedConfig(attn_implementation=implementation)
        found.append(analysis.score_statistics(model, **STATES))
    assert found[0] == found[1]
