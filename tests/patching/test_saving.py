"""`save_patch` and `load_patch`: what is written, what fits what, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model

from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel, load_patch, patch, patch_status, save_patch, unpatch
from hf_neural_attention.models.neural_attention_names import CHANGED
from hf_neural_attention.patching import PatchError, records
from tests.helpers.comparing import assert_far, run
from tests.helpers.documents import python_blocks
from tests.helpers.neural_models import liven, scorers
from tests.helpers.stock_models import FAMILIES, Family


GPT2, LLAMA, T5 = FAMILIES["gpt2"], FAMILIES["llama"], FAMILIES["t5"]
SETTINGS = {
    "residual": {},
    "replace": {"mode": "replace", "proj_dim": 4},
    "per head": {"mode": "replace", "per_head": True, "hidden_dims": (3, 2), "init": "paper"},
}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def patched_model(family: Family = GPT2, layers: Any = "all", **settings) -> Any:
    """One that has learned something since."""
    model = patch(family.model(), layers, **settings)
    with torch.no_grad():
        for scorer in scorers(liven(model)):
            for parameter in scorer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: Any, folder: Path) -> Path:
    save_patch(model, folder)
    return folder


def change(folder: Path, **fields) -> None:
    path = folder / "neural_patch.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_refused(model: Any, folder: Any, match: str, **arguments) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatchError, match=match):
        load_patch(model, folder, **arguments)
    assert not patch_status(model) and before.keys() == model.state_dict().keys()


@every_family
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_round_trip(family: Family, settings: dict, tmp_path: Path):
    model, inputs = patched_model(family, **settings), family.inputs()
    expected, status = run(model, **inputs), patch_status(model)
    folder = saved(model, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "neural_patch.json", "neural_patch.safetensors"]
    assert load_file(folder / "neural_patch.safetensors").keys() == {name for name in model.state_dict() if ".scorer." in name}

    other = family.model()
    assert load_patch(other, folder) is other
    assert torch.equal(run(other, **inputs), expected) and patch_status(other) == status
    assert all(not scorer.linear3.bias.requires_grad and scorer.linear1.weight.requires_grad for scorer in scorers(other))
    unpatch(other)
    assert torch.equal(run(other, **inputs), run(family.model(), **inputs))


def test_what_the_record_says(tmp_path: Path):
    stock = tmp_path / "stock"
    GPT2.model().save_pretrained(stock)
    model = patch(AutoModelForCausalLM.from_pretrained(stock), [1], proj_dim=4)
    record = json.loads((saved(model, tmp_path / "patch") / "neural_patch.json").read_text())
    assert record == {
        "format_version": 1,
        "hf_neural_attention_version": record["hf_neural_attention_version"],
        "base_model": {"name_or_path": str(stock), "revision": None, "class": "GPT2LMHeadModel", "model_type": "gpt2"},
        "layers": {
            "transformer.h.1.attn": {
                "head_dim": 8,
                "proj_dim": 4,
                "hidden_dims": [4, 2],
                "mode": "residual",
                "num_heads": None,
                "init": "mirrored",
            }
        },
    }
    assert str(tmp_path) not in (tmp_path / "patch" / "README.md").read_text()


def test_the_revision_is_that_in_the_cache_if_it_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshots = tmp_path / "models--org--tiny/snapshots"
    (snapshots / "aaa").mkdir(parents=True)
    monkeypatch.setattr(records, "try_to_load_from_cache", lambda name, file: str(snapshots / "aaa" / file))
    assert records.cached_revision("org/tiny") == "aaa"
    (snapshots / "bbb").mkdir()  # adds one that a model may have been loaded from
    assert records.cached_revision("org/tiny") is None


def test_names_of_one_word_are_repositories_if_they_are_in_the_cache(monkeypatch: pytest.MonkeyPatch):
    assert records.is_repository("org/tiny") and not records.is_repository("gpt2") and not records.is_repository("a b")
    monkeypatch.setattr(records, "try_to_load_from_cache", lambda name, file: "/cache/snapshots/aaa/config.json")
    assert records.is_repository("gpt2") and not records.is_repository("tests")  # a folder that is here


def test_by_the_name_of_the_base_model(tmp_path: Path):
    stock = tmp_path / "stock"
    GPT2.model().save_pretrained(stock)
    model, inputs = patched_model(), GPT2.inputs()
    folder = saved(model, tmp_path / "patch")
    loaded = load_patch(str(stock), folder, attn_implementation="eager", dtype=torch.float64)
    assert type(loaded).__name__ == "GPT2LMHeadModel" and loaded.config._attn_implementation == "eager"
    here = {"cache_dir": tmp_path / "cache", "local_files_only": True}  # of the patch as of the model
    assert patch_status(load_patch(GPT2.model(), folder, **here)) == patch_status(load_patch(str(stock), folder, **here))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
    assert (run(loaded, **inputs) - run(model, **inputs))[inputs["attention_mask"].bool()].abs().max() < 1e-4


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_scorers_take_the_dtype_of_their_layer(dtype: torch.dtype, tmp_path: Path):
    loaded = load_patch(GPT2.model().to(dtype).train(), saved(patched_model(), tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(module.training for module in loaded.modules())


def test_a_model_without_a_head_takes_the_patch_of_one_with(tmp_path: Path):
    model = patched_model()
    base = load_patch(GPT2Model(model.config), saved(model, tmp_path / "whole"))
    assert [layer.layer for layer in patch_status(base)] == ["h.0.attn", "h.1.attn", "h.2.attn"]
    back = load_patch(GPT2.model(), saved(base, tmp_path / "base"))
    assert torch.equal(run(back, **GPT2.inputs()), run(model, **GPT2.inputs()))


def test_wrapped_models(tmp_path: Path):
    peft = pytest.importorskip("peft")
    expected = run(patched_model(), **GPT2.inputs())
    torch.manual_seed(0)
    folder = saved(torch.compile(patched_model()), tmp_path / "compiled")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = load_patch(peft.get_peft_model(GPT2.model(), config), folder)
    assert load_file(saved(adapted, tmp_path / "adapted") / "neural_patch.safetensors").keys() == (
        load_file(folder / "neural_patch.safetensors").keys()
    )
    assert_far(expected, run(GPT2.model(), **GPT2.inputs()))
    assert torch.equal(run(adapted, **GPT2.inputs()), run(load_patch(GPT2.model(), folder), **GPT2.inputs()))


def test_adapters_that_are_prompts_do_not_name_the_stock_model(tmp_path: Path):
    peft = pytest.importorskip("peft")
    folder, base = saved(patched_model(), tmp_path / "patch"), GPT2.model()
    base.name_or_path = "somebody/gpt2"
    adapted = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert adapted.active_peft_config.base_model_name_or_path == "somebody/gpt2"
    load_patch(adapted, folder)
    assert adapted.active_peft_config.base_model_name_or_path == f"somebody/gpt2{CHANGED}"


def test_adapters_inside_a_scorer_must_be_merged_first(tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(patched_model(), peft.LoraConfig(target_modules=["linear1", "linear2"]))
    with pytest.raises(PatchError, match="Merge adapters first"):
        save_patch(model, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
    merged = model.merge_and_unload()
    loaded = load_patch(GPT2.model(), saved(merged, tmp_path / "patch"))
    assert torch.equal(run(loaded, **GPT2.inputs()), run(merged, **GPT2.inputs()))


def test_a_state_dict_from_elsewhere(tmp_path: Path):
    model = patched_model()
    state = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    save_patch(model, tmp_path, state_dict=state)
    for name, tensor in load_file(tmp_path / "neural_patch.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name] + 1)
    with pytest.raises(PatchError, match="whole state dict"):
        save_patch(model, tmp_path, state_dict={})
    save_patch(model, tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_saving_what_has_no_patch(tmp_path: Path):
    with pytest.raises(PatchError, match="not patched"):
        save_patch(GPT2.model(), tmp_path)
    neural = NeuralGPT2LMHeadModel(NeuralGPT2Config(**{**GPT2.model().config.to_diff_dict(), "neural_layers": "all"}))
    with pytest.raises(PatchError, match="save_pretrained"):
        save_patch(neural, tmp_path)
    with torch.device("meta"):
        empty = patch(GPT2.model(), "all")
    with pytest.raises(PatchError, match="no numbers here"):
        save_patch(empty, tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit(tmp_path: Path):
    folder = saved(patched_model(), tmp_path / "gpt2")
    assert_refused(LLAMA.model(), folder, r"no attention module 'transformer.h.0.attn'.*GPT2LMHeadModel \(model type gpt2\)")
    assert_refused(GPT2.model(num_hidden_layers=2), folder, "no attention module 'transformer.h.2.attn'")
    assert_refused(GPT2.model(num_attention_heads=2), folder, "'transformer.h.0.attn' has head_dim 16, not 8")
    per_head = saved(patched_model(per_head=True), tmp_path / "per_head")
    assert_refused(GPT2.model(num_attention_heads=2, hidden_size=16), per_head, "has 2 heads, not 4")
    change(folder, format_version=99)
    assert_refused(GPT2.model(), folder, "format 99.*Install a newer")
    with pytest.raises(PatchError, match="patched already"):
        load_patch(patched_model(), per_head)
    with pytest.raises(TypeError, match="dtype"):
        load_patch(GPT2.model(), per_head, dtype=torch.float64)


def test_damaged_files(tmp_path: Path):
    def copy_of_patch(name: str) -> Path:
        return saved(patched_model(), tmp_path / name)

    with pytest.raises(OSError, match=r"neural_patch\.json"):
        load_patch(GPT2.model(), tmp_path)
    folder = copy_of_patch("truncated record")
    (folder / "neural_patch.json").write_text('{"format_version": 1, "lay')
    assert_refused(GPT2.model(), folder, "neural_patch.json in .* is damaged")
    change_to = copy_of_patch("no record")
    (change_to / "neural_patch.json").write_text("{}")
    assert_refused(GPT2.model(), change_to, "no record of a patch")
    folder = copy_of_patch("truncated weights")
    weights = folder / "neural_patch.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(GPT2.model(), folder, "neural_patch.safetensors in .* is damaged")
    folder = copy_of_patch("other weights")
    tensors = load_file(folder / "neural_patch.safetensors")
    removed = tensors.pop("transformer.h.1.attn.scorer.q_proj.weight")
    save_file(tensors, folder / "neural_patch.safetensors")
    assert_refused(GPT2.model(), folder, "differ in 'transformer.h.1.attn.scorer.q_proj.weight'")
    save_file(tensors | {"transformer.h.1.attn.scorer.q_proj.weight": removed[:1]}, folder / "neural_patch.safetensors")
    assert_refused(GPT2.model(), folder, "differ in 'transformer.h.1.attn.scorer.q_proj.weight'")
    folder = copy_of_patch("no scorer")
    change(folder, layers={"transformer.h.1.attn": {"head_dim": 8, "colour": "blue"}})
    assert_refused(GPT2.model(), folder, "make no scorer.*colour")


def test_saving_again_replaces_and_keeps_the_card(tmp_path: Path):
    folder = saved(patched_model(), tmp_path)
    (folder / "README.md").write_text("mine")
    model = patched_model(proj_dim=4)
    save_patch(model, folder)
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()
    save_patch(model, folder)
    assert "`proj_dim` 4" in (folder / "README.md").read_text()
    save_patch(patched_model(proj_dim=3), folder, repo_id="somebody/patch")
    card = (folder / "README.md").read_text()
    assert "`proj_dim` 3" in card and '"somebody/patch"' in card, "a card of the patch that was there is of that alone"
    save_patch(model, folder)
    assert '"somebody/patch"' in (folder / "README.md").read_text(), "the name that was given stays"
    (folder / "README.md").write_text(f"{card}And more.")
    save_patch(model, folder)
    assert (folder / "README.md").read_text() == f"{card}And more."
    change(folder, layers={})  # a damaged patch is replaced
    save_patch(model, folder)
    assert torch.equal(run(load_patch(GPT2.model(), folder), **GPT2.inputs()), run(model, **GPT2.inputs()))
    assert torch.equal(run(load_patch(GPT2.model(), folder), **GPT2.inputs()), run(model, **GPT2.inputs()))


def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = patched_model()
    GPT2.model().save_pretrained("BASE_MODEL")
    ((_, code),) = python_blocks((saved(model, Path("a-patch")) / "README.md").read_text())
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert patch_status(scope["model"]) == patch_status(model)


def test_another_base_model_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = patched_model()
    model.config._name_or_path = "somebody/gpt2"
    folder = saved(model, tmp_path)
    assert "base_model: somebody/gpt2" in (folder / "README.md").read_text()
    other: nn.Module = GPT2.model()
    other.config._name_or_path = "somebody/gpt2-chat"
    load_patch(other, folder)
    assert "made for somebody/gpt2 and is now on somebody/gpt2-chat" in caplog.text


def test_neither_saving_nor_loading_draws_random_numbers(tmp_path: Path):
    model, other = patched_model(), GPT2.model()
    random = torch.get_rng_state()
    load_patch(other, saved(model, tmp_path))
    assert torch.equal(torch.get_rng_state(), random)
