"""Estimates of long runs from a few steps."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

import estimate
from estimate import duration, markdown, total_steps
from tests.helpers.running import RECIPES, run_in
from training.arms import Arm


def experiment(tmp_path: Any, **arguments: Any) -> Any:
    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **arguments)
    return SimpleNamespace(training=training, trainer_arguments={"train_dataset": range(103)})


def test_steps_and_evaluations(tmp_path):
    epochs = {"num_train_epochs": 3, "per_device_train_batch_size": 10}
    assert total_steps(experiment(tmp_path, **epochs)) == (33, 0)
    assert total_steps(experiment(tmp_path, **epochs, gradient_accumulation_steps=2)) == (18, 0)
    assert total_steps(experiment(tmp_path, **epochs, eval_strategy="epoch")) == (33, 3)
    assert total_steps(experiment(tmp_path, **epochs, max_steps=50, eval_strategy="steps", eval_steps=20)) == (50, 3)
    dropping = {"dataloader_drop_last": True, "eval_strategy": "epoch", "eval_on_start": True}
    assert total_steps(experiment(tmp_path, **epochs, **dropping)) == (30, 4)
    assert total_steps(experiment(tmp_path, **epochs, eval_on_start=True)) == (33, 1)
    assert total_steps(experiment(tmp_path, max_steps=50, eval_strategy="steps", eval_steps=0.1)) == (50, 10)  # takes a share
    several = experiment(tmp_path, **epochs)
    several.training._n_gpu = 4  # of one process, whose steps take as many batches
    assert total_steps(several) == (9, 0)


def test_figures_by_hand():
    figures = {"parameters": 1000, "seconds_per_step": 0.5, "memory": 3 * 2**29, "seconds_of_evaluation": 100.0}
    record = {"config": "c.yaml", "command": "python c", "note": "A note.", "steps": 864_000, "evaluations": 864}
    record |= {"arms": {"dot": figures, "neural": figures | {"seconds_per_step": 1.0}}, "operations_per_step": 2e12}
    record["environment"] = dict.fromkeys(("cpu", "gpu", "threads", "torch", "transformers"), "x")
    text = markdown(record)
    assert "| dot product | 1,000 | 0.5 | 864,000 | 864 of 100 | 6 days | 1.50 |" in text
    assert "| neural attention | 1,000 | 1 | 864,000 | 864 of 100 | 11 days | 1.50 |" in text
    assert "2 TFLOP" in text and "1.73 EFLOP" in text and "100 TFLOP/s, 4.8 hours at least" in text and "A note." in text
    assert [duration(seconds) for seconds in (1.5, 150, 7200, 180_000)] == [
        "1.5 seconds",
        "2.5 minutes",
        "2 hours",
        "2.08 days",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (("nowhere.yaml",), "Cannot read the configuration nowhere.yaml"),
        ((str(RECIPES / "configs/quickstart.yaml"), "--nothing", "1"), "--nothing"),
        ((str(RECIPES / "configs/quickstart.yaml"), "--n_head", "0"), "--n_head is 0; expected at least 1"),
        ((str(RECIPES / "configs/quickstart.yaml"), "--output", "file/e"), "--output file/e cannot be written to: "),
    ),
)
def test_bad_arguments_get_a_sentence(tmp_path, monkeypatch, flags: tuple, words: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["estimate.py", "language_modeling", *flags])
    with pytest.raises(SystemExit, match=words):
        estimate.main()


def test_models_that_cannot_be_built_get_a_sentence(tmp_path):
    def build(arm: Any) -> Any:
        raise ValueError("`embed_dim` must be\ndivisible by num_heads")

    with pytest.raises(SystemExit, match="The dot model cannot be built: `embed_dim` must be divisible by num_heads"):
        estimate.build(SimpleNamespace(initial_model=build), Arm.DOT)


@pytest.mark.slow
def test_an_estimate_of_a_model_that_cannot_be_built(tmp_path):
    config = str(RECIPES / "configs/quickstart.yaml")
    flags = ["--n_embd", "10", "--n_layer", "1", "--n_head", "3", "--vocab_size", "300", "--block_size", "32"]
    said = run_in(tmp_path, "estimate.py", "language_modeling", config, *flags, "--max_train_samples", "8", fails=True)
    assert "A gpt2 of width 10 cannot have 3 heads" in said and "Traceback" not in said


@pytest.mark.slow
def test_an_estimate_of_a_run(tmp_path):
    config = str(RECIPES / "configs/quickstart.yaml")
    flags = ["--n_embd", "16", "--n_layer", "1", "--n_head", "1", "--vocab_size", "300", "--block_size", "32"]
    flags += ["--max_train_samples", "8", "--max_eval_tokens", "100", "--max_steps", "1000", "--disable_tqdm", "True"]
    said = run_in(tmp_path, "estimate.py", "language_modeling", config, *flags, "--output", "e", "--output_dir", "none")
    record = json.loads((tmp_path / "e.json").read_text())
    assert (tmp_path / "e.md").read_text() in said and record["steps"] == 1000 and record["evaluations"] == 10
    for arm in ("dot", "neural"):
        assert record["arms"][arm]["seconds_per_step"] > 0 and record["arms"][arm]["memory"] > 2**16
    # counts 16 blocks of 32 tokens: at least 6 operations for each weight of a matrix, and the head's
    assert record["operations_per_step"] > 6 * 16 * 32 * 16 * 300 / 2
    assert not (tmp_path / "none").exists()
