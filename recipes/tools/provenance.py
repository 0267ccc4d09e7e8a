"""Where figures come from: the command, the machine and the versions."""

import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState

from hf_neural_attention.hardware import processor


def environment() -> dict[str, Any]:
    """The machine and the versions that figures were measured with."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "gpu": ", ".join(gpus) or "none",
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")},
    }


def command_line() -> str:
    """What was typed, without secrets; under a launcher, what it ran in each process."""
    words = list(sys.argv)
    for index, word in enumerate(words):
        if word.startswith("--hub_token"):
            words[index : index + (1 if "=" in word else 2)] = ["--hub_token", "..."]
    return shlex.join(["python", *words])
