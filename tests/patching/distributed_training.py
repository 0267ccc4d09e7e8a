"""Run by `test_distributed.py` in each of two processes: trains a patched model, and saves it in every way.

torchrun --nproc_per_node 2 distributed_training.py ddp|fsdp|trainer-ddp|trainer-fsdp FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_neural_attention import patch, save_patch
from tests.helpers.stock_models import FAMILIES


STEPS, RATE = 3, 0.5
FAMILY = FAMILIES["llama"]
WRAPPED = ["LlamaDecoderLayer"]


def make_model() -> Any:
    """Its scorers' weights are random, biases too: at birth, some gradients are nothing but rounding."""
    model = patch(FAMILY.model(), "all", mode="replace", proj_dim=4).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".scorer." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_data() -> torch.Tensor:
    """Token ids `[STEPS, 2 processes, tokens]`."""
    return torch.randint(3, 98, (STEPS, 2, 12), generator=torch.Generator().manual_seed(0))


def train_with_accelerate(kind: str, folder: Path) -> None:
    plugin = None
    if kind == "fsdp":
        let_accelerate_shard_on_cpus()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=WRAPPED
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    for ids in make_data():
        mine = ids[accelerator.process_index : accelerator.process_index + 1]
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=mine, labels=mine).loss)
        optimizer.step()
    check_sharded(kind, accelerator.unwrap_model(model))
    save(accelerator.unwrap_model(model), accelerator.get_state_dict(model), accelerator.is_main_process, folder)
    accelerator.end_training()


def let_accelerate_shard_on_cpus() -> None:
    """It shards on GPUs and their like only. Its code for that is the same for all of them, and torch's runs on CPUs."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def train_with_trainer(kind: str, folder: Path) -> None:
    data = make_data().flatten(0, 1).tolist()
    sharding: dict[str, Any] = {}
    if kind == "trainer-fsdp":
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED}}
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, optim="sgd", use_cpu=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_steps=2, ddp_backend="gloo", **sharding,
    )  # fmt: skip
    if kind == "trainer-fsdp":
        let_accelerate_shard_on_cpus()
    trainer = InOrder(make_model(), arguments, train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}))
    trainer.train()
    check_sharded(kind, trainer.accelerator.unwrap_model(trainer.model_wrapped))
    trainer.save_model(str(folder / "whole"))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    save(trainer.accelerator.unwrap_model(trainer.model_wrapped), state, trainer.args.should_save, folder, whole=False)
    torch.distributed.destroy_process_group()


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def check_sharded(kind: str, model: Any) -> None:
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    assert all(sharded) if kind.endswith("fsdp") else not any(sharded), kind


def save(model: Any, state: dict[str, torch.Tensor], is_main_process: bool, folder: Path, whole: bool = True) -> None:
    save_patch(model, folder / "patch", is_main_process=is_main_process)
    save_patch(model, folder / "patch of the state dict", state_dict=state, is_main_process=is_main_process)
    if whole:
        model.save_pretrained(folder / "whole", state_dict=dict(state), is_main_process=is_main_process)
    if is_main_process:
        torch.save(state, folder / "state.pt")


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    (train_with_trainer if kind.startswith("trainer") else train_with_accelerate)(kind, folder)
