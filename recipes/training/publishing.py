"""Uploads what a run has trained: each arm's folder, with the code of a neural model beside it."""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainingArguments

from hf_neural_attention.export import add_code_of_saved
from hf_neural_attention.uploading import upload
from training.arms import Arm
from training.run_folder import RESULTS


# Leaves out checkpoints to resume from, and Trainer's arguments, which are a pickle
LEFT_OUT = ["checkpoint-*", "checkpoint-*/**", "training_args.bin"]


def publish(folder: Path, arms: Iterable[Arm], training: TrainingArguments) -> None:
    """One repository per arm, `HUB_MODEL_ID-ARM`; the name of the run's folder where no `--hub_model_id` is given.

    Raises:
        SystemExit: if an upload fails. The folders are whole, and the message says how to go on.
    """
    for arm in arms:
        add_code_of_saved(folder / arm)
        name = f"{training.hub_model_id or folder.resolve().name}-{arm}"
        try:
            message, private = f"Upload the {arm} model", training.hub_private_repo
            token = training.hub_token
            upload(folder / arm, name, token, private, message, whole_model=True, ignore_patterns=LEFT_OUT)
        except RuntimeError as error:
            raise SystemExit(f"{error}") from None
        print(f"Uploaded: {name}, {json.loads((folder / arm / RESULTS).read_text(encoding='utf-8'))['steps']} steps")
