"""Tables, sentences and cards say what the figures say."""

import json

import pytest
import yaml

from reporting import Task, card_text, comparison_table, report, verdict


def task(**changes):
    settings = {
        "name": "language modelling",
        "pipeline_tag": "text-generation",
        "dataset": "some/text",
        "main_metric": "test_perplexity",
        "higher_is_better": False,
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
            "config": {"n_layer": 2},
            "history": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}],
            "sample": "> a sample",
        }
        for arm, value, extra, seconds in (("dot", dot, 0, 60.0), ("neural", neural, 25, 90.0))
    }


def test_the_table_has_a_column_per_arm_and_the_ratio():
    table = comparison_table(results(), task())
    assert "| test perplexity | 20 | 19 | 0.950 |" in table
    assert "| of which scorers | 0 | 25 |  |" in table
    assert "| seconds per step | 6.000 | 9.000 | 1.500 |" in table
    alone = comparison_table({"neural": results()["neural"]}, task())
    assert "| test perplexity | 19 |" in alone and "ratio" not in alone


@pytest.mark.parametrize(
    ("neural", "higher_is_better", "words"),
    [
        (19.0, False, "5.0% lower (better)"),
        (21.0, False, "5.0% higher (worse)"),
        (21.0, True, "5.0% higher (better)"),
        (19.0, True, "5.0% lower (worse)"),
        (20.001, False, "the same (to 0.1 %)"),
    ],
)
def test_the_sentence_says_which_is_better(neural, higher_is_better, words):
    assert words in verdict(results(neural=neural), task(higher_is_better=higher_is_better))


def test_cards_carry_metadata_figures_command_and_versions():
    environment = {"cpu": "2 cores", "gpu": "none", "threads": 1, "python": "3", "torch": "2", "transformers": "5"}
    record = {"command": "python recipe.py a", "environment": environment, "note": "Busy.", "results": results()}
    card = card_text(record, task(), "neural", "picture.png")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["tags"] == ["neural-attention"]
    for part in ("python recipe.py a", "| 20 | 19 | 0.950 |", "2 cores", "Busy.", "A note.", "> a sample", "picture.png"):
        assert part in card, part
    assert "import hf_neural_attention" in card
    assert "import hf_neural_attention" not in card_text(record, task(), "dot", "picture.png")


def test_a_report_leaves_pictures_cards_and_the_json_they_come_from(tmp_path, capsys):
    for arm in ("dot", "neural"):
        (tmp_path / "run" / arm).mkdir(parents=True)
    report(results(), task(), tmp_path / "run", card=str(tmp_path / "cards" / "some-model"))
    assert "5.0% lower (better)" in capsys.readouterr().out
    for file in ("run/comparison.md", "run/comparison.png", "run/neural/README.md", "run/dot/README.md"):
        assert (tmp_path / file).stat().st_size > 100, file
    record = json.loads((tmp_path / "cards/some-model.json").read_text())
    card = (tmp_path / "cards/some-model.md").read_text()
    assert card == card_text(record, task(), "neural", "some-model.png")
    assert (tmp_path / "cards/some-model.png").exists()
