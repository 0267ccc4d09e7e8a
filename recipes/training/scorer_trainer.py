"""A `Trainer` whose scorers may have a learning rate and a weight decay of their own, that never goes beyond its end, and that
evaluates on all examples."""

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer


class ScorerTrainer(Trainer):
    """`Trainer`, with what the optimiser does to scorers.

    Args:
        scorer_learning_rate (`float`, *optional*): Of the scorers' weights and biases; it follows the same schedule.
        scorer_weight_decay (`float`, *optional*): Of what has a weight decay in a scorer: its matrices.
    """

    def __init__(
        self, *args: Any, scorer_learning_rate: float | None = None, scorer_weight_decay: float | None = None, **kwargs: Any
    ):
        self.scorer_settings = {"lr": scorer_learning_rate, "weight_decay": scorer_weight_decay}
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """No more batches after the last step: resumed from its last checkpoint, `Trainer` would train one step too many."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All examples of a data set. By itself, `Trainer` leaves out the last ones with `dataloader_drop_last`, and gives the
        first data set's loader for every other with `dataloader_persistent_workers`."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            is_own = eval_dataset is self.eval_dataset
            if is_own or eval_dataset is None or isinstance(eval_dataset, str):
                return super().get_eval_dataloader(None if is_own else eval_dataset)
            return self.get_test_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        given = {name: value for name, value in self.scorer_settings.items() if value is not None}
        if exists or not given:
            return optimizer
        chosen: Any = self.model if model is None else model
        scorers = {id(parameter): name for name, parameter in chosen.named_parameters() if ".scorer." in name}
        decayed = set(self.get_decay_parameter_names(chosen))  # leaves out biases, which get no weight decay
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in scorers]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scorers]
                changes = {name: value for name, value in given.items() if name == "lr" or scorers[id(own[0])] in decayed}
                optimizer.add_param_group({**group, **changes, "params": own})
        return optimizer
