"""The text recipe with FSDP2 on CPU processes: accelerate shards on GPUs and their like only, though its code for that is the
same for all of them, and torch's runs on CPUs too. Here it takes the CPUs for such."""

import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer

import language_modeling


create_accelerator, train = Trainer.create_accelerator_and_postprocess, Trainer.train


def create_sharding_accelerator(self: Trainer) -> None:
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    create_accelerator(self)


def train_and_say(self: Trainer, *args: Any, **kwargs: Any) -> Any:
    result = train(self, *args, **kwargs)
    if self.args.should_save:
        sharded = all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        sys.stdout.write(f"sharded: {sharded}\n")
    return result


Trainer.create_accelerator_and_postprocess, Trainer.train = create_sharding_accelerator, train_and_say

if __name__ == "__main__":
    language_modeling.main()
