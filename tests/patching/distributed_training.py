"""Run by `test_distributed.py` in each of two processes: trains models with scorers, and saves them in every way.

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

from hf_neural_attention import save_patch
from hf_neural_attention.introspection import compact_layers
from tests.helpers.spread_models import RATE, SPREAD_MODELS, STEPS, SpreadModel, share_of


def train_with_accelerate(kind: str, folder: Path) -> None:
    plugin = None
    if kind == "fsdp":
        let_accelerate_shard_on_cpus()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for name, spread in SPREAD_MODELS.items():
        if plugin is not None:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [spread.layer]
        train_one(kind, accelerator, spread, folder / name)
        accelerator.free_memory()
    accelerator.end_training()


def train_one(kind: str, accelerator: Accelerator, spread: SpreadModel, folder: Path) -> None:
    model = spread.build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    for batch in spread.batches():
        optimizer.zero_grad()
        accelerator.backward(model(**share_of(batch, accelerator.process_index)).loss)
        optimizer.step()
    check_sharded(kind, accelerator.unwrap_model(model))
    state = accelerator.get_state_dict(model)
    check_that_states_load(accelerator, model, folder / "state")
    save(accelerator.unwrap_model(model), state, accelerator.is_main_process, folder)


def check_that_states_load(accelerator: Accelerator, model: Any, folder: Path) -> None:
    """What accelerate saves of a model, in parts where it is sharded, gives back every bit of it."""
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    accelerator.load_state(str(folder))
    for parameter, expected in zip(model.parameters(), before, strict=True):
        ours, theirs = (each.full_tensor() if isinstance(each, DTensor) else each for each in (parameter, expected))
        assert torch.equal(ours, theirs)


def let_accelerate_shard_on_cpus() -> None:
    """It shards on GPUs and their like only. Its code for that is the same for all of them, and torch's runs on CPUs."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def train_with_trainer(kind: str, folder: Path) -> None:
    spread = SPREAD_MODELS["replace"]
    data = torch.cat([batch["input_ids"] for batch in spread.batches()]).tolist()
    sharding: dict[str, Any] = {}
    if kind == "trainer-fsdp":
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [spread.layer]}}
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, optim="sgd", use_cpu=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_steps=2, ddp_backend="gloo", **sharding,
    )  # fmt: skip
    if kind == "trainer-fsdp":
        let_accelerate_shard_on_cpus()
    trainer = InOrder(spread.build(), arguments, train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}))
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
    if not compact_layers(model):
        save_patch(model, folder / "patch", is_main_process=is_main_process)
        save_patch(model, folder / "patch of the state dict", state_dict=state, is_main_process=is_main_process)
    if whole:
        model.save_pretrained(folder / "whole", state_dict=dict(state), is_main_process=is_main_process)
    if is_main_process:
        torch.save(state, folder / "state.pt")


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    (train_with_trainer if kind.startswith("trainer") else train_with_accelerate)(kind, folder)
