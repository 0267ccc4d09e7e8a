"""Tables, sentences and cards say what the figures say."""

import dataclasses
import json

import pytest
import yaml

from training.arms import Arm
from training.reporting import ACCURACY_AND_LOSS, Task, card_text, comparison_table, report, verdict


def task(**changes):
    settings = {
        "name": "language modelling",
        "pipeline_tag": "text-generation",
        "dataset": "some text",
        "hub_dataset": "some/text",
        "main_metric": "test_perplexity",
        "is_accuracy": False,
        "metrics": {"test_perplexity": "test perplexity"},
        "loading": lambda folder: f"load({folder!r})",
        "notes": "A note.",
    }
    return Task(**settings | changes)


def results(dot=20.0, neural=19.0):
    return {
        arm: {
            "metrics": {"test_perplexity": value},
            "parameters": 1000 + extra,
            "scorer_parameters": extra,
            "steps": 10,
            "epochs": 1.5,
            "train_seconds": seconds,
            "seconds_per_step": seconds / 10,
            "seconds_in_turn": seconds / 20,
            "config": {"n_layer": 2},
            "history": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}],
            "sample": "> a sample",
        }
        for arm, value, extra, seconds in ((Arm.DOT, dot, 0, 60.0), (Arm.NEURAL, neural, 25, 90.0))
    }


def test_without_times_by_turns_none_are_said():
    untimed = results()
    for arm in untimed.values():
        del arm["seconds_in_turn"]
    assert "timed by turns" not in comparison_table(untimed, task()) and "a training step took" not in verdict(untimed, task())


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_run_that_diverged_is_called_so(value):
    for given, noun in (({"neural": value}, Arm.NEURAL.noun), ({"dot": value}, Arm.DOT.noun)):
        assert verdict(results(**given), task()) == f"Training diverged with {noun}, so nothing is compared."


def test_a_classifier_that_diverged_is_known_by_its_loss():
    """Of scores that are no numbers one is the largest nevertheless, and right now and then."""
    classifier = dataclasses.replace(task(is_accuracy=True), main_metric="test_accuracy", metrics=ACCURACY_AND_LOSS)
    compared = results()
    for arm, loss in ((Arm.DOT, 2.0), (Arm.NEURAL, float("nan"))):
        compared[arm]["metrics"] = {"test_accuracy": 0.1, "test_loss": loss}
    assert verdict(compared, classifier) == f"Training diverged with {Arm.NEURAL.noun}, so nothing is compared."
    compared[Arm.NEURAL]["metrics"]["test_loss"] = 1.9
    assert "the same" in verdict(compared, classifier)


def test_the_table_has_a_column_per_arm_and_the_ratio():
    table = comparison_table(results(), task())
    assert "| test perplexity | 20 | 19 | 0.950 |" in table
    assert "| of which scorers | 0 | 25 |  |" in table
    assert "bytes" not in table  # as in records of before
    assert "timed by turns | 3.000 | 4.500 | 1.500 |" in table
    alone = comparison_table({Arm.NEURAL: results()[Arm.NEURAL]}, task())
    assert "| test perplexity | 19 |" in alone and "ratio" not in alone


@pytest.mark.parametrize(
    ("caches", "row"),
    [((1024, 576), "1,024 | 576 | 0.562"), ((0, 0), "no cache | no cache | "), ((1024, None), "1,024 | unknown | ")],
)
def test_the_table_has_what_each_model_holds(caches, row):
    compared = results()
    for arm, held, cache in zip(compared, (8000, 6000), caches, strict=True):
        compared[arm] |= {"memory_footprint": held, "cache_bytes_per_token": cache}
    table = comparison_table(compared, task())
    assert "| bytes of parameters and buffers | 8,000 | 6,000 | 0.750 |" in table
    assert f"| bytes of a stock cache per token | {row} |" in table


@pytest.mark.parametrize(
    ("neural", "words"),
    [(19.0, "5.0% lower (better)"), (21.0, "5.0% higher (worse)"), (20.001, "the same (to one in a thousand)")],
)
def test_the_sentence_says_which_perplexity_is_better(neural, words):
    assert words in verdict(results(neural=neural), task())


@pytest.mark.parametrize(
    ("dot", "neural", "words"),
    [
        (0.5, 0.525, "2.5 points higher (better)"),
        (0.5, 0.475, "2.5 points lower (worse)"),
        (0.0, 0.0, "the same"),
        (0.0, 0.01, "1.0 points higher"),
    ],
)
def test_accuracies_differ_by_points_also_from_nothing(dot, neural, words):
    compared = results(dot=dot, neural=neural)
    assert words in verdict(compared, task(is_accuracy=True))
    assert f"| test perplexity | {dot:.4g} | {neural:.4g} |" in comparison_table(compared, task())


def test_a_dot_product_whose_scores_start_wider_is_a_column_and_in_the_sentence():
    compared = results()
    started = {**compared[Arm.DOT], "metrics": {"test_perplexity": 18.0}}
    compared = {Arm.DOT: compared[Arm.DOT], Arm.DOT_STARTED: started, Arm.NEURAL: compared[Arm.NEURAL]}
    table = comparison_table(compared, task())
    assert "|  | dot product | dot product, spread 1 | neural attention | dot_started / dot | neural / dot |" in table
    assert "| test perplexity | 20 | 18 | 19 | 0.900 | 0.950 |" in table
    assert verdict(compared, task()).startswith(
        "Test perplexity is 5.0% lower (better) with Neural Attention, compared with the dot product, and 5.6% higher (worse) "
        "compared with the dot product whose scores start with a spread of one; a training step took 1.50 times as long."
    )


def test_cards_carry_metadata_figures_command_and_versions():
    environment = {
        "cpu": "2 cores",
        "gpu": "none",
        "processes": 1,
        "threads": 1,
        "python": "3",
        "torch": "2",
        "transformers": "5",
    }
    record = {"command": "python recipe.py a", "environment": environment, "note": "Busy.", "results": results()}
    card = card_text(record, task(), Arm.NEURAL, "picture.png")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["tags"] == ["neural-attention"]
    assert metadata["datasets"] == ["some/text"] and "datasets" not in card_text(
        record, task(hub_dataset=None), Arm.DOT, "a.png"
    )
    for part in (
        "python recipe.py a",
        "last training loss was 2.000",
        "| 20 | 19 | 0.950 |",
        "2 cores",
        "Busy.",
        "A note.",
        "> a sample",
        "picture.png",
    ):
        assert part in card, part
    assert "the last training loss was 2.000" in card and "import hf_neural_attention" in card
    assert "import hf_neural_attention" not in card_text(record, task(), Arm.DOT, "picture.png")


def test_cards_say_in_what_models_are_alike():
    record = {"command": "a", "note": "", "environment": dict.fromkeys(("cpu", "gpu", "processes", "threads"), 1)}
    record["environment"] |= dict.fromkeys(("python", "torch", "transformers"), 1)
    record["results"] = results()
    assert "data order, dropout rate and initial weights of all that" in card_text(record, task(), Arm.NEURAL, "a.png")
    card = card_text(record, task(is_shared=False), Arm.NEURAL, "a.png")
    assert "data order and dropout rate.\n" in card and "training.paper_models" not in card
    record["results"][Arm.DOT] |= {"score_spread": 1.0}
    record["results"][Arm.NEURAL]["config"] = {"model_type": "paper_decoder"}
    card = card_text(record, task(), Arm.NEURAL, "a.png")
    assert "Where scores start with a given spread, what makes them has been scaled for that" in card
    assert "import training.paper_models  # is in recipes/ of its repository" in card


def test_a_report_leaves_pictures_cards_and_the_json_they_come_from(tmp_path, capsys):
    for arm in (Arm.DOT, Arm.NEURAL):
        (tmp_path / "run" / arm).mkdir(parents=True)
    report(results(), task(), tmp_path / "run", card=str(tmp_path / "cards" / "model-0.9M"))
    assert "5.0% lower (better)" in capsys.readouterr().out
    for file in ("run/comparison.md", "run/comparison.png", "run/neural/README.md", "run/dot/README.md"):
        assert (tmp_path / file).stat().st_size > 100, file
    record = json.loads((tmp_path / "cards/model-0.9M.json").read_text())
    card = (tmp_path / "cards/model-0.9M.md").read_text()
    assert card == card_text(record, task(), Arm.NEURAL, "model-0.9M.png")
    assert (tmp_path / "cards/model-0.9M.png").exists()
