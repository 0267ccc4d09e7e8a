"""Where figures come from: the command, the machine and the versions."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_neural_attention.hardware import processor


ROOT = Path(__file__).parents[2]


def environment() -> dict[str, Any]:
    """The machine and the versions that figures were measured with."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "gpu": ", ".join(gpus) or "none",
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        "commit": commit(),
        **{name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")},
    }


def commit() -> str | None:
    """The commit that is checked out here, with a `+` where files differ from it; None where git says nothing."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """What was typed, without secrets, and with a recipe's path from the root of the repository; under a launcher, what it ran
    in each process."""
    words = list(sys.argv)
    if (script := Path(words[0])).is_absolute() and script.is_relative_to(ROOT):
        words[0] = script.relative_to(ROOT).as_posix()
    shown, is_secret = [], False
    for word in words:
        flag, has_value, _ = word.partition("=")
        if is_secret:
            shown.append("...")
            is_secret = False
        elif flag.startswith("--") and flag.endswith("token"):  # either spelling, `--hub-token` and `--hub_token`
            shown += [flag, "..."] if has_value else [flag]
            is_secret = not has_value
        else:
            shown.append(word)
    return shlex.join(["python", *shown])
