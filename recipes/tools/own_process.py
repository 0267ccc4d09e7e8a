"""Measuring in a process that does nothing else."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch


class ProcessKilledError(RuntimeError):
    """The process that measured something is gone, as the system does with one that takes all memory."""


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of the function in a process that did nothing before, with as many threads.

    Raises:
        ProcessKilledError: if the process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    # imports once what takes seconds to import, since the processes are copies of one that did
    context.set_forkserver_preload(["torch", "hf_neural_attention.models.neural_attention_scorer"])
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ProcessKilledError("the process that measured it was killed") from error
