"""Tasks of recall: what is asked and what is right, by hand; and the recipe with tiny sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import recall
from tests.helpers.running import run_in
from training.arms import Arm
from training.recall_task import NOTHING, RecallArguments, ask, draw, prepare


TINY = (
    *("--num_keys", 8, "--num_values", 4, "--num_pairs", 2, "--sequence_length", 12, "--num_train", 40, "--num_eval", 10),
    *("--n_embd", 16, "--max_steps", 2, "--report_to", "none", "--eval_strategy", "no", "--logging_steps", 1),
    *("--disable_tqdm", True, "--neural_layers", "all"),
)


@pytest.mark.parametrize("task", ("recall", "nearest", "first_above"))
def test_answers_are_those_of_the_pairs_that_were_read(task: str):
    arguments = RecallArguments(task=task, num_keys=16, num_values=8, num_pairs=3, sequence_length=20)
    drawn = draw(arguments, 50, np.random.default_rng(0))
    tokens, labels = drawn["input_ids"], drawn["labels"]
    assert tokens.shape == labels.shape == (50, 20) and tokens.max() < arguments.vocab_size == 32
    places = set()
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0:6:2], row[1:6:2]
        assert len(set(keys)) == 3 and max(keys) < 16 <= min(values) and max(values) < 24
        asked = [place - 1 for place, label in enumerate(wanted) if label != NOTHING]
        assert len(asked) == 3 and min(asked) >= 6 and all(place % 2 == 0 for place in asked)
        assert all(row[place] >= 24 for place in range(6, 20) if place not in asked)  # noise
        places.update(asked)
        for place in asked:
            question = row[place]
            if task == "recall":
                chosen = keys.index(question)
            elif task == "nearest":
                chosen = min(range(3), key=lambda pair: (abs(keys[pair] - question), keys[pair]))
            else:
                chosen = next(pair for pair in range(3) if keys[pair] > question)
            assert wanted[place + 1] == values[chosen]
    assert places == set(range(6, 20, 2)) and len({tuple(row) for row in tokens.tolist()}) > 40


def test_of_two_numbers_as_near_the_smaller_one():
    keys, values = np.array([[6, 2]]), np.array([[10, 11]])

    class Fours:
        def integers(self, most: int, size: tuple[int, int]) -> np.ndarray:
            return np.full(size, 4)

    questions, answers = ask("nearest", 8, keys, values, Fours())  # type: ignore[arg-type]
    assert questions.tolist() == [[4, 4]] and answers.tolist() == [[11, 11]]


def test_splits_differ_and_follow_from_the_seed():
    arguments = RecallArguments(num_train=4, num_eval=4)
    first, again, other = (prepare(arguments, seed).trainer_arguments for seed in (0, 0, 1))
    assert torch.equal(first["train_dataset"][0]["input_ids"], again["train_dataset"][0]["input_ids"])
    assert not torch.equal(first["train_dataset"][0]["input_ids"], other["train_dataset"][0]["input_ids"])
    assert not torch.equal(first["train_dataset"][0]["input_ids"], first["eval_dataset"][0]["input_ids"])


def test_figures_by_hand(tmp_path: Path):
    """A model that always says one value is right as often as that is asked for; loss as the model's own."""
    words = (*TINY, "--use_cpu", True, "--output_dir", tmp_path / "run")
    experiment, task, _ = recall.load_experiment([str(word) for word in words])
    model: Any = experiment.initial_model(Arm.DOT)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[9] += 5.0
    figures = experiment.evaluate(experiment.trainer(Arm.DOT, model))
    data = experiment.trainer_arguments["eval_dataset"][:]
    answers = data["labels"][data["labels"] != NOTHING]
    assert figures["validation_accuracy"] == pytest.approx((answers == 9).float().mean().item())
    own = model.eval()(input_ids=data["input_ids"], labels=data["labels"]).loss
    assert figures["validation_loss"] == pytest.approx(own.item(), rel=1e-4)
    assert set(figures) == set(task.metrics) and "at least 1 of 2" in task.notes


@pytest.mark.parametrize(
    "fields, message",
    (
        ({"num_keys": 8, "num_pairs": 8}, "--num_keys is 8; expected at least 9"),
        ({"sequence_length": 33}, "--sequence_length is 33; expected at least 34"),
        ({"num_values": 1}, "--num_values is 1; expected at least 2"),
    ),
)
def test_sizes_that_cannot_be(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RecallArguments(**fields)


def test_attention_solves_recall():
    """The task can be learned from what is there: a two-layer model gets far over chance in a few steps."""
    arguments = RecallArguments(num_keys=4, num_values=4, num_pairs=2, sequence_length=10)
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=arguments.vocab_size, n_positions=10, n_embd=32, n_layer=2, n_head=1, bos_token_id=None, eos_token_id=None
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        batch = {name: torch.tensor(values) for name, values in draw(arguments, 64, generator).items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = {name: torch.tensor(values) for name, values in draw(arguments, 200, generator).items()}
    asked = batch["labels"][:, 1:] != NOTHING
    right = (model(**batch).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[asked].float().mean()
    assert right > 0.4  # chance is 0.25


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path):
    printed = run_in(tmp_path, "recall.py", *TINY, "--output_dir", "run", "--task", "nearest", "--watch_scores", 1)
    assert "| test accuracy |" in printed and (tmp_path / "run/neural/sample.txt").exists()
    history = json.loads((tmp_path / "run/dot/results.json").read_text())["history"]
    assert "scores/transformer.h.0.attn/gradient" in history[0]
