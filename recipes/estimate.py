"""How long a run takes on this machine and how much memory it needs, from a few of its steps.

    python recipes/estimate.py image_classification recipes/configs/cifar100-paper.yaml
    python recipes/estimate.py language_modeling recipes/configs/wikitext103-paper.yaml --per_device_train_batch_size 8
    python recipes/estimate.py RECIPE CONFIG --output model_cards/benchmarks/NAME

Flags after the configuration are the recipe's own. Each model trains for a few steps in a process of its own, as the recipe
would train it; the rest is multiplication. For other machines, the report has the operations of a step's matrix products.
"""

import argparse
import math
import statistics
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from tools.command_lines import make_folder_of
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.own_process import ProcessKilledError, in_own_process
from tools.peak_memory import peak_memory
from tools.provenance import command_line, environment
from tools.timing_by_turns import Runner, synchronize, time_by_turns
from training.arms import Arm
from training.data_files import in_one_line
from training.experiment import Experiment


STEPS = 12
WARM_UP = 2  # steps
BUILDING_ERRORS = (OSError, ValueError, RuntimeError, StrictDataclassError)
HEADER = ["", "parameters", "s / step", "steps", "evaluations, s each", "whole run", "memory of training, GiB"]


class StepTimes(TrainerCallback):
    """When each training step has ended, so that the time between two has the next batch in it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(args.device.type)
        self.ends.append(time.perf_counter())


def load(recipe: str, words: list[str], folder: str) -> tuple[Experiment, tuple[Arm, ...]]:
    experiment, _, neural = import_module(recipe).load_experiment([*words, "--output_dir", folder])
    return experiment, neural.arms


def build(experiment: Experiment, arm: Arm) -> Any:
    """Raises SystemExit if the arguments make no model."""
    try:
        return experiment.initial_model(arm)
    except BUILDING_ERRORS as error:
        raise SystemExit(f"The {arm} model cannot be built: {in_one_line(error)}") from None


def measure(recipe: str, words: list[str], arm: Arm) -> dict[str, Any]:
    """A few steps of one arm, in this very process."""
    with TemporaryDirectory() as folder:
        experiment, _ = load(recipe, words, folder)
        never: Any = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), IntervalStrategy.NO)
        times = StepTimes()
        with peak_memory(experiment.training.device.type) as peak:
            model: Any = build(experiment, arm)
            trainer = experiment.trainer(arm, model, times, max_steps=STEPS, load_best_model_at_end=False, **never)
            trainer.train()
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds_per_step": statistics.median(end - start for start, end in pairwise(times.ends[WARM_UP - 1 :])),
            "memory": peak.size,
            "seconds_of_evaluation": evaluation(trainer, experiment),
        }


def evaluation(trainer: Trainer, experiment: Experiment) -> float:
    """Seconds of an evaluation of the validation data, from those of one batch."""
    model: Any = trainer.model
    model.eval()
    count, size = len(experiment.trainer_arguments["eval_dataset"]), experiment.training.per_device_eval_batch_size

    @torch.no_grad()
    def evaluate_batch(_: Any) -> None:
        batch = send_to_device(experiment.first_batch("eval_dataset", size), model.device)
        with trainer.accelerator.autocast():
            model(**batch)

    times = time_by_turns({"batch": Runner(evaluate_batch, device=model.device.type)}, repeats=3)["batch"]
    return statistics.median(times) * count / min(count, size)


def operations(experiment: Experiment) -> float:
    """Of the matrix products of a training step of the dot-product model, two for each multiplication with its addition;
    counted on the CPU."""
    model = build(experiment, Arm.DOT)
    model.set_attn_implementation("eager")  # picks the one whose products are counted
    size = experiment.training.train_batch_size  # of all GPUs of this process
    with FlopCounterMode(display=False) as counter:
        model(**experiment.first_batch("train_dataset", size)).loss.backward()
    return float(counter.get_total_flops() * experiment.training.gradient_accumulation_steps)


def total_steps(experiment: Experiment) -> tuple[int, int]:
    """Of the whole run in one process, and how many evaluations of the validation data it has."""
    training = experiment.training
    whole = math.floor if training.dataloader_drop_last else math.ceil
    batches = whole(len(experiment.trainer_arguments["train_dataset"]) / training.train_batch_size)
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    between = training.eval_steps or training.logging_steps
    between = between if between >= 1 else math.ceil(between * steps)  # takes a share of the run, as Trainer does
    every = {"steps": between, "epoch": per_epoch, "no": math.inf}
    # rounds up, since Trainer evaluates at the end as well
    evaluations = math.ceil(steps / every[IntervalStrategy(training.eval_strategy).value])
    return steps, evaluations + training.eval_on_start


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def cells(arm: Arm, figures: dict[str, Any], steps: int, evaluations: int) -> list[str]:
    """An arm's row of the table."""
    seconds = figures["seconds_per_step"] * steps + figures["seconds_of_evaluation"] * evaluations
    return [
        arm.label,
        f"{figures['parameters']:,}",
        f"{figures['seconds_per_step']:.3g}",
        f"{steps:,}",
        f"{evaluations:,} of {figures['seconds_of_evaluation']:.0f}",
        duration(seconds),
        f"{figures['memory'] / 2**30:.2f}",
    ]


def markdown(record: dict[str, Any]) -> str:
    where, steps, evaluations = record["environment"], record["steps"], record["evaluations"]
    operations = record["operations_per_step"]
    lines = [
        f"# Estimate: `{record['config']}`",
        "",
        f"By `{record['command']}`, from {STEPS - WARM_UP} steps of each model on {where['cpu']}, {where['threads']} "
        f"thread(s) (GPU: {where['gpu']}); torch {where['torch']}, transformers {where['transformers']}. "
        f"{record['note']}".strip(),
        "",
        markdown_table(HEADER, [cells(Arm(name), figures, steps, evaluations) for name, figures in record["arms"].items()]),
        "",
        "Loading of data and the evaluations on the way are counted; checkpoints and the last evaluation are not. Memory is "
        "the peak beyond what the process held before: weights, gradients, AdamW's state, activations. The dot product's step "
        f"has {operations / 1e12:.3g} TFLOP of matrix products, the whole run {operations * steps / 1e18:.3g} EFLOP: on a GPU "
        f"that sustains 100 TFLOP/s, {duration(operations * steps / 1e14)} at least, and more where a step is too small to "
        "fill it. Several GPUs share the batches of a step or, with as many steps, see more data.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", choices=("language_modeling", "image_classification"))
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, help="Write NAME.md and NAME.json, this being NAME.")
    parser.add_argument("--note", default="", help="A sentence for the report.")
    arguments, more = parser.parse_known_args()
    words = [str(arguments.config), *more]
    if arguments.output is not None:
        make_folder_of("--output", arguments.output)
    with TemporaryDirectory() as folder:
        experiment, arms = load(arguments.recipe, words, folder)
        steps, evaluations = total_steps(experiment)
        try:
            measured = {arm: in_own_process(measure, arguments.recipe, words, arm) for arm in arms}
        except (ProcessKilledError, torch.OutOfMemoryError) as error:
            raise SystemExit(
                f"{error}: the model needs more memory than there is. Try a smaller batch or another machine."
            ) from None
        record = {
            "config": arguments.config.name,
            "command": command_line(),
            "note": arguments.note,
            "environment": environment(),
            "steps": steps,
            "evaluations": evaluations,
            "operations_per_step": operations(experiment),
            "arms": measured,
        }
    text = markdown(record)
    print(text)
    if arguments.output is not None:
        write_json(Path(f"{arguments.output}.json"), record)
        Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
