"""What only ViT has: images of another size, masked patches, its heads.

A residual scorer is born as the plain dot product, so a residual twin of a stock model must do what the stock model does.
"""

import pytest
import torch

from tests.helpers.comparing import assert_far, assert_near, assert_same_gradients, backward, run
from tests.helpers.neural_models import VIT, all_variants, eager_and_sdpa, liven, one_and_all_layers, whole_and_compact


RESIDUAL = {"neural_layers": "all", "neural_mode": "residual"}
HEADS = (VIT.base, *VIT.heads)


def head_inputs(head: str, batch: int = 2) -> dict:
    pixels = torch.randn(batch, 3, 16, 16)
    if head == "ViTForMaskedImageModeling":
        return {"pixel_values": pixels, "bool_masked_pos": torch.rand(batch, 16) > 0.5}
    return {"pixel_values": pixels, **({"labels": torch.randint(5, (batch,))} if head == "ViTForImageClassification" else {})}


def tensors_of(outputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


@eager_and_sdpa
@pytest.mark.parametrize("head", HEADS)
@whole_and_compact
def test_classes_compute_what_the_stock_classes_do(implementation: str, head: str, fields: dict):
    stock = VIT.stock(head, attn_implementation=implementation)
    inputs = head_inputs(head)
    expected = tensors_of(stock(**inputs))
    assert ("loss" in expected) == (head != VIT.base)
    without = tensors_of(VIT.twin(stock, neural_layers=[])(**inputs))
    assert without.keys() == expected.keys()
    assert all(torch.equal(without[name], value) for name, value in expected.items())
    residual = VIT.twin(stock, **RESIDUAL)
    for name, value in tensors_of(residual(**inputs)).items():
        assert_near(value, expected[name])
    for name, value in tensors_of(liven(residual)(**inputs)).items():
        assert (value - expected[name]).abs().max() > 1e-4
    neural = tensors_of(VIT.twin(stock, **fields)(**inputs))
    assert neural.keys() == expected.keys()
    assert all((neural[name] - value).abs().max() > 1e-4 for name, value in expected.items())


@pytest.mark.parametrize("head", VIT.heads)
@pytest.mark.parametrize("training", (False, True))
@whole_and_compact
def test_no_neural_layers_is_the_stock_model_bit_for_bit(head: str, training: bool, fields: dict):
    stock = VIT.stock(head, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train(training)
    model = VIT.twin(stock, neural_layers=[])
    assert list(model.state_dict()) == list(stock.state_dict())
    inputs, results = head_inputs(head), []
    for each in (stock, model):
        torch.manual_seed(7)
        results.append((each(**inputs).loss, run(each, **inputs), backward(each, **inputs)))
    (stock_loss, stock_output, stock_gradients), (loss, output, gradients) = results
    assert torch.equal(loss, stock_loss) and torch.equal(output, stock_output)
    assert gradients.keys() == stock_gradients.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in stock_gradients.items())
    assert_far(run(VIT.twin(stock, **fields), **inputs), run(stock, **inputs))


def test_residual_gradients_are_the_stock_ones():
    stock = VIT.stock().train()
    inputs = VIT.inputs()
    expected = backward(stock, **inputs)
    actual = backward(VIT.twin(stock, **RESIDUAL), **inputs)
    assert_same_gradients({name: actual[name] for name in expected}, expected, 1e-4)


@pytest.mark.parametrize("head", VIT.heads)
@whole_and_compact
def test_heads_train(head: str, fields: dict):
    model = VIT.neural(head, **fields).train()
    gradients = backward(model, **head_inputs(head))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert model.vit.layers[0].attention.scorer.linear2.weight.grad.abs().max() > 0


@eager_and_sdpa
@all_variants
def test_attention_is_not_causal(implementation: str, fields: dict):
    model = VIT.neural(VIT.base, attn_implementation=implementation, **{**fields, "num_hidden_layers": 1})
    pixels = torch.randn(1, 3, 16, 16)
    changed = pixels.clone()
    changed[..., -4:, -4:] += 1.0  # changes the last patch alone
    first, second = run(model, pixel_values=pixels), run(model, pixel_values=changed)
    assert ((first - second).abs().amax(dim=-1) > 1e-5).all(), "every token sees the last patch"


@eager_and_sdpa
@one_and_all_layers
def test_attention_masks(implementation: str, fields: dict):
    model = VIT.neural(VIT.base, attn_implementation=implementation, **fields)
    pixels, mask = torch.randn(2, 3, 16, 16), torch.ones(2, 17, dtype=torch.long)
    assert_near(run(model, pixel_values=pixels, attention_mask=mask), run(model, pixel_values=pixels))
    mask[:, -1] = 0
    expected = run(model, pixel_values=pixels, attention_mask=mask)
    changed = pixels.clone()
    changed[..., -4:, -4:] += 1.0
    assert torch.equal(run(model, pixel_values=changed, attention_mask=mask)[:, :-1], expected[:, :-1])
    assert_far(expected[:, :-1], run(model, pixel_values=pixels)[:, :-1])


@pytest.mark.parametrize("head", HEADS)
@whole_and_compact
def test_images_of_another_size(head: str, fields: dict):
    stock = VIT.stock(head)
    pixels = torch.randn(2, 3, 24, 24)
    with pytest.raises(ValueError, match="doesn't match model"):
        VIT.neural(head, **fields)(pixel_values=pixels)
    expected = run(stock, pixel_values=pixels, interpolate_pos_encoding=True)
    residual, neural = VIT.twin(stock, **RESIDUAL), VIT.twin(stock, **fields)
    assert_near(run(residual, pixel_values=pixels, interpolate_pos_encoding=True), expected)
    assert_far(run(neural, pixel_values=pixels, interpolate_pos_encoding=True), expected)


@one_and_all_layers
def test_masked_patches(fields: dict):
    model = VIT.neural("ViTForMaskedImageModeling", **fields)
    inputs = head_inputs("ViTForMaskedImageModeling")
    expected = run(model, **inputs)
    assert expected.shape == (2, 3, 16, 16) and model(**inputs).loss > 0
    # changes what lies under masked patches, which must not be seen
    hidden = inputs["bool_masked_pos"].view(2, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    changed = torch.where(hidden, torch.randn(2, 3, 16, 16), inputs["pixel_values"])
    assert torch.equal(run(model, **{**inputs, "pixel_values": changed}), expected)
    assert_far(run(model, pixel_values=inputs["pixel_values"]), expected)


def test_constructor_arguments_of_the_base_model():
    plain, bare = (VIT.neural_class(VIT.base)(VIT.config(), **arguments) for arguments in ({}, {"add_pooling_layer": False}))
    assert plain.pooler is not None and plain.embeddings.mask_token is None
    assert bare.pooler is None
    assert VIT.neural_class(VIT.base)(VIT.config(), use_mask_token=True).embeddings.mask_token is not None
    assert VIT.neural("ViTForMaskedImageModeling").vit.embeddings.mask_token is not None
    assert VIT.neural("ViTForImageClassification").vit.embeddings.mask_token is None


@whole_and_compact
def test_oblong_images_and_patches(fields: dict):
    stock = VIT.stock(image_size=(8, 16), patch_size=(4, 8), qkv_bias=False)
    pixels = torch.randn(2, 3, 8, 16)
    expected = run(stock, pixel_values=pixels)
    assert_near(run(VIT.twin(stock, **RESIDUAL), pixel_values=pixels), expected)
    assert_far(run(VIT.twin(stock, **fields), pixel_values=pixels), expected)


@pytest.mark.parametrize("problem_type", ("regression", "multi_label_classification"))
def test_image_classification_losses(problem_type: str):
    stock = VIT.stock(num_labels=1 if problem_type == "regression" else 5, problem_type=problem_type)
    labels = torch.rand(2, 1 if problem_type == "regression" else 5).round()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}
    assert torch.equal(VIT.twin(stock, neural_layers=[])(**inputs).loss, stock(**inputs).loss)
    assert_near(VIT.twin(stock, **RESIDUAL)(**inputs).loss, stock(**inputs).loss)
