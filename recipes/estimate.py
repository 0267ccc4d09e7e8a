"""How long a run takes on this machine and how much memory it needs, from a few of its steps.

    python recipes/estimate.py image_classification recipes/configs/cifar100-paper.yaml
    python recipes/estimate.py language_modeling recipes/configs/wikitext103-paper.yaml --per_device_train_batch_size 8
    python recipes/estimate.py RECIPE CONFIG --output model_cards/NAME

Flags after the configuration are the recipe's own. Each model trains for a few steps in a process of its own, as the recipe
would train it; the rest is multiplication. For other machines, the report has the operations of a step's matrix products.
"""

import argparse
import dataclasses
import math
import statistics
import time
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from arguments import ARMS
from benchmark_timing import in_own_process, reset_peak, resident_bytes
from experiment import Experiment, collated, write_json
from reporting import LABELS, environment
from scorer_trainer import ScorerTrainer


STEPS = 12
WARM_UP = 2  # steps


class StepTimes(TrainerCallback):
    """Seconds of each training step, and of one evaluation of a batch after the last."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.steps.append(time.perf_counter() - self.started)


def load(recipe: str, words: list[str], folder: str) -> tuple[Experiment, tuple[str, ...]]:
    experiment, _, neural = import_module(recipe).load_experiment([*words, "--output_dir", folder])
    return experiment, ARMS[neural.attention]


def measure(recipe: str, words: list[str], arm: str) -> dict[str, Any]:
    """A few steps of one arm, in this very process."""
    with TemporaryDirectory() as folder:
        experiment, _ = load(recipe, words, folder)
        never: Any = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), IntervalStrategy.NO)
        arguments = dataclasses.replace(experiment.arguments_of(arm), max_steps=STEPS, load_best_model_at_end=False, **never)
        times, on_gpu = StepTimes(), torch.cuda.is_available()
        reset_peak()
        before = torch.cuda.memory_allocated() if on_gpu else resident_bytes()
        model = experiment.initial_model(arm)
        given = experiment.trainer_arguments
        trainer = ScorerTrainer(
            model=model,
            args=arguments,
            **given | {"callbacks": [times, *given.get("callbacks", [])]},
            **experiment.scorer_settings,
        )
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes(peak=True)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds_per_step": statistics.median(times.steps[WARM_UP:]),
            "memory": peak - before,
            "seconds_of_evaluation": evaluation(trainer, experiment),
        }


@torch.no_grad()
def evaluation(trainer: Trainer, experiment: Experiment) -> float:
    """Seconds of an evaluation of the validation data, from those of one batch."""
    model: Any = trainer.model
    model.eval()
    size = experiment.training.per_device_eval_batch_size
    batch = collated(experiment.trainer_arguments, "eval_dataset", size)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with trainer.accelerator.autocast():
            model(**batch).loss.item()
        seconds.append(time.perf_counter() - started)
    return min(seconds) * len(experiment.trainer_arguments["eval_dataset"]) / size


def operations(experiment: Experiment) -> float:
    """Of the matrix products of a training step of the dot-product model: two for each multiplication with its addition."""
    model: Any = experiment.initial_model("dot")
    model.set_attn_implementation("eager")  # whose products are counted
    size = experiment.training.per_device_train_batch_size
    with FlopCounterMode(display=False) as counter:
        model(**collated(experiment.trainer_arguments, "train_dataset", size)).loss.backward()
    return float(counter.get_total_flops() * experiment.training.gradient_accumulation_steps)


def total_steps(experiment: Experiment) -> tuple[int, int]:
    """Of the whole run in one process, and how many evaluations of the validation data it has."""
    training = experiment.training
    batches = math.ceil(len(experiment.trainer_arguments["train_dataset"]) / training.per_device_train_batch_size)
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    every = {"steps": training.eval_steps or training.logging_steps, "epoch": per_epoch, "no": math.inf}
    return steps, int(steps / every[IntervalStrategy(training.eval_strategy).value])


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def markdown(record: dict[str, Any]) -> str:
    where = record["environment"]
    lines = [
        f"# Estimate: `{record['config']}`",
        "",
        f"By `{record['command']}`, from {STEPS - WARM_UP} steps of each model on {where['cpu']}, {where['threads']} "
        f"thread(s) (GPU: {where['gpu']}); torch {where['torch']}, transformers {where['transformers']}. "
        f"{record['note']}".strip(),
        "",
        "| | parameters | s / step | steps | evaluations, s each | whole run | memory of training, GiB |",
        "| --- " * 7 + "|",
    ]
    steps, evaluations = record["steps"], record["evaluations"]
    for arm, figures in record["arms"].items():
        seconds = figures["seconds_per_step"] * steps + figures["seconds_of_evaluation"] * evaluations
        lines.append(
            f"| {LABELS[arm]} | {figures['parameters']:,} | {figures['seconds_per_step']:.3g} | {steps:,} | "
            f"{evaluations:,} of {figures['seconds_of_evaluation']:.0f} | {duration(seconds)} | "
            f"{figures['memory'] / 2**30:.2f} |"
        )
    operations = record["operations_per_step"]
    lines += [
        "",
        f"Memory is the peak beyond what the process held before: weights, gradients, AdamW's state, activations. The dot "
        f"product's step has {operations / 1e12:.3g} TFLOP of matrix products, the whole run {operations * steps / 1e18:.3g} "
        f"EFLOP: on a GPU that sustains 100 TFLOP/s, {duration(operations * steps / 1e14)} at least, and more where a "
        f"step is too small to fill it. Several GPUs share the batches of a step or, with as many steps, see more data.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("language_modeling", "image_classification"))
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, help="Write NAME.md and NAME.json there.")
    parser.add_argument("--note", default="", help="A sentence for the report.")
    arguments, more = parser.parse_known_args()
    words = [str(arguments.config), *more]
    with TemporaryDirectory() as folder:
        experiment, arms = load(arguments.recipe, words, folder)
        steps, evaluations = total_steps(experiment)
        record = {
            "config": arguments.config.name,
            "command": f"python recipes/estimate.py {arguments.recipe} recipes/configs/{arguments.config.name}",
            "note": arguments.note,
            "environment": environment(),
            "steps": steps,
            "evaluations": evaluations,
            "operations_per_step": operations(experiment),
            "arms": {arm: in_own_process(measure, arguments.recipe, words, arm) for arm in arms},
        }
    text = markdown(record)
    print(text)
    if arguments.output is not None:
        write_json(arguments.output.with_suffix(".json"), record)
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
