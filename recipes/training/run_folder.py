"""The folder of a run: what is being run in it, and which arguments may differ when it goes on.

output_dir/run.json               what is being run; another run is refused the same folder
output_dir/stages.json            figures from before the training, of `patch_and_finetune.py`
output_dir/ARM/checkpoint-*       to resume from
output_dir/ARM/                   the model as last saved, its tokenizer or image processor, its model card
output_dir/ARM/results.json       figures and history
output_dir/comparison.*           table and picture, where there are two arms
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tools.json_files import write_json


RESULTS = "results.json"
STAGES = "stages.json"
BATCHES = "batches_at_once"  # of all processes and GPUs

# Lists arguments that may change between parts of one run, as they do not change what is learned. The times of evaluation do,
# since it draws from the generator that dropout uses.
FREE_ARGUMENTS = {
    "attention",
    "card",
    "card_note",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "hub_model_id",
    "hub_private_repo",
    "hub_token",
    "logging_steps",
    "output_dir",
    "per_device_eval_batch_size",
    "push_to_hub",
    "resume_from_checkpoint",
}
# Lists what is recorded of the data itself, since its name does not say what is in a folder
FINGERPRINTS = ("train_tokens", "held_out_tokens", "images")
# Lists those that are free unless the best checkpoint is kept, which hangs on them
CHECKPOINTS = {"save_steps", "save_strategy", "save_total_limit"}


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Records a run in its folder, and refuses a folder that holds another.

    Raises:
        SystemExit: naming what differs, if the folder holds a run with other settings or files of something else.
    """
    free = FREE_ARGUMENTS | (set() if settings.get("load_best_model_at_end") else CHECKPOINTS)
    settings = {name: value for name, value in settings.items() if name not in free}
    record = folder / "run.json"
    begun = any(any(folder.glob(pattern)) for pattern in ("*/checkpoint-*", f"*/{RESULTS}", STAGES))
    if record.exists() and begun:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        unknown = {*CHECKPOINTS, *FINGERPRINTS, BATCHES} - {*earlier}  # which runs of before do not say
        names = sorted({*settings, *earlier} - free - unknown)
        different = [name for name in names if settings.get(name) != earlier.get(name)]
        if different:
            lines = [f"  {name}: {earlier.get(name)!r} there, {settings.get(name)!r} now" for name in different]
            raise SystemExit(
                f"{folder} holds another run:\n" + "\n".join(lines) + "\nChoose another --output_dir, or delete that folder."
            )
    elif not record.exists() and folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds files that are no run of this recipe. Choose another --output_dir, or empty it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    except OSError as error:
        raise SystemExit(f"--output_dir {folder} cannot be written to: {error.strerror}.") from None


def settings_of(*arguments: Any) -> dict[str, Any]:
    """Every argument by name, as JSON can hold it, and what the launcher decides in their place: the precision, and the number
    of processes and GPUs."""
    settings: dict[str, Any] = {}
    for group in arguments:
        if isinstance(group, TrainingArguments):
            settings |= group.to_dict() | of_the_launcher(group)
        else:
            settings |= dataclasses.asdict(group)
    return json.loads(json.dumps(settings, default=str))


def of_the_launcher(training: TrainingArguments) -> dict[str, Any]:
    """What `accelerate launch` sets without an argument that says so."""
    found: dict[str, Any] = {name: training.mixed_precision == name for name in ("bf16", "fp16")}
    if training.mixed_precision not in ("no", *found):
        found["mixed_precision"] = training.mixed_precision
    return found | {BATCHES: training.world_size * max(1, training.n_gpu)}


def check_all_see(folder: Path, state: str) -> None:
    """Whether all processes have found the same state of a run in its folder.

    Raises:
        SystemExit: if they have not. Each would go on from another place, and nobody would notice.
    """
    if not torch.distributed.is_initialized():
        return
    found = [state] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, state)
    if any(each != state for each in found):
        raise SystemExit(
            f"Not all processes see the same files in {folder} ({'; '.join(sorted(set(found)))}). Put --output_dir on "
            "storage that all machines share, or start anew in another folder."
        )
