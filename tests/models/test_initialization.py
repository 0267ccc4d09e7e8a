"""Weights as they are born: those that stock models have follow stock's distribution, scorers their own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_neural_attention import NeuralScorer
from hf_neural_attention.models.neural_attention_reference import reference_scores
from tests.helpers.comparing import assert_near
from tests.helpers.neural_models import GPT2, VIT, Family, both_families, every_model, one_and_all_whole_layers, scorers


# Makes models large enough for a sample standard deviation to say something, with the default initializer_range of 0.02
LARGER = {
    "GPT2": {"n_embd": 64, "n_layer": 4, "initializer_range": 0.02},
    "ViT": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "initializer_range": 0.02},
}
RESIDUAL_STD = 0.02 / (2 * 4) ** 0.5  # divides, as GPT-2's scheme does, by the square root of the number of residual layers


def assert_same_distribution(ours: torch.Tensor, stock: torch.Tensor, name: str) -> None:
    """Both constant, or means and standard deviations equal within five standard errors."""
    assert ours.shape == stock.shape
    if stock.numel() < 2 or stock.std() == 0:
        assert torch.equal(ours, stock) or stock.numel() == 1, name
        return
    count, std = stock.numel(), stock.std().item()
    assert abs(ours.std().item() - std) < 5 * std / count**0.5, name
    assert abs(ours.mean().item() - stock.mean().item()) < 5 * std * (2 / count) ** 0.5, name


@every_model
@one_and_all_whole_layers
def test_everything_but_scorers_starts_as_in_the_stock_model(family: Family, head: str, fields: dict):
    sizes = LARGER[family.stem]
    stock = dict(family.stock(head, **sizes).named_parameters())
    ours = dict(family.neural(head, **sizes, **fields).named_parameters())
    assert [name for name in ours if ".scorer." not in name] == list(stock)
    for name, parameter in stock.items():
        assert_same_distribution(ours[name], parameter, name)
        if name.endswith("c_proj.weight"):
            assert abs(ours[name].std().item() / RESIDUAL_STD - 1) < 0.1, name


@pytest.mark.parametrize("head", (GPT2.base, *GPT2.heads))
def test_c_proj_that_a_checkpoint_lacks_gets_its_scaled_initialization(head: str, tmp_path):
    stock = GPT2.stock(head, **LARGER["GPT2"])
    stock.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("c_proj.weight")}
    save_file(weights, path, metadata={"format": "pt"})
    model, info = GPT2.neural_class(head).from_pretrained(tmp_path, output_loading_info=True)
    missing = {name for name in info["missing_keys"] if ".scorer." not in name}
    assert len(missing) == 8
    state, kept = model.state_dict(), stock.state_dict()
    for name in missing:
        assert name.endswith("c_proj.weight")
        assert abs(state[name].std().item() / RESIDUAL_STD - 1) < 0.1, name
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items() if name not in missing)


@both_families
@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize("way", ("constructor", "from_pretrained", "device_map"))
def test_mirrored_scorers_are_alive(family: Family, per_head: bool, way: str, tmp_path):
    fields = {"neural_layers": "all", "neural_per_head": per_head, "neural_proj_dim": 4}
    if way == "constructor":
        model = family.neural(**fields)
    else:
        family.stock().save_pretrained(tmp_path)
        model = family.neural_class().from_pretrained(
            tmp_path, **fields, **({"device_map": "cpu"} if way == "device_map" else {})
        )
    for scorer in scorers(model):
        assert_alive(scorer)
    first, second, third = (scorer.q_proj.weight for scorer in scorers(model))
    assert not torch.equal(first, second) and not torch.equal(second, third)


@torch.no_grad()
def assert_alive(scorer: NeuralScorer) -> None:
    """Scores of standard deviation one on unit-normal input, as the scaled dot product has, and biases of zero."""
    query, key = torch.randn(2, 16, 4, 64, scorer.head_dim)
    scores = reference_scores(query, key, scorer.weights())
    # measures per head where a scorer has weights for each
    spread = scores.std(dim=(0, 2, 3)) if scorer.num_heads else scores.std()
    assert (spread - 1).abs().max() < 0.2
    assert all(layer.bias.abs().max() == 0 for layer in scorer.layers)


@both_families
def test_paper_scorers_are_born_as_the_released_code_does(family: Family, tmp_path):
    family.stock().save_pretrained(tmp_path)
    fields = {"neural_init": "paper", "neural_layers": "all", "neural_proj_dim": 4}
    for model in (family.neural(**fields), family.neural_class().from_pretrained(tmp_path, **fields)):
        # expects numbers uniform in +-1/sqrt(fan_in), biases included
        layers = [layer for scorer in scorers(model) for layer in scorer.layers]
        parts = [part.flatten() * layer.in_features**0.5 for layer in layers for part in (layer.weight, layer.bias)]
        drawn = torch.cat(parts)
        assert drawn.abs().max() <= 1 and abs(drawn.std().item() - 3**-0.5) < 0.05
        assert all(layer.bias.abs().max() > 0 for layer in layers)


@both_families
def test_residual_scorers_are_born_as_the_dot_product(family: Family, tmp_path):
    stock = family.stock()
    stock.save_pretrained(tmp_path)
    model = family.neural_class().from_pretrained(tmp_path, neural_mode="residual", neural_layers="all")
    inputs = family.inputs(labels=False)
    with torch.no_grad():
        assert_near(model(**inputs).logits, stock(**inputs).logits)
    for scorer in scorers(model):
        assert scorer.linear3.weight.abs().max() == 0 and scorer.linear2.weight.abs().max() > 0


@both_families
def test_initialization_follows_the_seed(family: Family):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(family.neural(neural_layers="all").state_dict())
    same, again, other = models
    assert all(torch.equal(same[name], tensor) for name, tensor in again.items())
    changed = [name for name in same if name.endswith("scorer.q_proj.weight") and not torch.equal(same[name], other[name])]
    assert len(changed) == 3


def test_vit_specials_start_as_in_the_stock_model():
    ours, stock = (make("ViTForMaskedImageModeling", **LARGER["ViT"]) for make in (VIT.neural, VIT.stock))
    for name in ("cls_token", "position_embeddings"):
        assert_same_distribution(getattr(ours.vit.embeddings, name), getattr(stock.vit.embeddings, name), name)
    assert ours.vit.embeddings.mask_token.abs().max() == 0
    assert ours.vit.pooler is None and VIT.neural("ViTModel").pooler is not None
