"""Tables, pictures and model cards from the results of a run, and from nothing else."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from hf_neural_attention.export import CITATION
from hf_neural_attention.patching.records import is_repository
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment
from training.arms import Arm


Results = dict[Arm, dict[str, Any]]

# Lists what a model holds: name in results -> what it is
SIZES = {"memory_footprint": "bytes of parameters and buffers", "cache_bytes_per_token": "bytes of a stock cache per token"}


# Lists what a classifier is measured by: `metrics` of its `Task`
ACCURACY_AND_LOSS = {
    f"{split}_{metric}": f"{split} {metric}" for split in ("validation", "test") for metric in ("accuracy", "loss")
}


@dataclass
class Task:
    """What a recipe's cards say beside the figures."""

    name: str  # "language modelling"
    pipeline_tag: str
    dataset: str  # as people call it
    hub_dataset: str | None  # its name on the Hub, if it came from there
    main_metric: str  # of the table, for the sentence that compares
    is_accuracy: bool  # higher is better, and differences are in points; otherwise lower is better, in percent
    metrics: dict[str, str]  # name -> what it is
    loading: Callable[[str], str]  # folder -> code that loads and uses the model
    notes: str
    neural_loading: Callable[[str], str] | None = None  # where it is not that of the stock model
    picture: str = "Training and evaluation loss"  # what the card's picture shows
    step: str = "forward and backward"  # what of a step was timed
    checkpoint: str | None = None  # that was trained on, if it was not from scratch
    is_shared: bool = True  # arms have the same initial weights of all that they share


def comparison_table(results: Results, task: Task) -> str:
    """Markdown: a row per figure, a column per arm, and the ratio of each to the first."""
    arms = list(results)
    header = ["", *(arm.label for arm in arms), *(f"{arm} / {arms[0]}" for arm in arms[1:])]
    rows: list[list[str]] = []

    def add(label: str, values: list[Any], form: Callable[[Any], str]) -> None:
        ratios = [f"{value / values[0]:.3f}" if value and values[0] else "" for value in values[1:]]
        rows.append([label, *map(form, values), *ratios])

    for name, meaning in task.metrics.items():
        if all(name in results[arm]["metrics"] for arm in arms):
            add(meaning, [results[arm]["metrics"][name] for arm in arms], lambda value: f"{value:.4g}")
    add("parameters", [results[arm]["parameters"] for arm in arms], lambda value: f"{value:,}")
    add("of which scorers", [results[arm]["scorer_parameters"] for arm in arms], lambda value: f"{value:,}")
    for name, meaning in SIZES.items():
        if all(name in results[arm] for arm in arms):  # records of before have none of these
            add(meaning, [results[arm][name] for arm in arms], in_bytes)
    add("training steps", [results[arm]["steps"] for arm in arms], lambda value: f"{value:,}")
    if len(arms) > 1 and all("seconds_in_turn" in results[arm] for arm in arms):
        label = f"seconds per step, {task.step}, timed by turns"
        add(label, [results[arm]["seconds_in_turn"] for arm in arms], lambda value: f"{value:.3f}")
    add("training minutes", [results[arm]["train_seconds"] / 60 for arm in arms], lambda value: f"{value:.1f}")
    return markdown_table(header, rows)


def in_bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if value else "no cache"


def verdict(results: Results, task: Task) -> str:
    """One sentence on the main metric, whatever it says, and how far one run carries."""
    if len(results) < 2:
        return "One model was trained; nothing is compared."
    if lost := [arm for arm in results if diverged(results[arm]["metrics"], task)]:
        return f"Training diverged with {' and '.join(arm.noun for arm in lost)}, so nothing is compared."
    beside = [(difference(results, task, Arm.NEURAL, arm), arm.noun) for arm in results if not arm.is_neural]
    more = "".join(f", and {amount} compared with {noun}" for amount, noun in beside[1:])
    times = [results[arm]["seconds_in_turn"] for arm in (Arm.NEURAL, Arm.DOT) if "seconds_in_turn" in results[arm]]
    took = f"; a training step took {times[0] / times[1]:.2f} times as long" if len(times) == 2 else ""
    what = task.metrics[task.main_metric].capitalize()
    return (
        f"{what} is {beside[0][0]} with Neural Attention, compared with {beside[0][1]}{more}{took}. "
        "This is one run of each with one seed: it shows neither the spread between seeds "
        "nor what happens at other sizes."
    )


def diverged(metrics: dict[str, float], task: Task) -> bool:
    """By the main metric, or by the loss beside an accuracy, which is a number even where all scores are none."""
    names = {task.main_metric, task.main_metric.replace("accuracy", "loss")}
    return not all(math.isfinite(metrics[name]) for name in names if name in metrics)


def difference(results: Results, task: Task, arm: Arm, other: Arm) -> str:
    """Of the main metric of an arm to another's, in words."""
    ours, theirs = (results[each]["metrics"][task.main_metric] for each in (arm, other))
    size = abs(ours - theirs) / (1 if task.is_accuracy else theirs)
    if size < 0.0005:
        return "the same (to one in a thousand)"
    amount = f"{size * 100:.1f} points" if task.is_accuracy else f"{size:.1%}"
    better = (ours > theirs) == task.is_accuracy
    return f"{amount} {'higher' if ours > theirs else 'lower'} ({'better' if better else 'worse'})"


def draw_comparison(results: Results, path: Path) -> None:
    """Training and evaluation loss of each arm against the step."""
    titles = {"loss": "training loss", "eval_loss": "evaluation loss"}
    logged = [key for key in titles if any(key in entry for result in results.values() for entry in result["history"])]
    shown = logged or ["loss"]
    size = (5 * len(shown), 4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        for arm, result in results.items():
            points = [(entry["step"], entry[key]) for entry in result["history"] if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=arm.label, color=arm.color, marker="." if len(points) < 50 else "")
        axis.set(title=titles[key], xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("nats")
    if logged:
        axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def report(results: Results, task: Task, folder: Path, card: str | None = None, note: str | None = None) -> None:
    """Prints the table, writes it with a picture, and writes a model card into each arm's folder, and to `card`."""
    table = comparison_table(results, task)
    print(f"\n{table}\n\n{verdict(results, task)}\n")
    (folder / "comparison.md").write_text(f"{table}\n\n{verdict(results, task)}\n", encoding="utf-8")
    draw_comparison(results, folder / "comparison.png")
    record = {"command": command_line(), "environment": environment(), "note": note or "", "results": results}
    write_json(folder / "comparison.json", record)
    for arm in results:
        shutil.copy(folder / "comparison.png", folder / arm / "comparison.png")
        (folder / arm / "README.md").write_text(card_text(record, task, arm, "comparison.png"), encoding="utf-8")
    print(f"Models: {', '.join(str(folder / arm) for arm in results)}. Table and picture: {folder / 'comparison.md'}, .png")
    if card is not None:
        Path(card).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(f"{card}.json"), record)
        shutil.copy(folder / "comparison.png", f"{card}.png")
        arm = list(results)[-1]
        Path(f"{card}.md").write_text(card_text(record, task, arm, Path(f"{card}.png").name), encoding="utf-8")
        print(f"Model card: {card}.md")


def last_loss(result: dict[str, Any]) -> str:
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    return f"{losses[-1]:.3f}" if losses else "not logged"


def card_text(record: dict[str, Any], task: Task, arm: Arm, picture: str) -> str:
    """A model card with metadata, figures, the exact command and the limits; of a record, also as its JSON has it."""
    results = {Arm(name): each for name, each in record["results"].items()}
    result = results[arm]
    metadata = {
        # leaves the license of a checkpoint to whoever gave it
        **({"license": "apache-2.0"} if task.checkpoint is None else {}),
        **({"base_model": task.checkpoint} if is_repository(task.checkpoint) else {}),
        "library_name": "transformers",
        "pipeline_tag": task.pipeline_tag,
        "tags": ["neural-attention"] if arm.is_neural else [],
        **({"datasets": [task.hub_dataset]} if task.hub_dataset else {}),
    }
    config = {name: value for name, value in result["config"].items() if name not in ("architectures", "id2label", "label2id")}
    where = record["environment"]
    fairness = ""
    if len(results) > 1:
        which = "Both" if len(results) == 2 else "All"
        weights = " and initial weights of all that they share" if task.is_shared else ""
        fairness = f"{which} models had the same seed, data order{',' if weights else ' and'} dropout rate{weights}."
    if any(each.get("score_spread") is not None for each in results.values()):
        fairness += " Where scores start with a given spread, what makes them has been scaled for that, by a factor a layer."
    loading = (arm.is_neural and task.neural_loading) or task.loading
    package = "import hf_neural_attention  # makes the model type known to the Auto classes\n" if arm.is_neural else ""
    if str(result["config"].get("model_type")).startswith("paper_"):
        package += "import training.paper_models  # is in recipes/ of its repository, from where this is to be run\n"
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {task.name.capitalize()} on {task.dataset}: {arm.kind}

Trained by `hf_neural_attention`. Neural Attention (DiGiugno and Mahmood, arXiv 2502.17206) scores a query against a key with
a small network instead of a dot product.

## Figures

{comparison_table(results, task)}

{verdict(results, task)}

![{task.picture}]({picture})

{task.notes}

## How it was made

```
{record["command"]}
```

On {where["cpu"]} (GPU: {where["gpu"]}), {where["processes"]} process(es) of {where["threads"]} thread(s), Python
{where["python"]}, torch {where["torch"]}, transformers {where["transformers"]}. {record["note"]} {result["steps"]:,} steps
({result["epochs"]:.2f} epochs) in {result["train_seconds"] / 60:.1f} minutes; the last training loss was {last_loss(result)}.
{fairness}

Config (what differs from the defaults): `{config}`

## What it does

{result["sample"]}

## Use

```python
{package}{loading("FOLDER")}
```

## Limits

A small model trained for a comparison, not for use: its output is not to be relied on. Figures are of one run.

## Citation

```bibtex
{CITATION}
```
"""
