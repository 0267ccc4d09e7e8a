"""Tasks that attention is needed for: a model reads pairs of a key and a value, and is then asked for values.

- `recall`: of the pair with the very key that is asked for (multi-query associative recall: Arora et al. 2023, "Zoology");
- `nearest`: of the pair whose key is the nearest number (of two as near, the smaller one);
- `first_above`: of the first pair whose key is a greater number, where there is always one.

A sequence is the pairs, then questions among noise: each at a place drawn by a power law, more of them soon after the pairs,
as in Zoology's data. What follows a question is noise as well, so no answer is ever read. Keys of numbers are in their order:
token `i` is the number `i`. Keys of `recall` are as many tokens, without any order that matters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Trainer, default_data_collator

from tools.command_lines import at_least
from training.causal_models import NOTHING
from training.prepared_data import PreparedData
from training.reporting import ACCURACY_AND_LOSS, Task


TASK = "recall"
PIPELINE_TAG = "text-generation"
MEASURES = ("loss",)
TASKS = ("recall", "nearest", "first_above")
POWER = 0.01  # of the law that questions' places are drawn by, as in Zoology


@dataclass
class RecallArguments:
    """Which task, and how hard it is."""

    task: str = field(
        default="recall",
        metadata={
            "help": "recall: value of the same key; nearest: of the nearest number; first_above: of the first greater one.",
            "choices": list(TASKS),
        },
    )
    num_keys: int = field(default=64, metadata={"help": "Tokens that may be keys; the numbers, from 0, where keys are such."})
    num_values: int = field(default=64, metadata={"help": "Tokens that may be values. More tokens are noise."})
    num_pairs: int = field(default=8, metadata={"help": "Pairs in a sequence, and questions after them."})
    sequence_length: int = field(default=64, metadata={"help": "Tokens of a sequence, pairs and questions included."})
    num_train: int = field(default=20000, metadata={"help": "Sequences to train on."})
    num_eval: int = field(default=1000, metadata={"help": "Sequences to validate on, and as many to test on."})

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes that cannot be."""
        for name in ("num_pairs", "num_train", "num_eval"):
            at_least(name, getattr(self, name), 1)
        at_least("num_values", self.num_values, 2, "one value needs no recall")
        at_least("num_keys", self.num_keys, self.num_pairs + 1, "no two pairs of a sequence have the same key")
        at_least("sequence_length", self.sequence_length, 4 * self.num_pairs + 2, "pairs and questions need as many tokens")

    @property
    def vocab_size(self) -> int:
        """Keys, values, and as many tokens of noise as of values."""
        return self.num_keys + 2 * self.num_values


def draw(arguments: RecallArguments, number: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """`number` sequences: `input_ids` and `labels`, `[number, sequence_length]`. A label stands one token after its question,
    since models are trained to predict the next token."""
    pairs, length = arguments.num_pairs, arguments.sequence_length
    keys = drawn_without_repeats(arguments.num_keys, pairs, number, generator)
    values = arguments.num_keys + generator.integers(arguments.num_values, size=(number, pairs))
    questions, answers = ask(arguments.task, arguments.num_keys, keys, values, generator)
    noise = arguments.num_keys + arguments.num_values
    tokens = noise + generator.integers(arguments.num_values, size=(number, length))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    space = (length - 2 * pairs) // 2  # places for questions, every second token
    chances = POWER * np.arange(1, space + 1) ** (POWER - 1.0)
    # takes the greatest of noisy logarithms, which draws without repeats by these chances (Gumbel)
    noisy = np.log(chances) + generator.gumbel(size=(number, space))
    places = 2 * pairs + 2 * np.argsort(-noisy, axis=1)[:, :pairs]
    labels = np.full((number, length), NOTHING)
    np.put_along_axis(tokens, places, questions, axis=1)
    np.put_along_axis(labels, places + 1, answers, axis=1)
    return {"input_ids": tokens, "labels": labels}


def drawn_without_repeats(most: int, count: int, number: int, generator: np.random.Generator) -> np.ndarray:
    """`[number, count]`, from 0 to `most - 1`."""
    return np.argsort(generator.random((number, most)), axis=1)[:, :count]


def ask(
    task: str, most: int, keys: np.ndarray, values: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Questions and their answers, each `[number, pairs]`.

    Args:
        most: how many keys there are in all.
        keys, values: `[number, pairs]`.
    """
    number, pairs = keys.shape
    if task == "recall":
        order = drawn_without_repeats(pairs, pairs, number, generator)
        return np.take_along_axis(keys, order, axis=1), np.take_along_axis(values, order, axis=1)
    if task == "nearest":
        questions = generator.integers(most, size=(number, pairs))
        distance = np.abs(questions[:, :, None] - keys[:, None])
        chosen = (distance * most + keys[:, None]).argmin(-1)  # prefers the smaller of two as near
    else:
        questions = (generator.random((number, pairs)) * keys.max(1, keepdims=True)).astype(int)
        chosen = (keys[:, None] > questions[:, :, None]).argmax(-1)
    return questions, np.take_along_axis(values, chosen, axis=1)


def prepare(arguments: RecallArguments, seed: int) -> PreparedData:
    """Sequences to train on, and what is measured on others."""
    splits = {
        split: Dataset.from_dict(draw(arguments, number, np.random.default_rng([seed, place]))).with_format("torch")
        for place, (split, number) in enumerate(
            (("train", arguments.num_train), ("validation", arguments.num_eval), ("test", arguments.num_eval))
        )
    }
    return PreparedData(
        evaluate=lambda trainer: final_figures(trainer, splits),
        show=lambda model, folder: show_questions(model, folder, splits["test"]),
        trainer_arguments={
            "train_dataset": splits["train"],
            "eval_dataset": splits["validation"],
            "data_collator": default_data_collator,
        },
        task=describe_task(arguments),
    )


@torch.no_grad()
def guesses(model: Any, data: Dataset, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batch by batch logits, guesses and answers where something is asked: `[asked, vocabulary]` and `[asked]`."""
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        labels = batch["labels"][:, 1:].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device)).logits[:, :-1].float()
        asked = labels != NOTHING
        yield logits[asked], logits[asked].argmax(-1), labels[asked]


def final_figures(trainer: Trainer, splits: dict[str, Dataset]) -> dict[str, float]:
    """Share of questions that are answered rightly, and loss, of each held-out split."""
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    figures: dict[str, float] = {}
    for split in ("validation", "test"):
        right = count = 0
        loss = 0.0
        with trainer.accelerator.autocast():
            for logits, found, answers in guesses(model, splits[split], trainer.args.per_device_eval_batch_size):
                right += int((found == answers).sum())
                loss += cross_entropy(logits, answers, reduction="sum").item()
                count += len(answers)
        figures |= {f"{split}_accuracy": right / count, f"{split}_loss": loss / count}
    model.train(was_training)
    return figures


def show_questions(model: PreTrainedModel, folder: Path | None, data: Dataset) -> str:
    """A line of Markdown on the first test sequence."""
    _, found, answers = next(guesses(model, data.select([0]), 1))
    sample = f"Of the questions of the first test sequence, it answers {int((found == answers).sum())} of {len(answers)}."
    if folder is not None:
        (folder / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    return sample


def describe_task(arguments: RecallArguments) -> Task:
    """What cards and tables say beside the figures."""
    return Task(
        name=TASK,
        pipeline_tag=PIPELINE_TAG,
        dataset=arguments.task.replace("_", " "),
        hub_dataset=None,
        main_metric="test_accuracy",
        is_accuracy=True,
        metrics=ACCURACY_AND_LOSS,
        loading=how_to_load,
        notes=(
            f"Sequences of {arguments.sequence_length} tokens: {arguments.num_pairs} pairs of {arguments.num_keys} keys and "
            f"{arguments.num_values} values, and as many questions among noise. Trained on {arguments.num_train:,}, tested on "
            f"{arguments.num_eval:,} others. A guess at one of the values in the sequence is right in at least 1 of "
            f"{arguments.num_pairs}."
        ),
    )


def how_to_load(folder: str) -> str:
    """Code for cards."""
    return (
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        "print(model(torch.arange(8)[None]).logits.argmax(-1))  # what it takes for the next token, at each place"
    )
