"""The main loop of a recipe: trains the arms one after the other, resumes what was stopped, and keeps what compares them."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import ExportableState

from hf_neural_attention.patching.sizes import size_of
from tools.json_files import write_json
from tools.messages import say
from tools.peak_memory import peak_memory
from tools.timing_by_turns import time_by_turns
from training.arms import Arm
from training.checkpoints import last_whole_checkpoint
from training.experiment import Experiment
from training.neural_arguments import NeuralArguments
from training.publishing import publish
from training.reporting import Results, Task, report
from training.run_folder import RESULTS, check_all_see, claim_folder
from training.timed_steps import training_step


TIMED_TURNS = 10


def carry_out(
    experiment: Experiment, task: Task, neural: NeuralArguments, describe: Callable[[Results], None] | None = None
) -> None:
    """Trains what the command line asks for, reports on it, and uploads it if that is asked for.

    Args:
        describe: completes the task, given the results, before the report.
    """
    training = experiment.training
    results = run(experiment, neural.arms)
    if training.should_save:
        if describe is not None:
            describe(results)
        report(results, task, experiment.folder, neural.card, neural.card_note)
        if training.push_to_hub:
            publish(experiment.folder, results, training)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(experiment: Experiment, arms: tuple[Arm, ...]) -> Results:
    """Trains, or goes on training, what is not finished yet; returns the results of all arms.

    Raises:
        SystemExit: if the folder holds another run, the model cannot be built, or an argument cannot be honoured.
    """
    training = experiment.training
    if training.should_save:
        claim_folder(experiment.folder, experiment.settings)
    for arm in arms[1:]:  # lets what cannot be built, or started, be known before the first arm is trained
        if not (experiment.folder / arm / RESULTS).exists():
            initial_model(experiment, arm)
    try:
        results = {arm: run_arm(experiment, arm) for arm in arms}
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_the_disk(error):
            raise
        raise SystemExit(
            f"{error}\nThe same command goes on from the last checkpoint in {experiment.folder} that is whole."
        ) from error
    if len(arms) > 1 and training.should_save:
        try:
            steps = {arm: training_step(experiment, arm) for arm in arms}
            for arm, seconds in time_by_turns(steps, TIMED_TURNS).items():
                results[arm]["seconds_in_turn"] = statistics.median(seconds)
        except torch.OutOfMemoryError:
            say("Note: the models do not fit into memory beside each other, so their steps are not timed by turns.")
    return results


def is_of_the_disk(error: Exception) -> bool:
    """Whether something could not be read or written, a disk being full for instance: torch and safetensors have errors of
    their own for that."""
    return not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error)


def run_arm(experiment: Experiment, arm: Arm) -> dict[str, Any]:
    folder = experiment.folder / arm
    is_finished = (folder / RESULTS).exists()
    checkpoint = None if is_finished else last_whole_checkpoint(folder, say)
    check_all_see(folder, f"finished: {is_finished}, checkpoint: {checkpoint and Path(checkpoint).name}")
    if is_finished:
        say(f"{arm}: finished before, see {folder / RESULTS}")
        return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    model = initial_model(experiment, arm)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}  # counts before they are sharded
    size = size_of(model)
    use_cache = getattr(model.config, "use_cache", None)
    trainer = experiment.trainer(arm, model, StepClock())
    health, scores = {"start": experiment.health(trainer)}, {"start": experiment.scores(trainer)}
    if experiment.watch_scores is not None and not scores["start"]:
        raise SystemExit("--watch_scores: the scores of this model cannot be looked at (see above). Leave it out.")
    say(f"{arm}: {'resuming from ' + checkpoint if checkpoint else 'training from the start'}")
    with checkpoints_as_they_are(model), peak_memory(experiment.training.device.type) as memory:
        trainer.train(resume_from_checkpoint=checkpoint)
    # looks it up, since resuming puts another clock in the place of ours
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock))

    if use_cache is not None:
        model.config.use_cache = use_cache  # restores what Trainer switches off, or a saved model generates without a cache
    elif hasattr(model.config, "use_cache"):
        del model.config.use_cache
    trainer.save_model()
    health["end"], scores["end"] = experiment.health(trainer), experiment.scores(trainer)
    results = {
        "attention": arm,
        "parameters": sum(parameters.values()),
        "scorer_parameters": sum(size for name, size in parameters.items() if ".scorer." in name),
        "memory_footprint": size.num_bytes,
        "cache_bytes_per_token": size.cache_bytes_per_token,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_seconds": clock.seconds,
        "seconds_per_step": clock.seconds / max(trainer.state.global_step, 1),
        "training_memory": memory.size,
        "metrics": experiment.evaluate(trainer),
        "scorer_health": health,
        "score_spread": experiment.spread_of(arm),
        "score_start": [layer._asdict() for layer in experiment.score_starts.get(arm, ())],
        "score_statistics": scores,
        "config": model.config.to_diff_dict(),
        "history": trainer.state.log_history,
    }
    # runs on all processes, since parameters may be sharded among them
    results["sample"] = experiment.show(model.eval(), folder if trainer.args.should_save else None)
    if trainer.args.should_save:
        write_json(folder / RESULTS, results)
    return results


def initial_model(experiment: Experiment, arm: Arm) -> Any:
    """Raises SystemExit with the reason if it cannot be built, or its scores not be started."""
    set_seed(experiment.training.seed)
    try:
        return experiment.initial_model(arm)
    except (ValueError, StrictDataclassError) as error:
        raise SystemExit(f"The {arm} model cannot be built: {error}") from None


class StepClock(TrainerCallback, ExportableState):
    """Seconds spent in training steps, kept in checkpoints so that a resumed run goes on counting."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds}, "attributes": {}}


@contextmanager
def checkpoints_as_they_are(model: Any) -> Iterator[None]:
    """Lets checkpoints name weights as the model does: `Trainer` resumes by these names, under which it does not find what
    `save_pretrained` gave the names of old checkpoints (ViT's)."""
    before = vars(model).get("save_pretrained")
    vars(model)["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        if before is None:
            del vars(model)["save_pretrained"]
        else:
            vars(model)["save_pretrained"] = before
