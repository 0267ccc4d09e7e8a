"""Patched models saved whole: `save_pretrained`, `from_pretrained`, the Auto classes, and loading without the package."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.modeling_utils import PreTrainedModel

from hf_neural_attention import NeuralGPT2LMHeadModel, from_pretrained, patch, patch_status, patched, unpatch
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import assert_far, assert_same_state, run, transformers_log
from tests.helpers.neural_models import liven
from tests.helpers.running import run_python
from tests.helpers.stock_models import FAMILIES, Family
from tests.patching.test_saving import SETTINGS, patched_model


GPT2, LLAMA, VIT = (FAMILIES[name] for name in ("gpt2", "llama", "vit"))
AUTO = {"gpt2": AutoModelForCausalLM, "vit": AutoModelForImageClassification}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
with_classes_of_their_own = pytest.mark.parametrize("family", (GPT2, VIT), ids=("gpt2", "vit"))


def saved(model: Any, folder: Path, **arguments) -> Path:
    model.save_pretrained(folder, **arguments)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@every_family
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_round_trip(family: Family, settings: dict, tmp_path: Path):
    model, inputs = patched_model(family, **settings), family.inputs()
    expected, config = run(model, **inputs), model.config
    folder = saved(model, tmp_path)
    assert model.config is config and config.model_type == family.model_type
    loaded = from_pretrained(folder)
    assert torch.equal(run(loaded, **inputs), expected) and not loaded.training
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in loaded.named_parameters() if name.endswith("scorer.linear3.bias")}
    assert patch_status(loaded) == patch_status(model)
    assert saved(loaded, tmp_path / "again") and torch.equal(run(from_pretrained(tmp_path / "again"), **inputs), expected)


@every_family
def test_the_class_is_the_stock_one_again(family: Family, tmp_path: Path):
    model = patched_model(family, [0])
    loaded = from_pretrained(saved(model, tmp_path))
    if family.model_type in AUTO:
        assert type(loaded).__name__ == f"Neural{type(model).__name__}"
        return
    assert type(loaded) is type(model) and loaded.config.model_type == family.model_type
    unpatch(loaded)
    assert torch.equal(run(loaded, **family.inputs()), run(unpatch(model), **family.inputs()))


@with_classes_of_their_own
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_auto_model(family: Family, settings: dict, tmp_path: Path):
    model, inputs = patched_model(family, [-1, 0], **settings), family.inputs()
    loaded, info = AUTO[family.model_type].from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == f"Neural{type(model).__name__}" and loaded.config.neural_layers == [0, 2]
    assert torch.equal(run(loaded, **inputs), run(model, **inputs))


@every_family
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_auto_classes_load_every_family(family: Family, settings: dict, tmp_path: Path):
    model, inputs = patched_model(family, **settings), family.inputs()
    folder = saved(model, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    by_name = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    by_auto, info = getattr(transformers, f"AutoModelFor{family.head}").from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for loaded in (by_name, by_auto):
        assert torch.equal(run(loaded, **inputs), run(model, **inputs)) and patch_status(loaded) == patch_status(model)
        assert saved(loaded, tmp_path / "again") and torch.equal(
            run(from_pretrained(tmp_path / "again"), **inputs), run(model, **inputs)
        )


def test_auto_classes_take_arguments_and_parts_of_a_model(tmp_path: Path):
    model, inputs = patched_model(LLAMA), LLAMA.inputs()
    folder = saved(model, tmp_path / "first")
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, LlamaConfig) and config.model_type == "llama"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(loaded) is LlamaForCausalLM and type(loaded.config) is LlamaConfig
    assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "eager"
    base = AutoModel.from_pretrained(folder)
    assert type(base) is LlamaModel and len(patch_status(base)) == 3
    assert torch.equal(run(base, **inputs), run(model.model, **inputs))
    assert config.to_dict()["model_type"] == "llama" and config.to_diff_dict()["model_type"] != "llama"
    drawn = AutoModelForCausalLM.from_config(config)
    assert type(drawn) is LlamaForCausalLM and type(drawn.config) is LlamaConfig and len(patch_status(drawn)) == 3
    again = AutoModelForCausalLM.from_pretrained(saved(drawn, tmp_path / "second"))
    assert torch.equal(run(again, **inputs), run(drawn.eval(), **inputs))
    assert type(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA.fields))) is LlamaForCausalLM
    assert not patch_status(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA.fields)))


def test_new_models_of_a_config_start_as_stock_ones_do(tmp_path: Path):
    """GPT-2 scales what ends on the residual stream, also where a model without a head is made of classes of its own."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 16}
    model = patch(AutoModel.from_config(AutoConfig.for_model("gpt_bigcode", **sizes)), "all", mode="replace")
    made = AutoModel.from_config(AutoConfig.from_pretrained(saved(model, tmp_path)))
    assert len(patch_status(made)) == 2
    stds = [layer.attn.c_proj.weight.std().item() for layer in made.h]
    assert stds == pytest.approx([0.02 / 4**0.5] * 2, rel=0.1)


def test_code_that_makes_the_stock_model_is_not_named_beside_the_patch(tmp_path: Path):
    model = LLAMA.model()
    model.config.auto_map = {"AutoModelForCausalLM": "somebody/other--modeling_other.OtherForCausalLM"}
    folder = saved(patch(model), tmp_path)
    assert "auto_map" not in json.loads((folder / "config.json").read_text()) and model.config.auto_map


WITHOUT = """
import sys
sys.modules["hf_neural_attention"] = None  # importing it fails, as where it is not installed
from transformers import AutoModel, pipeline
for load in (AutoModel.from_pretrained, lambda folder: pipeline("feature-extraction", folder)):
    try:
        load(sys.argv[1])
    except ValueError as error:
        print(error)
"""


INSTALL = "patched by hf_neural_attention (install it"


MESSAGES = (pytest.param(GPT2, "neural_gpt2", id="ours"), pytest.param(LLAMA, INSTALL, id="patched", marks=pytest.mark.slow))


@pytest.mark.parametrize(("family", "message"), MESSAGES)
def test_without_this_package(family: Family, message: str, tmp_path: Path):
    folder = saved(patched_model(family), tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(message) == 2 and done.stdout.count("does not recognize this architecture") == 2


def test_layers_that_our_own_classes_cannot_have(tmp_path: Path):
    # patches cross-attention, which no field of a config names
    model = patch(
        GPT2.model(add_cross_attention=True),
        lambda name, module: name.endswith("crossattention"),
        example_inputs={"input_ids": torch.arange(5)[None], "encoder_hidden_states": torch.randn(1, 7, 32)},
        mode="replace",
    )
    inputs = {**GPT2.inputs(), "encoder_hidden_states": torch.randn(2, 7, 32)}
    folder = saved(model, tmp_path)
    assert "patched by" in config_of(folder)["model_type"]
    loaded = from_pretrained(folder)
    assert type(loaded) is GPT2LMHeadModel and torch.equal(run(loaded, **inputs), run(model, **inputs))
    assert_far(run(loaded, **inputs), run(unpatch(model), **inputs))


def test_arguments_of_from_pretrained(tmp_path: Path):
    model = patched_model(LLAMA)
    folder = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded, info = from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, use_cache=False, device_map="cpu"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager" and loaded.config.use_cache is False
    assert torch.equal(run(from_pretrained(str(folder)), **LLAMA.inputs()), run(model, **LLAMA.inputs()))
    with pytest.raises(PatchError, match=r"`from_pretrained` takes no `config`.*says which layers are neural"):
        from_pretrained(folder, config=model.config)


def test_parts_of_a_model_know_it_too(tmp_path: Path):
    model = patched_model(LLAMA)
    base = from_pretrained(saved(model.model, tmp_path))
    assert type(base).__name__ == "LlamaModel" and len(patch_status(base)) == 3
    assert torch.equal(run(base, **LLAMA.inputs()), run(model.model, **LLAMA.inputs()))


def test_copies_save_themselves(tmp_path: Path):
    model = patched_model(LLAMA)
    for number, copied in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            copied.lm_head.weight.add_(1.0)
        loaded = from_pretrained(saved(copied, tmp_path / str(number)))
        assert torch.equal(run(loaded, **LLAMA.inputs()), run(copied, **LLAMA.inputs()))
        assert_far(run(loaded, **LLAMA.inputs()), run(model, **LLAMA.inputs()))


def test_merged_adapters(tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(patched_model(LLAMA), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(PatchError, match=r"adapters inside \(model.layers.0.self_attn.*Merge them first"):
        model.get_base_model().save_pretrained(tmp_path / "unmerged")
    merged = model.merge_and_unload()
    loaded = from_pretrained(saved(merged, tmp_path))
    assert torch.equal(run(loaded, **LLAMA.inputs()), run(merged, **LLAMA.inputs()))


class Mine(LlamaForCausalLM):
    """A class that Transformers does not have."""


def test_classes_that_transformers_does_not_have(tmp_path: Path):
    model = patch(Mine(LLAMA.model().config), "all")
    model.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match=r"made for a Mine, a class that .* does not have. Give that class as `model_class`"):
        from_pretrained(tmp_path)
    with pytest.raises(PatchError, match=r"`model_class` is AutoModelForSequenceClassification; expected a class of models"):
        from_pretrained(tmp_path, model_class=transformers.AutoModelForSequenceClassification)
    loaded = from_pretrained(tmp_path, model_class=Mine)
    assert type(loaded) is Mine and torch.equal(run(loaded, **LLAMA.inputs()), run(model, **LLAMA.inputs()))


class Speaking(transformers.LlamaForCausalLM):
    """Does something to what it has loaded, as Qwen2.5-Omni does."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        model.loaded_by = cls.__name__
        return model


def test_classes_that_load_in_a_way_of_their_own(tmp_path: Path):
    model = patch(Speaking(LLAMA.model().config), "all")
    model.save_pretrained(tmp_path)
    loaded, info = from_pretrained(tmp_path, model_class=Speaking, output_loading_info=True)
    assert type(loaded) is Speaking and loaded.loaded_by == "Speaking" and not info["missing_keys"]
    assert torch.equal(run(loaded, **LLAMA.inputs()), run(model, **LLAMA.inputs()))
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".0.self_attn.scorer" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(PatchError, match="lacks weights of its neural layers"):
        from_pretrained(tmp_path, model_class=Speaking)


class InPlace(LlamaModel):
    """Draws weights as code from before Transformers 5 does, without asking whether they are loaded."""

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0, 0.5)


def test_weights_that_are_loaded_are_not_drawn_anew(tmp_path: Path):
    model = liven(patch(InPlace(LLAMA.model().config), "all"))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, model_class=InPlace)
    assert_same_state(loaded, model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and frozen == [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]


def test_new_models_of_a_config_return_their_hidden_states(tmp_path: Path):
    patch(LLAMA.model(), "all").model.save_pretrained(tmp_path)
    code = f"""
import torch, hf_neural_attention, transformers
model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained({str(tmp_path)!r}))
assert len(model(torch.arange(9)[None], output_hidden_states=True).hidden_states) == 4, model.config
"""
    run_python("-c", code)


def test_a_way_of_saving_of_the_instance_s_own_is_kept(tmp_path: Path):
    model, calls = LLAMA.model(), []

    def save(folder: Path, **kwargs: Any) -> None:
        calls.append(folder)
        type(model).save_pretrained(model, folder, **kwargs)

    model.save_pretrained = save
    with patched(model):
        assert "patched by" in config_of(saved(model, tmp_path))["model_type"] and calls == [tmp_path]
    assert model.save_pretrained is save


def test_an_unpatched_model_saves_as_ever(tmp_path: Path):
    model = LLAMA.model()
    expected = config_of(saved(model, tmp_path / "stock"))
    with patched(model):
        assert "patched by" in config_of(saved(model, tmp_path / "patched"))["model_type"]
    assert config_of(saved(model, tmp_path / "after")) == expected
    assert "save_pretrained" not in vars(model) and LLAMA.model().save_pretrained.__func__ is PreTrainedModel.save_pretrained


def test_what_is_no_patched_checkpoint(tmp_path: Path):
    LLAMA.model().save_pretrained(tmp_path / "stock")
    with pytest.raises(PatchError, match="has no neural layers: its model type is 'llama'"):
        from_pretrained(tmp_path / "stock")
    with pytest.raises(OSError, match="nowhere"):
        from_pretrained(tmp_path / "nowhere")
    folder = saved(patched_model(LLAMA), tmp_path / "patched")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.scorer" not in name}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with transformers_log(), pytest.raises(PatchError, match=r"lacks weights of its neural layers: model.layers.1"):
        from_pretrained(folder)
    content = config_of(folder)
    content["neural_attention_patch"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(PatchError, match="Install a newer"):
        from_pretrained(folder)
    content["neural_attention_patch"] |= {"format_version": 1, "base_model": {"class": "LlamaForTelepathy"}}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(PatchError, match="LlamaForTelepathy, a class that Transformers"):
        from_pretrained(folder)


def test_own_classes_load_too(tmp_path: Path):
    model = from_pretrained(saved(patched_model(GPT2), tmp_path / "first"))
    assert isinstance(model, NeuralGPT2LMHeadModel)
    assert isinstance(from_pretrained(saved(model, tmp_path / "second"), dtype=torch.float64), NeuralGPT2LMHeadModel)
