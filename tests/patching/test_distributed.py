"""Models with scorers in two processes, which share batches or heads: the same weights as one process gives, and they can be
saved in every way."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_neural_attention import from_pretrained, load_patch, patch, patch_status
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import run
from tests.helpers.spread_models import LLAMA, SPREAD_MODELS, SpreadModel, assert_trained, train_alone


def run_in_two_processes(script: str, *arguments: object) -> None:
    here = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(here / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(here.parents[1]), "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """The weights after the same steps in one process."""
    return {name: train_alone(spread)[0] for name, spread in SPREAD_MODELS.items()}


def check(spread: SpreadModel, folder: Path, expected: dict[str, torch.Tensor]) -> Any:
    """What two processes have saved in a folder; returns the trained model."""
    state = torch.load(folder / "state.pt")
    trained = spread.build()
    born = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    assert_trained(state, expected, born)
    trained.load_state_dict(state)
    logits = run(trained.eval(), **spread.inputs())
    assert torch.equal(run(from_pretrained(folder / "whole"), **spread.inputs()), logits)
    return trained


def check_patches(spread: SpreadModel, folder: Path, trained: Any) -> None:
    """The two patches that two processes have saved of a model."""
    state = trained.state_dict()
    patches = [load_file(folder / name / "neural_patch.safetensors") for name in ("patch", "patch of the state dict")]
    assert patches[0].keys() == patches[1].keys() == {name for name in state if ".scorer." in name}
    assert all(torch.equal(patch[name], state[name]) for patch in patches for name in patch)
    stock = LLAMA.model()
    stock.load_state_dict({name: tensor for name, tensor in state.items() if ".scorer." not in name})
    assert torch.equal(run(load_patch(stock, folder / "patch"), **spread.inputs()), run(trained, **spread.inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("ddp", "fsdp"))
def test_two_processes(kind: str, alone: dict[str, dict[str, torch.Tensor]], tmp_path: Path):
    run_in_two_processes("distributed_training.py", kind, tmp_path)
    for name, spread in SPREAD_MODELS.items():
        trained = check(spread, tmp_path / name, alone[name])
        if "compact" not in name:
            check_patches(spread, tmp_path / name, trained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("trainer-ddp", "trainer-fsdp"))
def test_trainer_in_two_processes(kind: str, alone: dict[str, dict[str, torch.Tensor]], tmp_path: Path):
    run_in_two_processes("distributed_training.py", kind, tmp_path)
    spread = SPREAD_MODELS["replace"]
    check_patches(spread, tmp_path, check(spread, tmp_path, alone["replace"]))


@pytest.mark.slow
def test_two_processes_share_heads(tmp_path: Path):
    run_in_two_processes("tensor_parallel.py", tmp_path)


def test_models_in_parts_are_not_patched():
    # stands for what each process of tensor parallelism has
    model = LLAMA.model()
    vars(model)["_tp_size"] = 2
    model.lm_head.weight.device_mesh = None
    with pytest.raises(PatchError, match=r"shared by 2 processes.*`distributed_config`"):
        patch(model)
    assert not patch_status(model)
