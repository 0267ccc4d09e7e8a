"""Command lines: flags, files, files with flags after them, and what is wrong with them."""

import json
import re
import sys
from importlib import import_module

import pytest
import yaml
from transformers import TrainingArguments

from image_classification import ModelArguments as ImageModelArguments
from language_modeling import ModelArguments as TextModelArguments
from patch_and_finetune import CheckpointArguments
from recall import ModelArguments as RecallModelArguments
from tests.helpers.running import RECIPES
from tools.command_lines import parse_arguments
from training.images import ImageArguments
from training.neural_arguments import NeuralArguments
from training.recall_task import RecallArguments
from training.text import TextArguments


def parse(monkeypatch, *flags, types=(NeuralArguments,)):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, flags)])
    return parse_arguments(*types)


def test_flags_make_config_fields(monkeypatch):
    (arguments,) = parse(monkeypatch, "--neural_layers", "0", "-1", "--neural_hidden_dims", "4", "2", "--neural_proj_dim", "3")
    fields = arguments.config_fields()
    assert fields["neural_layers"] == [0, -1]
    assert (fields["neural_proj_dim"], fields["neural_hidden_dims"]) == (3, [4, 2])
    assert set(fields) == {"neural_layers", "neural_proj_dim", "neural_hidden_dims"}  # leaves others to the checkpoint
    assert parse(monkeypatch, "--neural_layers", "all")[0].config_fields() == {"neural_layers": "all"}
    assert parse(monkeypatch, "--neural_layers", "none")[0].config_fields() == {"neural_layers": []}
    assert parse(monkeypatch)[0].config_fields() == {}


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_serves_and_flags_after_it_win(monkeypatch, tmp_path, suffix):
    file = tmp_path / f"run.{suffix}"
    content = {"attention": "neural", "neural_layers": [0, 1], "neural_mode": "residual", "neural_proj_dim": None}
    file.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
    (arguments,) = parse(monkeypatch, file, "--neural_mode", "replace")
    assert (arguments.attention, arguments.neural_layers, arguments.neural_mode) == ("neural", ["0", "1"], "replace")
    assert arguments.neural_proj_dim is None
    file.write_text("{neural_layers: []}")
    assert parse(monkeypatch, file)[0].config_fields() == {"neural_layers": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "must hold `name: value` pairs; it holds a list"), ("{a: [", "is not valid"), (None, "Cannot read")],
)
def test_bad_files_are_refused(monkeypatch, tmp_path, text, message):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit, match=message):
        parse(monkeypatch, file)


def test_unknown_names_and_words_are_refused(monkeypatch, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("no_such_argument: 1")
    with pytest.raises(SystemExit, match="no_such_argument"):
        parse(monkeypatch, file)
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--attention", "quadratic")
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="expected indices of layers, all, or none"):
        parse(monkeypatch, "--neural_layers", "first")[0].config_fields()


@pytest.mark.parametrize("file", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_parses(monkeypatch, tmp_path, file):
    content = yaml.safe_load(file.read_text())
    image = "image_size" in content
    types = (ImageModelArguments, ImageArguments) if image else (TextModelArguments, TextArguments)
    if file.stem.startswith("patch-"):
        types = (CheckpointArguments, types[1])
    if "num_pairs" in content:
        types = (RecallModelArguments, RecallArguments)
    parsed = parse(monkeypatch, file, "--output_dir", tmp_path, types=(*types, NeuralArguments, TrainingArguments))
    for name, value in content.items():
        owner = next(group for group in parsed if hasattr(group, name))
        if name not in ("output_dir", "neural_layers", "report_to"):  # skips those that are parsed into other types
            assert getattr(owner, name) == value, name
    assert parsed[2].attention == content.get("attention", "both")


ROOT = RECIPES.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), RECIPES / "README.md", ROOT / "model_cards/README.md"]
COMMAND = re.compile(r"recipes/(\w+)\.py((?: +[^\s`#|]+)*)")
HANDED_ON = {"study": "language_modeling"}  # recipes that hand on what they do not know


def named_flags() -> dict[str, set[str]]:
    """Flags that the documents' commands give, of each recipe."""
    named: dict[str, set[str]] = {}
    for path in DOCUMENTS:
        for script, words in COMMAND.findall(path.read_text()):
            named.setdefault(script, set()).update(re.findall(r"--\w+", words))
    return named


def test_flags_that_documents_name_exist(monkeypatch, capsys):
    named = named_flags()
    assert "--preset" in named["benchmark_attention"] and sum(map(len, named.values())) > 20
    for script, flags in named.items():
        for recipe in filter(None, (script, HANDED_ON.get(script))):
            monkeypatch.setattr(sys, "argv", [f"{recipe}.py", "--help"])
            with pytest.raises(SystemExit, match=r"^0$"):
                import_module(recipe).main()
        missing = flags - set(re.findall(r"--\w+", capsys.readouterr().out))
        assert not missing, f"recipes/{script}.py has no {missing}"


def test_the_papers_settings_are_the_papers():
    text = yaml.safe_load((RECIPES / "configs/wikitext103-paper.yaml").read_text())
    assert [text[name] for name in ("n_embd", "n_layer", "n_head", "n_inner", "block_size", "stride")] == [
        512,
        8,
        8,
        1024,
        1024,
        512,
    ]
    optimisation = ("learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm", "dropout")
    assert [text[name] for name in optimisation] == [3e-4, 0.9, 0.95, 0.1, 1.0, 0.1]
    assert (text["max_steps"], text["per_device_train_batch_size"]) == (2_000_000, 1)
    for classes in (10, 100):
        image = yaml.safe_load((RECIPES / f"configs/cifar{classes}-paper.yaml").read_text())
        sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        assert [image[name] for name in sizes] == [224, 8, 768, 12, 8, 1024]
        assert (image["learning_rate"], image["halve_learning_rate_after"], image["num_train_epochs"]) == (0.5e-4, 3, 350)
        assert (image["augmentation"], image["per_device_train_batch_size"]) == ("paper", 1)
