"""Steps of training to be timed by turns."""

from typing import Any

import torch
from accelerate.utils import DynamoBackend, send_to_device
from transformers import TrainingArguments

from tools.timing_by_turns import Runner
from training.arms import Arm
from training.experiment import Experiment


def training_step(experiment: Experiment, arm: Arm, whole: bool = False, fewest_calls: int = 1) -> Runner:
    """A step of what an arm trains, over the same batch each time, as often as gradients are accumulated.

    Args:
        whole: with clipping and the optimiser; otherwise forward and backward alone.
    """
    training = experiment.training
    model: Any = experiment.initial_model(arm)
    trainer = experiment.trainer(arm, model)
    checkpoint_activations(model, training)
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        model.compile(**plugin.to_kwargs())
    model.to(training.device).train()  # moves it, since Trainer leaves that to what shards models, if there is such a thing
    optimizer = trainer.create_optimizer() if whole else None
    batch = send_to_device(experiment.first_batch("train_dataset", training.per_device_train_batch_size), training.device)

    def step(_inputs: Any) -> None:
        for _ in range(training.gradient_accumulation_steps):
            with trainer.accelerator.autocast():
                loss = model(**batch).loss
            loss.backward()
        if optimizer is not None:
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return Runner(step, fewest_calls=fewest_calls, device=training.device.type)


def checkpoint_activations(model: Any, training: TrainingArguments) -> None:
    """As Trainer does once it trains, if that is asked for: a step takes longer then."""
    # looks for the name of Transformers before 5.23 as well
    name = next(each for each in ("activation_checkpointing", "gradient_checkpointing") if hasattr(training, each))
    if getattr(training, name):
        given = dict(getattr(training, f"{name}_kwargs") or {})
        own = {key: given.pop(key) for key in ("every_n_layers", "offload") if key in given}
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": given or None}, **own)
