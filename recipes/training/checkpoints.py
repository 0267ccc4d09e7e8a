"""Starting from a checkpoint: what it must be, what the command line may ask of it, and which of a run's own is whole."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from training.arms import Arm
from training.model_families import ModelFamily
from training.neural_arguments import NeuralArguments


def load_checkpoint_config(name: str, family: ModelFamily, neural: NeuralArguments) -> PreTrainedConfig:
    """The config of a checkpoint of the family, stock or neural.

    Raises:
        SystemExit: if there is none, it is of another family, or it is neural and the dot product is to be trained from it.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SystemExit(f"--model_name_or_path {name} is no checkpoint: {error}") from None
    stock_type = family[Arm.DOT].config.model_type
    if config.model_type not in {classes.config.model_type for classes in family.values()}:
        raise SystemExit(f"{name} is a model of type {config.model_type}; this recipe trains {stock_type}.")
    if config.model_type != stock_type and Arm.DOT in neural.arms:
        raise SystemExit(
            f"{name} was trained with Neural Attention: no dot-product model can start from it. Add --attention neural."
        )
    return config


def is_neural(name: str | None, family: ModelFamily) -> bool:
    """Whether there is a checkpoint, and it has Neural Attention already."""
    return name is not None and AutoConfig.from_pretrained(name).model_type != family[Arm.DOT].config.model_type


def last_whole_checkpoint(folder: Path, say: Callable[[str], None] = print) -> str | None:
    """The last of a run's checkpoints that is not damaged, or None; says what is wrong with those that are.

    A process that is killed while it writes, or a disk that is full, leaves a checkpoint that does not load.
    """
    numbers = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))}
    for _, path in sorted(numbers.items(), reverse=True):
        if (damage := what_is_damaged(path)) is None:
            return str(path)
        say(f"{path} is damaged ({damage}): it is left aside, and the one before is used.")
    return None


def what_is_damaged(checkpoint: Path) -> str | None:
    """What of a checkpoint cannot be read, or None."""
    # looks for what Trainer writes last
    if not (checkpoint / "trainer_state.json").exists():
        return "trainer_state.json is missing: it was not finished"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin" and not zipfile.is_zipfile(path):
                return f"{path.name} is cut off"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{path.name}: {error}"
    return None
