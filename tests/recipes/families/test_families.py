"""Which families can be patched: small models as others' tests build them, and what becomes of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import list_patchable_families
from families import patch_examination
from families.patch_examination import examine
from families.transformers_test_models import models_as_tested, version_of
from hf_neural_attention.patching.module_names import stack_name
from list_patchable_families import MEANINGS, examined, markdown
from tests.helpers.stock_models import FAMILIES, GPT2


# Stands for tests as Transformers writes them: a class that cannot be built, and two that can
TESTS = f"""
import unittest
import torch
from transformers import GPT2Config, GPT2ForTokenClassification, GPT2Model

class Tester:
    def prepare_config_and_inputs_for_common(self):
        return GPT2Config(**{GPT2}), {{"input_ids": torch.randint(3, 98, (2, 7))}}

class ModelTest(unittest.TestCase):
    all_model_classes = (len, GPT2Model, GPT2ForTokenClassification)

    def setUp(self):
        self.model_tester = Tester()

    def _prepare_for_class(self, inputs, wanted):
        return inputs

class NeedsALibraryTest(ModelTest):
    def setUp(self):
        raise ImportError("it requires the timm library")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tests, by another name than that of ours."""
    family = tmp_path / "their_tests" / "models" / "gpt2"
    family.mkdir(parents=True)
    for folder in (family.parents[1], family.parent, family):
        (folder / "__init__.py").touch()
    (family / "test_modeling_gpt2.py").write_text(TESTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "their_tests"


def test_models_as_tested(checkout: Path):
    found = list(models_as_tested("gpt2", checkout))
    assert [type(model).__name__ for model, _ in found] == ["GPT2Model", "GPT2ForTokenClassification"]
    assert examine(*found[0]) == {
        "class": "GPT2Model",
        "attention_layers": 3,
        "patched_layers": 3,
        "stacks": ["h.*.attn"],
        "status": "works",
    }
    assert version_of(checkout) == "unknown"
    (checkout.parent / "src" / "transformers").mkdir(parents=True)
    (checkout.parent / "src" / "transformers" / "__init__.py").write_text('import os\n__version__ = "9.9"\n')
    assert version_of(checkout) == "9.9"
    (checkout / "models" / "gpt2" / "test_modeling_gpt2.py").unlink()
    with pytest.raises(RuntimeError, match="no model"):
        list(models_as_tested("gpt2", checkout))


def test_tokens_that_see_nothing_are_no_fault():
    inputs = FAMILIES["t5"].inputs()
    inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    result = examine(FAMILIES["t5"].model(), inputs)
    assert result["status"] == "works"
    assert result["zeros_in_padding"] == ["as built", "eager"]
    assert set(result["stacks"]) == set(map(stack_name, FAMILIES["t5"].layers))


def test_a_boolean_mask_that_stock_eager_attention_adds_is_no_fault():
    model, inputs = FAMILIES["bert"].model(), FAMILIES["bert"].inputs()
    rows, columns = inputs["input_ids"].shape
    inputs["attention_mask"] = torch.ones(columns, columns).tril().bool().expand(rows, 1, -1, -1)
    result = examine(model, inputs)
    assert (result["status"], result["boolean_masks"]) == ("works", ["eager"])


def test_a_patch_that_changes_other_tokens_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch_examination, "patch", partial(patch_examination.patch, mode="replace"))
    result = examine(FAMILIES["t5"].model(), FAMILIES["t5"].inputs())
    assert result["status"] == "fails"
    assert result["reason"].startswith("residual mode changes the outputs (by ")


def test_results_of_a_familys_models(monkeypatch: pytest.MonkeyPatch):
    def examined_as(model: Any, inputs: Any) -> dict[str, Any]:
        if inputs == "fails to run":
            raise ValueError("it needs more")
        return {
            "class": type(model).__name__,
            "status": inputs,
            "reason": "it says so",
            "attention_layers": 2,
            "patched_layers": 1,
        }

    def result(*statuses: str) -> dict[str, Any] | None:
        return examined(((model, status) for model, status in zip(models, statuses, strict=False)), "tests", reasons)

    monkeypatch.setattr(list_patchable_families, "examine", examined_as)
    models, reasons = [GPT2Model(GPT2Config(**GPT2)), FAMILIES["llama"].model(), FAMILIES["t5"].model()], []
    found = result("no interface", "refused", "works")
    assert found == {
        "class": "T5ForConditionalGeneration",
        "status": "in part",
        "reason": "LlamaForCausalLM: it says so",
        "attention_layers": 2,
        "patched_layers": 1,
        "configuration": "tests",
    }
    for statuses, status in (
        (("works", "fails"), "works"),
        (("refused", "fails", "works"), "fails"),
        (("no interface", "refused"), "refused"),
        (("no interface", "no interface"), "no interface"),
    ):
        assert result(*statuses)["status"] == status
    assert not reasons
    assert result("fails to run", "no interface") is None  # as the first has an interface
    assert reasons == ["GPT2Model: it needs more"]
    versions = {"transformers": "9", "torch": "8"}
    text = markdown({"families": {"some": found}, "tests": "9.9", "command": "python it", "environment": versions})
    assert f"| in part | 1 | {MEANINGS['in part']} |" in text
    assert "| some | in part | T5ForConditionalGeneration | 1 of 2 | LlamaForCausalLM: it says so |" in text


def test_nan_is_no_equal():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([0.5, 1.0])
    assert patch_examination.relative(nan, one) == patch_examination.relative(one, nan) == float("inf")
    never = torch.tensor([float("-inf")])
    assert patch_examination.relative(nan, nan) == patch_examination.relative(never, never) == 0


def test_results_of_other_versions_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A table says one version, and one kind of models, of all of its families."""
    tried: list[str] = []

    def try_all(wanted: list[str], *_: Any) -> Any:
        tried.extend(wanted)
        return ((name, {"status": "no interface", "stacks": []}) for name in wanted)

    def run(*words: object) -> None:
        monkeypatch.setattr("sys.argv", ["list_patchable_families.py", *map(str, words)])
        list_patchable_families.main()

    monkeypatch.setattr(list_patchable_families, "try_all", try_all)
    output = ("--output", tmp_path / "families")
    run("gpt2", "bert", *output)
    run("bert", *output)
    record = json.loads((tmp_path / "families.json").read_text())
    record["environment"]["transformers"] = "4.0"
    (tmp_path / "families.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        run("vit", *output)
    assert tried == ["gpt2", "bert", "bert"] and json.loads((tmp_path / "families.json").read_text()) == record
