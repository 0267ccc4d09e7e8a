"""`export_to_hub`: the folder loads in every way, in processes of its own, and a Hub gives back what it was sent."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTImageProcessorPil,
)

from hf_neural_attention import (
    NeuralGPT2Config,
    NeuralGPT2DoubleHeadsModel,
    NeuralGPT2LMHeadModel,
    NeuralViTConfig,
    NeuralViTForImageClassification,
    compact,
    export_to_hub,
    patch,
)
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import assert_near, run
from tests.helpers.documents import python_blocks
from tests.helpers.hub import running_hub
from tests.helpers.stock_models import FAMILIES


ROOT = Path(__file__).parents[1]

GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# fixes the backend that the package and copies of the code have in common
BACKEND = {"HF_NEURAL_ATTENTION_BACKEND": "blockwise"}

INPUTS = {
    "gpt2": "dict(input_ids=torch.arange(20)[None])",
    "vit": "dict(pixel_values=torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16))",
}
AUTO = {"gpt2": "AutoModelForCausalLM", "vit": "AutoModelForImageClassification"}
SAVE = """
import torch, transformers, hf_neural_attention
model = transformers.{auto}.from_pretrained("{name}")
torch.save(model(**{inputs}).logits, "logits.pt")
"""
NOT_INSTALLED = """
import importlib.util, sys
assert importlib.util.find_spec("hf_neural_attention") is None
"""
WITHOUT = f"""{NOT_INSTALLED}
import torch, transformers
model = transformers.{{auto}}.from_pretrained("{{name}}", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert torch.equal(model(**{{inputs}}).logits, torch.load("logits.pt"))
config = transformers.AutoConfig.from_pretrained("{{name}}", trust_remote_code=True)
found = getattr(transformers, config.architectures[0]).from_pretrained("{{name}}", trust_remote_code=True)  # as serving does
assert torch.equal(found(**{{inputs}}).logits, torch.load("logits.pt"))
base = transformers.AutoModel.from_pretrained("{{name}}", trust_remote_code=True)
assert not hasattr(base, "lm_head") and type(base).__name__.endswith("Model")
"""
AS_STOCK = f"""{NOT_INSTALLED}
import torch, transformers
base = transformers.AutoModel.from_pretrained("model", trust_remote_code=True)
assert base.config.model_type == base.config.to_dict()["model_type"] == "{{model_type}}"
assert len(base(torch.arange(9)[None], output_hidden_states=True).hidden_states) == base.config.num_hidden_layers + 1
base.save_pretrained("again")
assert "patched by" in transformers.PreTrainedConfig.get_config_dict("again")[0]["model_type"]
"""
UNTRUSTED = f"""{NOT_INSTALLED}
import transformers
try:
    transformers.{{auto}}.from_pretrained("{{name}}")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise SystemExit("it ran code that nobody trusts")
assert not any(name.startswith("transformers_modules") and "neural" in name for name in sys.modules)
"""
PIPELINE = {
    "gpt2": """
import torch, transformers, hf_neural_attention
run = transformers.pipeline("text-generation", "{name}")
assert type(run.model).__name__ == "NeuralGPT2LMHeadModel" and run.model.generation_config.use_cache
assert torch.equal(run.model(**{inputs}).logits, torch.load("logits.pt"))
assert len(run("a b", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 3
""",
    "vit": """
import torch, transformers, hf_neural_attention
from PIL import Image
run = transformers.pipeline("image-classification", "{name}")
assert torch.equal(run.model(**{inputs}).logits, torch.load("logits.pt"))
assert len(run(Image.new("RGB", (16, 16)))) == 2
""",
}


def make(family: str, **fields) -> tuple[Any, Any]:
    """A model, and its tokenizer or image processor."""
    torch.manual_seed(0)
    fields = {"neural_layers": "all", "neural_mode": "replace", **fields}
    if family == "gpt2":
        tokenizer = GPT2Tokenizer().train_new_from_iterator(["a b c"], vocab_size=300)
        return NeuralGPT2LMHeadModel(NeuralGPT2Config(**GPT2, **fields)), tokenizer
    model = NeuralViTForImageClassification(NeuralViTConfig(**VIT, **fields, initializer_range=0.2))
    return model, ViTImageProcessorPil(size={"height": 16, "width": 16})


def script(code: str, folder: Path, **environment: str) -> str:
    own = {"HF_MODULES_CACHE": str(folder / "modules"), **BACKEND, **environment}
    command = [sys.executable]
    if code.startswith(NOT_INSTALLED):
        # leaves out this package alone, whose source is no part of site-packages
        command += ["-S"]
        own["PYTHONPATH"] = sysconfig.get_path("purelib")
    command += ["-c", code]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("is_compact", (False, True), ids=("whole", "compact"))
@pytest.mark.parametrize("family", ("gpt2", "vit"))
def test_it_loads_in_every_way(family: str, is_compact: bool, tmp_path: Path):
    model, processor = make(family, neural_compact=is_compact)
    model.config.use_cache = False  # sets it as Trainer leaves it
    assert export_to_hub(model, tmp_path / "model", processor) == tmp_path / "model"
    assert model.config.use_cache is False
    for code in (SAVE, WITHOUT, UNTRUSTED, PIPELINE[family]):
        script(code.format(name="model", auto=AUTO[family], inputs=INPUTS[family]), tmp_path)
    script("\n".join(code for _, code in python_blocks((tmp_path / "model/README.md").read_text())), tmp_path)


def test_what_is_in_the_folder(tmp_path: Path):
    model, tokenizer = make("gpt2")
    folder = export_to_hub(
        model, tmp_path / "model", tokenizer, results={"test_perplexity": 12.5}, dataset="wikitext", description="Tiny."
    )
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert {name for name in names if name.endswith(".py")} >= {"modeling_neural_gpt2.py", "neural_attention_scorer.py"}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names) and list(tmp_path.iterdir()) == [folder]
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # by the package, whose code is not saved
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again/config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["neural_format_version"] == 1 and config["architectures"] == ["NeuralGPT2LMHeadModel"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_neural_gpt2.NeuralGPT2LMHeadModel"
    assert config["auto_map"]["AutoConfig"] == "configuration_neural_gpt2.NeuralGPT2Config"
    card = (folder / "README.md").read_text()
    assert "license:" not in card and "base_model:" not in card
    for text in ("pipeline_tag: text-generation", "| test_perplexity | 12.5 |", "Tiny.", "2502.17206"):
        assert text in card, card
    assert "trust_remote_code" in card
    model.config.name_or_path = model.name_or_path = "somebody/base"
    bare = export_to_hub(model, tmp_path / "bare", remote_code=False, license="mit")
    assert {"license: mit", "base_model: somebody/base"} <= set((bare / "README.md").read_text().splitlines())
    assert not list(bare.glob("*.py")) and "auto_map" not in json.loads((bare / "config.json").read_text())
    assert "trust_remote_code" not in (bare / "README.md").read_text()


def test_what_others_left_in_the_folder(tmp_path: Path, monkeypatch):
    """Weights that would be loaded in place of the new ones go; adapters are refused; the rest stays, and is not uploaded."""
    model, sent = make("gpt2")[0], []
    monkeypatch.setattr(
        "hf_neural_attention.export.upload", lambda *arguments, **options: sent.append(options["allow_patterns"])
    )
    folder = tmp_path / "model"
    (folder / "checkpoint-2").mkdir(parents=True)
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    others = {
        "training_args.bin",
        "notes.txt",
        "model_1.safetensors",
        "model_ema.safetensors",
        "pytorch_model_best.bin",
        "model.bin",
    }
    for name in (*stale, *others, "checkpoint-2/model.safetensors"):
        (folder / name).write_text("old")
    export_to_hub(model, folder, push_to_hub=True)
    names = {path.name for path in folder.iterdir()}
    assert names >= {*others, "checkpoint-2", "model.safetensors"} and not names & {*stale}
    assert not {*others, "checkpoint-2"} & {*sent[0]} and {"model.safetensors", "README.md"} < {*sent[0]}
    (folder / "adapter_config.json").write_text("{}")
    before = (folder / "README.md").read_bytes()
    with pytest.raises(PatchError, match=r"holds adapters \(adapter_config.json\)"):
        export_to_hub(model, folder, description="new")
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("family", ("llama", "bert", "compact bert"))
def test_patched_models_of_other_families_load_in_every_way(family: str, tmp_path: Path):
    name = family.split()[-1]
    model = patch(FAMILIES[name].model(), "all", mode="replace", proj_dim=4, per_head=name == "llama")
    if family.startswith("compact"):
        compact(model)
    auto = f"AutoModelFor{FAMILIES[name].head}"
    tokenizer = make("gpt2")[1]
    tokenizer.add_special_tokens({"mask_token": "<mask>"})  # without one there is no pipeline "fill-mask"
    export_to_hub(model, tmp_path / "model", tokenizer)
    for code in (SAVE, WITHOUT, UNTRUSTED):
        script(code.format(name="model", auto=auto, inputs=INPUTS["gpt2"]), tmp_path)
    script(AS_STOCK.format(model_type=name), tmp_path)
    # allows for rounding, since another backend may run here
    assert_near(torch.load(tmp_path / "logits.pt"), run(model, input_ids=torch.arange(20)[None]))
    card = (tmp_path / "model/README.md").read_text()
    assert f"pipeline_tag: {'text-generation' if name == 'llama' else 'fill-mask'}" in card
    script("\n".join(code for _, code in python_blocks(card)), tmp_path)


def test_patched_models(tmp_path: Path):
    stock = patch(GPT2LMHeadModel(GPT2Config(**GPT2)), mode="replace").eval()
    loaded = NeuralGPT2LMHeadModel.from_pretrained(export_to_hub(stock, tmp_path / "model"))
    assert torch.equal(loaded(torch.arange(9)[None]).logits, stock(torch.arange(9)[None]).logits)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=9, num_attention_heads=2))
    with pytest.raises(PatchError, match="not patched"):
        export_to_hub(model, tmp_path / "llama")
    own = type("OwnForCausalLM", (LlamaForCausalLM,), {})(model.config)
    with pytest.raises(PatchError, match="no code to export"):
        export_to_hub(patch(own), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
    folder = export_to_hub(patch(model), tmp_path / "llama")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_neural_patched.PatchedConfig"
    assert auto_map["AutoModelForCausalLM"] == "modeling_neural_patched.PatchedLlamaForCausalLM"
    assert auto_map["AutoModel"] == "modeling_neural_patched.PatchedLlamaModel"
    assert (folder / "neural_attention_packing.py").exists()
    bare = export_to_hub(model, tmp_path / "bare", remote_code=False)
    assert not list(bare.glob("*.py")) and "auto_map" not in json.loads((bare / "config.json").read_text())


def test_adapters_must_be_merged_first(tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("gpt2")[0], peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))
    with pytest.raises(PatchError, match=r"has adapters inside \(transformer.h.0.attn.c_attn.*Merge them first"):
        export_to_hub(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    merged = model.merge_and_unload()
    loaded = NeuralGPT2LMHeadModel.from_pretrained(export_to_hub(merged, tmp_path / "model"))
    assert torch.equal(loaded(torch.arange(9)[None]).logits, merged.eval()(torch.arange(9)[None]).logits)


def test_a_class_without_an_auto_class_loads_by_its_own_name(tmp_path: Path):
    model = NeuralGPT2DoubleHeadsModel(NeuralGPT2Config(**GPT2)).eval()
    card = (export_to_hub(model, tmp_path) / "README.md").read_text()
    assert "from hf_neural_attention import NeuralGPT2DoubleHeadsModel" in card and "trust_remote_code" not in card
    loaded = NeuralGPT2DoubleHeadsModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


def test_an_export_replaces_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = make("gpt2")
    monkeypatch.chdir(tmp_path)
    for greeting in ("hello", "goodbye"):
        tokenizer.chat_template = {"default": greeting, "tool_use": f"{greeting}, tool"}
        export_to_hub(model, ".", tokenizer)
    assert (tmp_path / "additional_chat_templates/tool_use.jinja").read_text() == "goodbye, tool"
    assert f"# {tmp_path.name}\n" in (tmp_path / "README.md").read_text()


def test_a_failing_export_leaves_what_was_there(tmp_path: Path):
    model, tokenizer = make("gpt2")
    folder = export_to_hub(model, tmp_path / "model", tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "config.json").write_text("{")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export_to_hub(make("gpt2", neural_proj_dim=4)[0], folder, Broken())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ValueError, match="numbers by name"):
        export_to_hub(model, folder, results={"metrics": {"loss": "low"}})


def test_figures_of_numpy_and_torch_are_plain_ones_in_the_card(tmp_path: Path):
    numbers = [np.float64(12.5), np.float32(0.25), np.int64(3), torch.tensor(1.5), torch.tensor(2, dtype=torch.int32), 7]
    folder = export_to_hub(make("gpt2")[0], tmp_path / "model", results={f"n{i}": number for i, number in enumerate(numbers)})
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    values = [metric["value"] for metric in metadata["model-index"][0]["results"][0]["metrics"]]
    assert values == [12.5, 0.25, 3, 1.5, 2, 7]
    assert [type(value) for value in values] == [float, float, int, float, int, int]
    with pytest.raises(ValueError, match="for 'x'; it must hold numbers"):
        export_to_hub(make("gpt2")[0], tmp_path / "model", results={"x": torch.ones(2)})


def test_a_config_from_the_future(tmp_path: Path):
    folder = export_to_hub(make("gpt2")[0], tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"neural_format_version": 2}))
    with pytest.raises(StrictDataclassError, match="newer hf_neural_attention"):
        NeuralGPT2LMHeadModel.from_pretrained(folder)


EXPORT = """
import sys, torch
from tests.test_export import make
from hf_neural_attention import export_to_hub
try:
    export_to_hub(*make("gpt2")[:1], "model", make("gpt2")[1], push_to_hub=True, repo_id="somebody/tiny")
except RuntimeError as error:
    print(error)
"""


def test_figures_of_no_data_set_of_the_hub(tmp_path: Path):
    """Metadata holds names on the Hub alone, which the Hub checks; the text of the card says what was written."""
    figures = {"results": {"perplexity": 2.0}, "description": "Small."}
    for dataset, named in (
        ("Python's language reference", None),
        ("somebody/texts", "somebody/texts"),
        ("wikitext", "wikitext"),
    ):
        folder = export_to_hub(make("gpt2")[0], tmp_path / "model", dataset=dataset, **figures)
        card = ModelCard.load(folder / "README.md")
        assert card.data.datasets == named and f"On {dataset}." in card.text
        (figure,) = card.data.eval_results
        assert (figure.dataset_name, figure.dataset_type) == (dataset, named or "unknown")


@pytest.mark.slow
def test_a_card_names_the_owner_of_what_is_pushed(tmp_path: Path):
    code = EXPORT.replace(', repo_id="somebody/tiny"', "")
    with running_hub() as hub:
        script(code, tmp_path, **hub.environment(tmp_path), PYTHONPATH=str(ROOT))
        assert b'from_pretrained("somebody/model")' in hub.repositories["somebody/model"]["README.md"]


@pytest.mark.slow
def test_a_hub_gives_back_what_it_was_sent(tmp_path: Path):
    with running_hub() as hub:
        environment = hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
        hub.fails_at = 507
        said = script(EXPORT, tmp_path, **environment)
        assert "507" in said and "hf upload somebody/tiny model`" in said and not hub.repositories["somebody/tiny"]
        assert (tmp_path / "model" / "model.safetensors").exists()
        hub.fails_at = None
        assert script(EXPORT, tmp_path, **environment).strip() == ""
        exported = {path.name for path in (tmp_path / "model").iterdir()}
        assert hub.repositories["somebody/tiny"].keys() == exported
        # leaves no weights of before there, and what is not its own alone
        kept = {"notes.txt": b"mine", "onnx/model.safetensors": b"mine"}
        hub.repositories["somebody/tiny"] |= {"pytorch_model.bin": b"old", "model-00001-of-00002.safetensors": b"old", **kept}
        assert script(EXPORT, tmp_path, **environment).strip() == ""
        assert hub.repositories["somebody/tiny"].keys() == exported | kept.keys()
        hub.repositories["somebody/tiny"]["adapter_config.json"] = b"{}"
        assert "it has adapters (adapter_config.json), which would be loaded into this model. Remove them" in script(
            EXPORT, tmp_path, **environment
        )
        del hub.repositories["somebody/tiny"]["adapter_config.json"]
        for code in (SAVE, WITHOUT, UNTRUSTED, PIPELINE["gpt2"]):
            code = code.format(name="somebody/tiny", auto=AUTO["gpt2"], inputs=INPUTS["gpt2"])
            script(code, tmp_path, **environment)


def test_without_a_network_the_folder_is_whole(tmp_path: Path, monkeypatch):
    class NoNetwork(Exception):
        """As httpx's are, of no kind that is built in."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NoNetwork("no network")

    for name in ("whoami", "create_repo"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", fail)
    with pytest.raises(RuntimeError, match="no network"):
        export_to_hub(make("gpt2")[0], tmp_path / "model", push_to_hub=True)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (tmp_path / "model").iterdir()}


def test_the_advice_after_a_failed_upload_sends_nothing_more_and_stays_private(tmp_path: Path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    (tmp_path / "checkpoint-2").mkdir()
    for name in ("training_args.bin", "checkpoint-2/model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("mine")
    model, tokenizer = make("gpt2")
    with pytest.raises(RuntimeError, match="no network") as caught:
        export_to_hub(model, tmp_path, tokenizer, push_to_hub=True, repo_id="somebody/tiny", private=True)
    command = str(caught.value).split("`")[1]
    assert command.startswith(f"hf upload somebody/tiny {tmp_path} --private --include ")
    assert "model.safetensors" in command and "config.json" in command
    assert not any(name in command for name in ("training_args", "checkpoint-2", "notes", "*"))
