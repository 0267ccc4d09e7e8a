"""What only GPT-2 has: causality, padding, masks, packed sequences, cross-attention, its heads.

A residual scorer is born as the plain dot product, so a residual twin of a stock model must do what the stock model does,
whatever it is called with, while every layer of it goes through our attention function.
"""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from tests.helpers.comparing import assert_far, assert_near, assert_same_gradients, backward, run
from tests.helpers.neural_models import ALL, GPT2, all_variants, eager_and_sdpa, liven, one_and_all_layers, whole_and_compact
from tests.helpers.versions import CACHE


RESIDUAL = {"neural_layers": "all", "neural_mode": "residual"}


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 98, shape)


@eager_and_sdpa
@all_variants
def test_a_later_token_leaves_earlier_logits_bit_equal(implementation: str, fields: dict):
    model = GPT2.neural(attn_implementation=implementation, **fields)
    before = ids(2, 14)
    after = before.clone()
    after[:, 9] = (before[:, 9] - 3 + 1) % 95 + 3
    first, second = run(model, input_ids=before), run(model, input_ids=after)
    assert torch.equal(first[:, :9], second[:, :9])
    # checks that the change shows from there on, also where only attention carries it
    assert all((first[:, i] - second[:, i]).abs().max() > 1e-4 for i in range(9, 14))


@eager_and_sdpa
@pytest.mark.parametrize("side", ("left", "right"))
@all_variants
def test_padding_changes_nothing(implementation: str, side: str, fields: dict):
    model = GPT2.neural(attn_implementation=implementation, **fields)
    long, short = ids(1, 11), ids(1, 7)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((padding, short) if side == "left" else (short, padding), dim=1)
    batch, mask = torch.cat((long, padded)), torch.ones(2, 11, dtype=torch.long)
    real = slice(4, None) if side == "left" else slice(7)
    mask[1] = 0
    mask[1, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = batch.masked_fill(mask == 0, -100)
    outputs = model(input_ids=batch, attention_mask=mask, position_ids=positions, labels=labels)
    assert torch.isfinite(outputs.logits).all() and torch.isfinite(outputs.loss)
    assert_near(outputs.logits[0], run(model, input_ids=long)[0])
    assert_near(outputs.logits[1, real], run(model, input_ids=short)[0])
    if side == "left":
        # checks that the padding is seen without the mask
        assert_far(run(model, input_ids=batch, position_ids=positions)[1, real], outputs.logits[1, real])
    outputs.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


# leaves out bool masks under eager, where stock attention adds its mask
@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("sdpa", "bool"), ("sdpa", "additive"), ("sdpa", "per head"), ("eager", "additive"), ("eager", "per head")],
)
@whole_and_compact
def test_4d_masks(implementation: str, kind: str, fields: dict):
    allowed = torch.rand(2, 4 if kind == "per head" else 1, 12, 12) > 0.4
    allowed |= torch.eye(12, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
    stock = GPT2.stock(attn_implementation=implementation)
    batch = ids(2, 12)
    expected = run(stock, input_ids=batch, attention_mask=mask)
    assert_near(run(GPT2.twin(stock, **RESIDUAL), input_ids=batch, attention_mask=mask), expected)
    model = GPT2.twin(stock, **fields)
    actual = run(model, input_ids=batch, attention_mask=mask)
    assert_far(actual, expected)
    assert_far(actual, run(model, input_ids=batch))


@one_and_all_layers
def test_4d_masks_mean_the_same_in_every_form(fields: dict):
    model = GPT2.neural(**fields)
    batch, causal = ids(2, 12), torch.ones(12, 12, dtype=torch.bool).tril()[None, None].expand(2, 1, 12, 12)
    expected = run(model, input_ids=batch)
    for empty in (torch.finfo(torch.float32).min, -torch.inf):
        assert_near(
            run(model, input_ids=batch, attention_mask=torch.zeros(causal.shape).masked_fill(~causal, empty)), expected
        )
    assert_near(run(model, input_ids=batch, attention_mask=causal), expected)


@eager_and_sdpa
@one_and_all_layers
def test_inputs_embeds_and_position_ids(implementation: str, fields: dict):
    model = GPT2.neural(attn_implementation=implementation, **fields)
    batch, positions = ids(2, 9), torch.arange(9)[None]
    expected = run(model, input_ids=batch)
    assert torch.equal(run(model, inputs_embeds=model.transformer.wte(batch)), expected)
    assert torch.equal(run(model, input_ids=batch, position_ids=positions), expected)
    assert_far(run(model, input_ids=batch, position_ids=positions + 20), expected)


@eager_and_sdpa
@all_variants
def test_packed_sequences_do_not_leak(implementation: str, fields: dict):
    model = GPT2.neural(attn_implementation=implementation, **fields)
    first, second = ids(1, 6), ids(1, 8)
    positions = torch.cat((torch.arange(6), torch.arange(8)))[None]

    def packed(document: torch.Tensor) -> torch.Tensor:
        return run(model, input_ids=torch.cat((document, second), dim=1), position_ids=positions, use_cache=False)

    expected = packed(first)
    assert torch.equal(packed(ids(1, 6))[:, 6:], expected[:, 6:])
    assert_near(expected[:, :6], run(model, input_ids=first))
    assert_near(expected[:, 6:], run(model, input_ids=second))
    # checks that documents see each other where they are not told apart
    joined = run(model, input_ids=torch.cat((first, second), dim=1), position_ids=positions.clone().fill_(0), use_cache=False)
    assert_far(joined[:, 6:], expected[:, 6:])


@eager_and_sdpa
def test_bidirectional_config(implementation: str):
    stock = GPT2.stock(attn_implementation=implementation)
    stock.config.is_causal = False
    batch = ids(2, 9)
    expected = run(stock, input_ids=batch, use_cache=False)
    assert_near(run(GPT2.twin(stock, **RESIDUAL), input_ids=batch, use_cache=False), expected)


@eager_and_sdpa
@pytest.mark.parametrize(
    "fields",
    (
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 40, "activation_function": "relu"},
    ),
    ids=lambda fields: "-".join(fields),
)
def test_other_stock_fields_hold(implementation: str, fields: dict):
    stock = GPT2.stock(attn_implementation=implementation, **fields)
    batch = ids(2, 9)
    expected = run(stock, input_ids=batch)
    assert_near(run(GPT2.twin(stock, **RESIDUAL), input_ids=batch), expected)
    assert_far(run(GPT2.twin(stock, **ALL), input_ids=batch), expected)


def cross_attention_inputs() -> dict:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"encoder_hidden_states": torch.randn(2, 5, 32), "encoder_attention_mask": mask}


@eager_and_sdpa
@whole_and_compact
def test_cross_attention_keeps_the_dot_product(implementation: str, fields: dict):
    stock = GPT2.stock(add_cross_attention=True, attn_implementation=implementation)
    inputs = {"input_ids": ids(2, 9), **cross_attention_inputs()}
    expected = run(stock, **inputs)
    residual, model = GPT2.twin(stock, **RESIDUAL), GPT2.twin(stock, **fields)
    assert_near(run(residual, **inputs), expected)
    assert_far(run(model, **inputs), expected)
    for block in model.transformer.h:
        assert hasattr(block.attn, "scorer") and not hasattr(block.crossattention, "scorer")
        assert block.crossattention.config is model.config
    # checks that a cross-attention layer computes what the stock one does with the same input
    hidden, states = torch.randn(2, 9, 32), inputs["encoder_hidden_states"]
    ours, theirs = (each.transformer.h[0].crossattention(hidden, encoder_hidden_states=states) for each in (model, stock))
    assert torch.equal(ours[0], theirs[0])


@eager_and_sdpa
@whole_and_compact
def test_cross_attention_with_a_cache(implementation: str, fields: dict):
    model = GPT2.neural(add_cross_attention=True, attn_implementation=implementation, **fields)
    batch, encoder = ids(2, 9), cross_attention_inputs()
    expected = run(model, input_ids=batch, **encoder)
    cache = None
    steps = []
    for part in (batch[:, :6], batch[:, 6:7], batch[:, 7:9]):
        outputs = model(input_ids=part, **{CACHE: cache}, use_cache=True, **encoder)
        cache = getattr(outputs, CACHE)
        steps.append(outputs.logits)
    assert isinstance(cache, EncoderDecoderCache) and cache.cross_attention_cache.layers[0].keys.shape[2] == 5
    assert_near(torch.cat(steps, dim=1), expected)
    if implementation == "eager":
        outputs = model(input_ids=batch, output_attentions=True, **encoder)
        assert [weights.shape for weights in outputs.attentions] == [(2, 4, 9, 9)] * 3
        assert [weights.shape for weights in outputs.cross_attentions] == [(2, 4, 9, 5)] * 3


@eager_and_sdpa
@all_variants
def test_a_cache_filled_in_parts_gives_the_same_logits(implementation: str, fields: dict):
    model = GPT2.neural(attn_implementation=implementation, **fields)
    batch, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = run(model, input_ids=batch, attention_mask=mask, position_ids=positions)
    cache, steps = DynamicCache(config=model.config), []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        outputs = model(
            input_ids=batch[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            **{CACHE: cache},
        )
        steps.append(outputs.logits.detach())
    actual = torch.cat(steps, dim=1)
    assert_near(actual[0], expected[0])
    assert_near(actual[1, 3:], expected[1, 3:])


def head_inputs(head: str) -> dict:
    """Inputs with labels for a head, and how its loss is asked for."""
    batch = ids(2, 9)
    batch[1, 7:] = 0
    inputs = {"input_ids": batch, "attention_mask": (batch != 0).long()}
    if head == "GPT2DoubleHeadsModel":
        choices = ids(2, 3, 9)
        return {
            "input_ids": choices,
            "mc_token_ids": torch.randint(9, (2, 3)),
            "labels": choices,
            "mc_labels": torch.tensor([2, 0]),
        }
    labels = {
        "GPT2LMHeadModel": {"labels": batch},
        "GPT2ForSequenceClassification": {"labels": torch.tensor([1, 0])},
        "GPT2ForTokenClassification": {"labels": torch.randint(2, (2, 9))},
        "GPT2ForQuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 3])},
    }
    return {**inputs, **labels[head]}


def tensors_of(outputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("head", GPT2.heads)
@whole_and_compact
def test_heads_compute_what_the_stock_heads_do(head: str, fields: dict):
    stock = GPT2.stock(head)
    inputs = head_inputs(head)
    expected = tensors_of(stock(**inputs))
    assert "loss" in expected
    without = tensors_of(GPT2.twin(stock, neural_layers=[])(**inputs))
    assert without.keys() == expected.keys()
    assert all(torch.equal(without[name], value) for name, value in expected.items())
    residual = GPT2.twin(stock, **RESIDUAL)
    for name, value in tensors_of(residual(**inputs)).items():
        assert_near(value, expected[name])
    for name, value in tensors_of(liven(residual)(**inputs)).items():
        assert (value - expected[name]).abs().max() > 1e-4
    neural = tensors_of(GPT2.twin(stock, **fields)(**inputs))
    assert neural.keys() == expected.keys()
    assert all((neural[name] - value).abs().max() > 1e-4 for name, value in expected.items())


@pytest.mark.parametrize("head", GPT2.heads)
@whole_and_compact
def test_heads_train(head: str, fields: dict):
    model = GPT2.neural(head, **fields).train()
    outputs = model(**head_inputs(head))
    (outputs.loss if "mc_loss" not in outputs else outputs.loss + outputs.mc_loss).backward()
    for name, parameter in model.named_parameters():
        if "scorer" in name and parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all()
    assert model.transformer.h[0].attn.scorer.linear2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("problem_type", ("regression", "multi_label_classification"))
def test_sequence_classification_losses(problem_type: str):
    fields = {"num_labels": 1 if problem_type == "regression" else 3, "problem_type": problem_type}
    stock = GPT2.stock("GPT2ForSequenceClassification", **fields)
    inputs = {"input_ids": ids(2, 9), "labels": torch.rand(2, 1 if problem_type == "regression" else 3).round()}
    assert torch.equal(GPT2.twin(stock, neural_layers=[])(**inputs).loss, stock(**inputs).loss)
    assert_near(GPT2.twin(stock, **RESIDUAL)(**inputs).loss, stock(**inputs).loss)


@pytest.mark.parametrize("training", (False, True))
@whole_and_compact
def test_no_neural_layers_is_the_stock_model_bit_for_bit(training: bool, fields: dict):
    stock = GPT2.stock(attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).train(training)
    model = GPT2.twin(stock, neural_layers=[])
    assert list(model.state_dict()) == list(stock.state_dict())
    inputs = GPT2.inputs()
    gradients = []
    for each in (stock, model):
        torch.manual_seed(7)
        gradients.append((each(**inputs).loss, run(each, **inputs), backward(each, **inputs)))
    (stock_loss, stock_logits, stock_gradients), (loss, logits, ours) = gradients
    assert torch.equal(loss, stock_loss) and torch.equal(logits, stock_logits)
    assert ours.keys() == stock_gradients.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in stock_gradients.items())
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    prompt = inputs["input_ids"][:, :5]
    model.eval()
    assert torch.equal(model.generate(prompt, **arguments), stock.eval().generate(prompt, **arguments))
    assert_far(run(GPT2.twin(stock, **fields), **inputs), run(stock, **inputs))


def test_residual_gradients_are_the_stock_ones():
    stock = GPT2.stock().train()
    inputs = GPT2.inputs()
    expected = backward(stock, **inputs)
    actual = backward(GPT2.twin(stock, **RESIDUAL), **inputs)
    assert_same_gradients({name: actual[name] for name in expected}, expected, 1e-4)
    # checks the last layer of a scorer, which alone learns at its neutral start; the step after, all layers do
    assert actual["transformer.h.0.attn.scorer.linear3.weight"].abs().max() > 0


@whole_and_compact
def test_resizing_embeddings(fields: dict):
    model = GPT2.neural(**fields)
    batch = ids(2, 9)
    expected = run(model, input_ids=batch)
    model.resize_token_embeddings(120, mean_resizing=False)
    assert model.config.vocab_size == 120 and model.lm_head.weight is model.transformer.wte.weight
    actual = run(model, input_ids=batch)
    assert actual.shape[-1] == 120 and torch.equal(actual[..., :99], expected)
    backward(model, input_ids=torch.full((1, 4), 110), labels=torch.full((1, 4), 119))
    model.resize_token_embeddings(99)
    assert torch.equal(run(model, input_ids=batch), expected)


def test_tied_weights_stay_tied_in_copies():
    for model in (GPT2.neural(), copy.deepcopy(GPT2.neural())):
        assert model.lm_head.weight is model.transformer.wte.weight
    untied = GPT2.neural(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight
