"""Recipes that are killed, and recipes that several processes run: both end as one process that nobody disturbs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.running import RECIPES, run_in


# Lies elsewhere, since a program imports from its own folder first: here `training` and `tools` are those of the tests
SHARDED_RECIPE = RECIPES.parent / "tests/helpers/sharded_on_cpus.py"
TINY = (
    *("--vocab_size", 300, "--block_size", 32, "--n_embd", 32, "--n_layer", 2, "--n_head", 2, "--max_train_samples", 32),
    *("--max_eval_tokens", 100, "--max_steps", 8, "--save_steps", 2, "--report_to", "none", "--neural_layers", "all"),
    *("--dropout", 0.0, "--learning_rate", 0.01, "--lr_scheduler_type", "constant", "--seed", 1, "--score_spread", 1.0),
    # starts with biases other than zero, since the ReLUs of `linear2` open or close by rounding while its bias is next to it
    *("--neural_init", "paper"),
    *("--adam_epsilon", 1e-4),  # or else Adam makes whole steps of gradients that are rounding alone, as of a dead unit's bias
)
ONE_PROCESS = (*TINY, "--per_device_train_batch_size", 4, "--output_dir", "one")
EACH_OF_TWO = (*TINY, "--per_device_train_batch_size", 2, "--output_dir", "two")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_in(folder, "language_modeling.py", *ONE_PROCESS)
    return folder / "one"


def weights(run: Path, arm: str) -> dict[str, torch.Tensor]:
    return load_file(run / arm / "model.safetensors")


def assert_same(run: Path, other: Path, tolerance: float) -> None:
    for arm in ("dot", "neural"):
        ours, expected = weights(run, arm), weights(other, arm)
        if (head := ours.pop("lm_head.weight", None)) is not None:  # takes out the tied head, saved twice where sharded
            assert torch.equal(head, ours["transformer.wte.weight"])
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (ours[name] - tensor).abs().max() <= tolerance * max(1.0, tensor.abs().max()), (arm, name)


def assert_goes_on(start: Callable[[], str], two: Path, undisturbed: Path) -> None:
    """Takes a run of two processes back to the checkpoint of step 4, from which it comes to the same end."""
    for arm in ("dot", "neural"):
        (two / arm / "results.json").unlink()
        for step in (6, 8):
            shutil.rmtree(two / arm / f"checkpoint-{step}")
    assert start().count("checkpoint-4\n") == 2
    assert_same(two, undisturbed, 1e-4)


def kill_when(folder: Path, appears: str) -> None:
    """Runs the recipe until a file or folder appears, and kills it at that very moment."""
    command = [sys.executable, str(RECIPES / "language_modeling.py"), *map(str, ONE_PROCESS)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 200
        while not (folder / appears).exists():
            assert process.poll() is None and time.monotonic() < end, f"it ended without {appears}"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(undisturbed, tmp_path):
    for moment in ("one/dot/checkpoint-4", "one/dot/checkpoint-6/trainer_state.json", "one/neural/checkpoint-2/optimizer.pt"):
        kill_when(tmp_path, moment)
    assert "dot: finished before" in run_in(tmp_path, "language_modeling.py", *ONE_PROCESS)
    assert_same(tmp_path / "one", undisturbed, 0.0)


def launch(folder: Path, script: Path, config: str, *flags: object) -> str:
    """`accelerate launch` of a recipe by one of the ready-made configurations."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        RECIPES / f"accelerate_configs/{config}.yaml",
    ]
    command = [*map(str, launcher), "--main_process_port", "0", str(script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


SHARDED = ("--fsdp", "--fsdp_config", json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}))
KINDS = {"ddp": (RECIPES / "language_modeling.py", ()), "fsdp2": (SHARDED_RECIPE, SHARDED)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_save_and_resume(kind, undisturbed, tmp_path):
    script, flags = KINDS[kind]
    flags = (*EACH_OF_TWO, "--use_cpu", "True", *flags)
    said = launch(tmp_path, script, "two_cpu_processes_ddp", *flags)
    assert "sharded: " not in said if kind == "ddp" else said.count("sharded: True") == 2
    two = tmp_path / "two"
    assert json.loads((two / "comparison.json").read_text())["environment"]["processes"] == 2
    assert_same(two, undisturbed, 1e-4)
    assert_goes_on(lambda: launch(tmp_path, script, "two_cpu_processes_ddp", *flags), two, undisturbed)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def launch_on_two_machines(folder: Path, *flags: object) -> tuple[str, str]:
    """What two launchers say, each of which stands for a machine, with a folder of its own: by the configuration for several
    machines, but for the number of processes, the precision and the address."""
    config = RECIPES / "accelerate_configs/several_machines_fsdp2.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--mixed_precision", "no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES)}
    running = []
    for rank in (0, 1):
        (folder / f"machine {rank}").mkdir(parents=True, exist_ok=True)
        command = [*launcher, "--machine_rank", rank, SHARDED_RECIPE, *flags, "--use_cpu", "True"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(list(map(str, command)), cwd=folder / f"machine {rank}", env=environment, **pipes))
    try:
        with ThreadPoolExecutor() as pool:  # reads both at a time, since a full pipe would stop one
            said = list(pool.map(lambda process: process.communicate(timeout=400)[0], running))
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), said[0][-4000:] + said[1][-4000:]
    return said[0], said[1]


@pytest.mark.slow
def test_two_machines_train_one_model(undisturbed, tmp_path):
    two, folders = tmp_path / "two", [tmp_path / f"machine {rank}" for rank in (0, 1)]
    flags = (*EACH_OF_TWO[:-1], two)
    first, second = launch_on_two_machines(tmp_path, *flags)
    assert_same(two, undisturbed, 1e-4)
    record = json.loads((two / "comparison.json").read_text())
    assert record["environment"]["processes"] == 2
    # logs once: the first machine says all that there is to say, and records each step once
    for words in ("Tokens: ", "dot: training from the start", "neural: training from the start", "| training steps |"):
        assert first.count(words) == 1 and words not in second, words
    losses = [entry["step"] for entry in record["results"]["neural"]["history"] if "loss" in entry]
    assert losses == sorted(set(losses))
    # saves once: a checkpoint has each file once, but for the random numbers of each process
    assert not any(any(folder.iterdir()) for folder in folders)
    for arm in ("dot", "neural"):
        names = {path.name for path in (two / arm / "checkpoint-8").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= names
        assert len(list((two / arm).glob("*.safetensors"))) == 1
    assert_goes_on(lambda: launch_on_two_machines(tmp_path, *flags)[0], two, undisturbed)


def test_the_ready_made_configurations_are_ones_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted((RECIPES / "accelerate_configs").glob("*.yaml")):
        config = load_config_from_file(str(path))
        assert config.num_processes >= 1, path
