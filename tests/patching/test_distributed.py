"""Patched models in two processes, which share batches or heads: the same weights as one process gives, and they can be saved
in every way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_neural_attention import from_pretrained, load_patch, patch, patch_status
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import assert_near, run
from tests.patching.distributed_training import FAMILY, RATE, make_data, make_model


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The weights after the same steps in one process."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for ids in make_data():
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.state_dict()


def run_in_two_processes(script: str, *arguments: object) -> None:
    here = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(here / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(here.parents[1]), "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("ddp", "fsdp", "trainer-ddp", "trainer-fsdp"))
def test_two_processes(kind: str, expected: dict[str, torch.Tensor], tmp_path: Path):
    run_in_two_processes("distributed_training.py", kind, tmp_path)
    state = torch.load(tmp_path / "state.pt")
    assert state.keys() == expected.keys()
    born = make_model()
    for name, tensor in expected.items():
        assert_near(state[name], tensor, 1e-4) if tensor.any() else None
        assert not torch.equal(state[name], born.state_dict()[name]) or name.endswith("linear3.bias"), name

    born.load_state_dict(state)
    logits = run(born.eval(), **FAMILY.inputs())
    assert torch.equal(run(from_pretrained(tmp_path / "whole"), **FAMILY.inputs()), logits)
    patches = [load_file(tmp_path / name / "neural_patch.safetensors") for name in ("patch", "patch of the state dict")]
    assert patches[0].keys() == patches[1].keys() == {name for name in state if ".scorer." in name}
    assert all(torch.equal(patch[name], state[name]) for patch in patches for name in patch)
    stock = FAMILY.model()
    stock.load_state_dict({name: tensor for name, tensor in state.items() if ".scorer." not in name})
    assert torch.equal(run(load_patch(stock, tmp_path / "patch"), **FAMILY.inputs()), logits)


@pytest.mark.slow
def test_two_processes_share_heads(tmp_path: Path):
    run_in_two_processes("tensor_parallel.py", tmp_path)


def test_models_in_parts_are_not_patched():
    # stands for what each process of tensor parallelism has
    model = FAMILY.model()
    vars(model)["_tp_size"] = 2
    model.lm_head.weight.device_mesh = None
    with pytest.raises(PatchError, match=r"shared by 2 processes.*`distributed_config`"):
        patch(model)
    assert not patch_status(model)
