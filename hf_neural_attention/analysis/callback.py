"""Callbacks that keep an eye on attention scores and on scorers while `Trainer` trains."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from ..patching.layers import is_index
from ..scores import score_statistics
from .health import scorer_health


logger = logging.getLogger(__name__)


class WatchingCallback(TrainerCallback):
    """Adds figures to what `Trainer` logs of training (not to what evaluations return, of which a search takes its objective).

    `Trainer` calls the callbacks of `report_to` (TensorBoard, W&B ...) before those that it is given: they do not see these
    figures, which are in its history and on the console. To have them reported as well, put the callback first:

        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(callback)))

    Args:
        inputs (`dict`): Arguments for the model's forward: a few examples, always the same.
        every (`int`): Look at each so many-th log of training. Default: 1.

    Raises:
        ValueError: if `every` is no whole number of at least one.
    """

    def __init__(self, inputs: Mapping[str, Any], every: int = 1):
        if not is_index(every) or every < 1:
            raise ValueError(f"`every` is {every!r}; it must be a whole number of at least one.")
        self.inputs, self.every = dict(inputs), every

    def look(self, model: Any) -> dict[str, float]:
        """The figures of a model, by the name that they are logged under."""
        raise NotImplementedError

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if model is None or "loss" not in (logs or {}):  # passes over evaluations and the end of training
            return
        # counts those of the history, which a resumed training goes on with
        if sum("loss" in entry for entry in state.log_history[:-1]) % self.every:
            return
        figures = self.look(model)
        logs.update(figures)  # shows them to the callbacks that come after
        state.log_history[-1].update(figures)


class ScoreCallback(WatchingCallback):
    """Adds spread, entropy and saturation of every attention layer's scores, dot product or neural, to what `Trainer` logs
    (see `score_statistics`). Arguments, and where the figures are seen, as of `WatchingCallback`.
    """

    def look(self, model: Any) -> dict[str, float]:
        return {
            f"scores/{layer.layer}/{name}": getattr(layer, name)
            for layer in score_statistics(model, **self.inputs)
            for name in ("spread", "entropy", "saturated")
        }


class ScorerHealthCallback(WatchingCallback):
    """Adds the health of every scorer to what `Trainer` logs, and warns once of each that seems dead (see `scorer_health`).
    Arguments, and where the figures are seen, as of `WatchingCallback`.
    """

    def __init__(self, inputs: Mapping[str, Any], every: int = 1):
        super().__init__(inputs, every)
        self.dead: dict[str, int] = {}  # layer -> number of dead scorers that it has warned of

    def look(self, model: Any) -> dict[str, float]:
        figures: dict[str, float] = {}
        for layer in scorer_health(model, **self.inputs):
            names = ("active_units", "score_std", "entropy")
            figures |= {f"scorer/{layer.layer}/{name}": getattr(layer, name) for name in names}
            if layer.dead > self.dead.get(layer.layer, 0):
                self.dead[layer.layer] = layer.dead
                which = "The scorer" if layer.scorers == 1 else f"{layer.dead} of the {layer.scorers} scorers"
                logger.warning(
                    "%s of %s %s dead: no unit of the last hidden layer is active for any pair of these inputs, so the "
                    "network scores all keys alike and gets no gradient. Draw weights again (`reset_parameters()` of the "
                    "scorer, or of the attention module of a compact GPT-2 or ViT, draws those of all heads; with init "
                    '"mirrored" none is dead at birth), use a larger `proj_dim`, or lower the learning rate.',
                    which,
                    layer.layer,
                    "seem" if layer.dead > 1 else "seems",
                )
        return figures
