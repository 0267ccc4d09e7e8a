"""Which run a folder holds: what belongs to it, and what is refused."""

import json

import pytest
import torch
from transformers import TrainingArguments

from training.run_folder import check_all_see, claim_folder, settings_of


def test_a_folder_with_another_run_is_refused_and_left_alone(tmp_path):
    claim_folder(tmp_path / "run", {"seed": 0})
    claim_folder(tmp_path / "run", {"seed": 1, "logging_steps": 5})  # replaces a start that came to nothing
    (tmp_path / "run/dot/checkpoint-4").mkdir(parents=True)
    claim_folder(tmp_path / "run", {"seed": 1, "logging_steps": 7})  # changes nothing that is learned
    before = (tmp_path / "run/run.json").read_text()
    with pytest.raises(SystemExit, match="holds another run:\n  seed: 1 there, 2 now\nChoose another --output_dir"):
        claim_folder(tmp_path / "run", {"seed": 2})
    assert (tmp_path / "run/run.json").read_text() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="holds files that are no run of this recipe"):
        claim_folder(tmp_path / "other", {"seed": 1})


def test_with_the_best_checkpoint_kept_its_choice_stays_the_same(tmp_path):
    kept = {"seed": 0, "load_best_model_at_end": True, "save_steps": 100}
    claim_folder(tmp_path / "run", kept)
    (tmp_path / "run/dot/checkpoint-4").mkdir(parents=True)
    claim_folder(tmp_path / "run", kept)
    with pytest.raises(SystemExit, match="holds another run:\n  save_steps: 100 there, 500 now"):
        claim_folder(tmp_path / "run", kept | {"save_steps": 500})
    # goes on with a run of before, which does not say
    (tmp_path / "run/run.json").write_text(json.dumps({"seed": 0, "load_best_model_at_end": True}))
    claim_folder(tmp_path / "run", kept | {"batches_at_once": 2, "images": "a1"})
    with pytest.raises(SystemExit, match="holds another run:\n  images: 'a1' there, 'b2' now"):
        claim_folder(tmp_path / "run", kept | {"batches_at_once": 2, "images": "b2"})


def test_what_the_launcher_decides_is_part_of_the_settings(tmp_path, monkeypatch):
    def settings(**given) -> dict:
        return settings_of(TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **given))

    plain = settings()
    assert not plain["bf16"] and plain["batches_at_once"] == 1 and "mixed_precision" not in plain
    assert settings(bf16=True)["bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settings() == plain | {"bf16": True}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert settings() == plain | {"mixed_precision": "fp8"}
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    assert settings() == plain | {"batches_at_once": 4}


def test_settings_are_json_and_hold_every_argument(tmp_path):
    settings = settings_of(TrainingArguments(str(tmp_path), report_to="none", learning_rate=0.5))
    assert settings["learning_rate"] == 0.5 and json.loads(json.dumps(settings)) == settings


def test_processes_that_see_other_files_stop(monkeypatch, tmp_path):
    def gather(found: list[str], state: str) -> None:
        found[:] = state, "checkpoint: checkpoint-2"

    check_all_see(tmp_path, "checkpoint: None")  # one process agrees with itself
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    check_all_see(tmp_path, "checkpoint: checkpoint-2")
    with pytest.raises(SystemExit, match=r"Not all processes see the same files.*None; checkpoint: checkpoint-2.*storage"):
        check_all_see(tmp_path, "checkpoint: None")
