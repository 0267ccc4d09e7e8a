"""Names of models with neural layers: by them, clients load another model, or none. They must not get another one."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    TrainingArguments,
)

from hf_neural_attention import (
    NeuralGPT2LMHeadModel,
    calibrate,
    compact,
    from_pretrained,
    load_patch,
    patch,
    patched,
    save_patch,
    unpatch,
)
from hf_neural_attention.models import neural_attention_names
from hf_neural_attention.models.neural_attention_names import origin_of
from hf_neural_attention.patching import PatchError
from tests.helpers.stock_models import FAMILIES


INPUTS = {"input_ids": torch.arange(3, 12)[None]}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def stock(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / request.param
    FAMILIES[request.param].model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    FAMILIES["gpt2"].model().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def names(model: Any) -> list[str]:
    """All that clients read: of the model, its config, and those of the base model inside."""
    return [name for part in (model, model.base_model) for name in (part.name_or_path, part.config.name_or_path)]


def assert_fails_in_words(model: Any) -> None:
    classes = (AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel, AutoTokenizer, GPT2Tokenizer)
    for name in set(names(model)):
        for each in classes:
            with pytest.raises((OSError, ValueError), match=r"in[ _]memory.*(save_pretrained|Load the tokenizer)"):
                each.from_pretrained(name)


@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_patched_models_cannot_be_loaded_by_the_stock_name(mode, stock):
    model = load(stock)
    assert set(names(model)) == {str(stock)}
    patch(model, "all", mode=mode)
    assert_fails_in_words(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert names(copied) == names(model)
        assert set(names(unpatch(copied))) == {str(stock)}
    assert origin_of(model) == str(stock)
    assert set(names(unpatch(model))) == {str(stock)}


def test_names_come_back_after_a_with_block(stock):
    model = load(stock)
    with patched(model):
        assert str(stock) not in names(model)
    assert set(names(model)) == {str(stock)}


def test_names_come_back_at_whichever_level_a_model_is_unpatched(stock):
    model = load(stock)
    patch(model.base_model)
    unpatch(model)
    assert set(names(model)) == {str(stock)}
    before = model._supports_flash_attn
    patch(model)
    unpatch(model.base_model)
    assert str(stock) not in names(model)[:1]
    unpatch(model)  # takes what is left
    assert set(names(model)) == {str(stock)} and model._supports_flash_attn == before
    with pytest.raises(PatchError, match="is not patched"):
        unpatch(model)


def test_other_models_keep_their_names(stock):
    other = load(stock)
    patch(load(stock))
    assert set(names(other)) == {str(stock)}


def test_saved_models_have_the_name_of_their_folder(stock, tmp_path):
    model = patch(load(stock), "all", mode="replace")
    model.save_pretrained(tmp_path / "patched")
    assert "memory" not in (tmp_path / "patched" / "config.json").read_text()
    again = from_pretrained(tmp_path / "patched")
    assert set(names(again)) == {str(tmp_path / "patched")}
    if type(again) is type(model):  # without its patch, it is not what that name loads
        assert_fails_in_words(unpatch(again))
        patch(again)
        assert_fails_in_words(unpatch(again))


def test_patches_know_the_model_that_they_are_for(stock, tmp_path, caplog):
    save_patch(patch(load(stock), "all", mode="replace"), tmp_path)
    model = load_patch(str(stock), tmp_path)
    assert "was made for" not in caplog.text
    assert_fails_in_words(model)
    assert origin_of(model) == str(stock)


def test_models_without_a_name_get_none():
    model = patch(FAMILIES["gpt2"].model())
    assert set(names(model)) == {""}


def test_own_classes_forget_the_name_of_what_computes_something_else(gpt2, tmp_path):
    model = NeuralGPT2LMHeadModel.from_pretrained(gpt2, neural_layers="all")
    assert_fails_in_words(model)
    assert origin_of(model) == str(gpt2)
    model.save_pretrained(tmp_path)
    for fields in ({}, {"neural_layers": [0, 1, 2]}, {"dtype": torch.bfloat16}):
        assert set(names(NeuralGPT2LMHeadModel.from_pretrained(tmp_path, **fields))) == {str(tmp_path)}
    assert_fails_in_words(NeuralGPT2LMHeadModel.from_pretrained(tmp_path, neural_layers=[0]))
    folded = NeuralGPT2LMHeadModel.from_pretrained(tmp_path, neural_compact=True)
    assert_fails_in_words(folded)
    assert folded.config.neural_folded_from == str(tmp_path)


@pytest.mark.parametrize("change", [compact, lambda model: calibrate(model, [INPUTS] * 2, steps=1, progress=False)])
def test_what_changes_a_model_takes_its_name(change, gpt2, tmp_path):
    patch(load(gpt2), "all", mode="replace").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert set(names(model)) == {str(tmp_path)}
    change(model)
    assert_fails_in_words(model)


def test_dry_runs_leave_names(stock):
    model = load(stock)
    patch(model, dry_run=True)
    assert set(names(model)) == {str(stock)}


def test_model_cards_can_be_uploaded(stock, tmp_path):
    """The Hub refuses a card whose base model has no valid name."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    Trainer(patch(load(stock)), arguments).create_model_card()
    metadata = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert "base_model" not in metadata


def test_adapters_of_unsaved_models_do_not_load_onto_the_stock_one(stock, tmp_path):
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_attn"], "llama": ["v_proj"]}[stock.name]
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=stock.name == "gpt2")
    before = peft.get_peft_model(patch(load(stock), "all", mode="replace"), config)
    after = patch(peft.get_peft_model(load(stock), config), "all", mode="replace")
    for number, model in enumerate((before, after)):
        with pytest.warns(UserWarning, match="Could not find a config file in .* changed in memory"):
            model.save_pretrained(tmp_path / str(number))
        with pytest.raises(OSError, match=r"changed in memory by hf_neural_attention \(save it whole"):
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / str(number))
    assert unpatch(after).peft_config["default"].base_model_name_or_path == str(stock)


def test_adapters_of_saved_models_come_back(gpt2, tmp_path):
    peft = pytest.importorskip("peft")
    patch(load(gpt2), "all", mode="replace").save_pretrained(tmp_path / "patched")
    settings = {"target_modules": ["c_attn"], "modules_to_save": ["scorer"], "init_lora_weights": False}
    model = peft.get_peft_model(
        load(tmp_path / "patched"), peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scorer.modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    stock = peft.PeftModel.from_pretrained(load(tmp_path / "patched"), tmp_path / "adapter")
    expected = model.eval()(**INPUTS).logits
    assert torch.equal(again(**INPUTS).logits, expected)
    with stock.disable_adapter():
        assert not torch.allclose(stock(**INPUTS).logits, expected, atol=1e-2)


def test_code_from_the_hub_names_no_folder_that_is_not_there(gpt2: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neural_attention_names, "UNSAVED", str(gpt2 / "is_not_there"))
    model = patch(load(gpt2))
    assert model.config.name_or_path == "" and origin_of(model) == str(gpt2)
