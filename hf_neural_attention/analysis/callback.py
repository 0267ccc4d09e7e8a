"""`ScorerHealthCallback`: keeps an eye on scorers while `Trainer` trains."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from .health import scorer_health


logger = logging.getLogger(__name__)


class ScorerHealthCallback(TrainerCallback):
    """Adds the health of every scorer to what `Trainer` logs, and warns once of each that is dead.

    Args:
        inputs (`dict`): Arguments for the model's forward: a few examples, always the same.
        every (`int`): Look at each so many-th log. Default: 1.
    """

    def __init__(self, inputs: Mapping[str, Any], every: int = 1):
        self.inputs, self.every = dict(inputs), every
        self.logs = 0
        self.warned: set[str] = set()

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        self.logs += 1
        if model is None or logs is None or (self.logs - 1) % self.every:
            return
        for layer in scorer_health(model, **self.inputs):
            figures = {
                f"scorer/{layer.layer}/{name}": getattr(layer, name) for name in ("active_units", "score_std", "entropy")
            }
            logs.update(figures)  # for the callbacks that come after
            state.log_history[-1].update(figures)
            if layer.dead and layer.layer not in self.warned:
                self.warned.add(layer.layer)
                which = "The scorer" if layer.scorers == 1 else f"Of the {layer.scorers} scorers, {layer.dead}"
                logger.warning(
                    "%s of %s %s dead: the units of the last hidden layer are zero for every pair, so attention is uniform "
                    "and no gradient changes that. Draw weights again (`scorer.reset_parameters()` with init "
                    '"mirrored", which is never dead at birth), use a larger `proj_dim`, or lower the learning rate.',
                    which,
                    layer.layer,
                    "are" if layer.dead > 1 else "is",
                )
