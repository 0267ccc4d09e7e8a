"""`from_pretrained(folder, model_class=...)`: the same neural layers in a model with another head, or without one."""

from pathlib import Path

import pytest
import torch
import transformers

import hf_neural_attention
from hf_neural_attention import compact, from_pretrained, patch, patch_status
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import run
from tests.helpers.stock_models import FAMILIES


# Lists classes with a head, without, and with another one
CLASSES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"),
    "llama": ("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"),
    "bert": ("BertForMaskedLM", "BertModel", "BertForTokenClassification"),
    "vit": ("ViTForImageClassification", "ViTModel", "ViTForMaskedImageModeling"),
}

families = pytest.mark.parametrize("family", CLASSES)


def class_of(name: str) -> str:
    """Of what is loaded: GPT-2 and ViT come as the classes of this package."""
    own = f"Neural{name}"
    return own if own in hf_neural_attention.__all__ else name


def hidden_states(model, family: str) -> torch.Tensor:
    return run(model.base_model, **FAMILIES[family].inputs())


@families
def test_every_head_has_the_same_neural_layers(family: str, tmp_path: Path):
    model = patch(FAMILIES[family].model(), [0, 2], mode="replace", per_head=True)
    expected = hidden_states(model, family)
    model.save_pretrained(tmp_path / "head")
    for name in CLASSES[family]:
        loaded = from_pretrained(tmp_path / "head", model_class=getattr(transformers, name))
        assert type(loaded).__name__ == class_of(name) and len(patch_status(loaded)) == 2
        assert torch.equal(hidden_states(loaded, family), expected)
        if name == CLASSES[family][1]:
            loaded.save_pretrained(tmp_path / "base")
    for name in CLASSES[family]:
        again = from_pretrained(tmp_path / "base", model_class=getattr(transformers, name))
        assert type(again).__name__ == class_of(name)
        assert torch.equal(hidden_states(again, family), expected)


def test_compact_layers_get_along_with_another_head(tmp_path: Path):
    model = compact(patch(FAMILIES["bert"].model(), "all", mode="replace"))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, model_class=transformers.BertModel)
    assert torch.equal(hidden_states(loaded, "bert"), hidden_states(model, "bert"))


def test_classes_of_other_families_are_refused(tmp_path: Path):
    patch(FAMILIES["gpt2"].model()).save_pretrained(tmp_path / "gpt2")
    for wrong in (transformers.BertModel, transformers.ViTModel, type("Mine", (transformers.GPT2Model,), {})):
        with pytest.raises(PatchError, match=f"cannot be loaded as a {wrong.__name__}: expected one of NeuralGPT2DoubleHeads"):
            from_pretrained(tmp_path / "gpt2", model_class=wrong)
    patch(FAMILIES["llama"].model()).save_pretrained(tmp_path / "llama")
    with pytest.raises(PatchError, match="and BertModel no such module"):
        from_pretrained(tmp_path / "llama", model_class=transformers.BertModel)
    assert from_pretrained(tmp_path / "gpt2", model_class=hf_neural_attention.NeuralGPT2Model).h
    with pytest.raises(PatchError, match="cannot be loaded as a 'GPT2Model': expected one of"):
        from_pretrained(tmp_path / "gpt2", model_class="GPT2Model")
