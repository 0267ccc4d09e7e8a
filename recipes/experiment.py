"""Trains one model or two that differ in their attention alone, and keeps what is needed to compare them.

output_dir/run.json               what is being run; another run is refused the same folder
output_dir/<arm>/checkpoint-*     to resume from
output_dir/<arm>/                 the model as last saved, its tokenizer or image processor, its model card
output_dir/<arm>/results.json     figures and history
output_dir/comparison.*           table and picture, where there are two arms
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from checkpoints import last_whole_checkpoint
from hf_neural_attention import patch_status
from hf_neural_attention.analysis import scorer_health
from memory import peak_memory
from scorer_trainer import ScorerTrainer


RESULTS = "results.json"
STAGES = "stages.json"  # of what is measured before training
TIMED_TURNS = 10
HEALTH_EXAMPLES = 4

# Arguments that may change between the parts of one run: they do not change what is learned, unless the best checkpoint is
# kept (`load_best_model_at_end`). When it is evaluated does, since that draws from the generator that dropout uses.
FREE_ARGUMENTS = {
    "attention",
    "card",
    "card_note",
    "disable_tqdm",
    "hub_model_id",
    "hub_private_repo",
    "hub_token",
    "logging_steps",
    "output_dir",
    "per_device_eval_batch_size",
    "push_to_hub",
    "resume_from_checkpoint",
    "save_steps",
    "save_strategy",
    "save_total_limit",
}


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


@dataclass
class Experiment:
    """What the arms share.

    Args:
        build_model: makes the model of an arm, `"neural"` or `"dot"`, with its initial weights.
        evaluate: figures of the trained model, by name.
        show: returns some Markdown about what the model does; writes into the folder that it gets, or nothing for None.
        trainer_arguments: further arguments of `Trainer` (data sets, collator, processing class, metrics).
        settings: every argument of the command line, for `run.json`.
        scorer_settings: what `ScorerTrainer` takes beside `Trainer`'s arguments.
    """

    training: TrainingArguments
    build_model: Callable[[str], PreTrainedModel]
    evaluate: Callable[[Trainer], dict[str, float]]
    show: Callable[[PreTrainedModel, Path | None], str]
    trainer_arguments: dict[str, Any]
    settings: dict[str, Any]
    scorer_settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(str(self.training.output_dir))

    def run(self, arms: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Trains, or goes on training, what is not finished yet; returns the results of all arms.

        Raises:
            SystemExit: if the folder holds another run, the model cannot be built, or an argument cannot be honoured.
        """
        if self.training.resume_from_checkpoint:
            raise SystemExit("--resume_from_checkpoint: a run resumes from its last checkpoint by itself, for each arm.")
        if self.training.should_save:
            claim_folder(self.folder, self.settings)
        try:
            results = {arm: self.run_arm(arm) for arm in arms}
        except OSError as error:  # a disk that is full, for instance
            raise SystemExit(
                f"{error}\nThe same command goes on from the last checkpoint in {self.folder} that is whole."
            ) from error
        if len(arms) > 1 and self.training.should_save:
            for arm, seconds in time_in_turn({arm: (self, arm) for arm in arms}).items():
                results[arm]["seconds_in_turn"] = statistics.median(seconds)
        return results

    def run_arm(self, arm: str) -> dict[str, Any]:
        folder = self.folder / arm
        if (folder / RESULTS).exists():
            self.say(f"{arm}: finished before, see {folder / RESULTS}")
            return json.loads((folder / RESULTS).read_text())
        arguments = self.arguments_of(arm)
        set_seed(arguments.seed)
        try:
            model = self.initial_model(arm)
        except ValueError as error:
            raise SystemExit(f"The {arm} model cannot be built: {error}") from None
        parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}  # before they are sharded
        use_cache = getattr(model.config, "use_cache", None)
        callbacks = [StepClock(), *self.trainer_arguments.get("callbacks", [])]
        trainer = ScorerTrainer(
            model=model, args=arguments, **self.trainer_arguments | {"callbacks": callbacks}, **self.scorer_settings
        )
        health = {"start": self.health(trainer)}
        checkpoint = last_whole_checkpoint(folder, self.say)
        self.say(f"{arm}: {'resuming from ' + checkpoint if checkpoint else 'training from the start'}")
        with checkpoints_as_they_are(model), peak_memory(self.training.device.type) as memory:
            trainer.train(resume_from_checkpoint=checkpoint)
        # resuming puts another clock in the place of ours
        clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock))

        if use_cache is not None:
            model.config.use_cache = use_cache  # Trainer switches it off, and a saved model would generate without a cache
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
        trainer.save_model()
        health["end"] = self.health(trainer)
        results = {
            "attention": arm,
            "parameters": sum(parameters.values()),
            "scorer_parameters": sum(size for name, size in parameters.items() if ".scorer." in name),
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "train_seconds": clock.seconds,
            "seconds_per_step": clock.seconds / max(trainer.state.global_step, 1),
            "training_memory": memory.size,
            "metrics": self.evaluate(trainer),
            "scorer_health": health,
            "config": model.config.to_diff_dict(),
            "history": trainer.state.log_history,
        }
        # by all processes: parameters may be sharded among them
        results["sample"] = self.show(model.eval(), folder if arguments.should_save else None)
        if arguments.should_save:
            write_json(folder / RESULTS, results)
        return results

    def health(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Of each layer's scorers, on a few examples of the validation data. By all processes: parameters may be sharded."""
        model: Any = trainer.model
        if not patch_status(model):
            return []
        batch = collated(self.trainer_arguments, "eval_dataset", HEALTH_EXAMPLES)
        with trainer.accelerator.autocast():
            return [layer._asdict() for layer in scorer_health(model, **batch)]

    def say(self, text: str) -> None:
        if self.training.should_save:
            print(text, flush=True)

    def arguments_of(self, arm: str) -> TrainingArguments:
        """The arm's own `TrainingArguments`: a folder of its own, all else equal."""
        return dataclasses.replace(
            self.training,
            output_dir=str(self.folder / arm),
            push_to_hub=False,  # at the end, by `publish`: with the card, and without checkpoints
            restore_callback_states_from_checkpoint=True,
            dataloader_pin_memory=self.training.dataloader_pin_memory and torch.accelerator.is_available(),
        )

    def initial_model(self, arm: str) -> PreTrainedModel:
        """The arm's model; a neural one takes all weights that it shares with the stock one from that."""
        model = self.build_model(arm)
        if arm == "neural":
            set_seed(self.training.seed)
            stock = self.build_model("dot").state_dict()
            missing, unexpected = model.load_state_dict(stock, strict=False)
            if unexpected or any(".scorer." not in name for name in missing):
                raise RuntimeError(f"The two models share too little: missing {missing}, unexpected {unexpected}.")
        return model


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


def time_in_turn(
    runs: dict[str, tuple[Experiment, str]], turns: int = TIMED_TURNS, steps_per_turn: int = 1, whole_step: bool = False
) -> dict[str, list[float]]:
    """Seconds of a step over one batch in each turn, by name, of what the arm of an experiment trains.

    In one process and by turns, every other one backwards: unlike the times of trainings, these are not distorted by what else
    the machine did meanwhile.

    Args:
        whole_step: with clipping and the optimiser; otherwise forward and backward alone.
    """
    steps = {name: training_step(experiment, arm, whole_step) for name, (experiment, arm) in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first is for warming up
        for name in list(steps) if turn % 2 else reversed(steps):
            started = time.perf_counter()
            for _ in range(steps_per_turn):
                steps[name]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - started) / steps_per_turn)
    return seconds


def training_step(experiment: Experiment, arm: str, whole: bool) -> Callable[[], None]:
    """A step of training over the same batch each time."""
    given, training = experiment.trainer_arguments, experiment.training
    model: Any = experiment.initial_model(arm)
    trainer = ScorerTrainer(model=model, args=experiment.arguments_of(arm), **given, **experiment.scorer_settings)
    model.to(training.device).train()  # which Trainer leaves to what shards models, if there is such a thing
    optimizer = trainer.create_optimizer() if whole else None
    batch = send_to_device(collated(given, "train_dataset", training.per_device_train_batch_size), training.device)

    def step() -> None:
        with trainer.accelerator.autocast():
            loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return step


def collated(trainer_arguments: dict[str, Any], dataset: str, batch_size: int) -> dict[str, torch.Tensor]:
    """The first examples of one of the data sets, as the trainer would collate them."""
    data = trainer_arguments[dataset]
    return trainer_arguments["data_collator"]([data[index] for index in range(min(batch_size, len(data)))])


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Records a run in its folder, and refuses a folder that holds another.

    Raises:
        SystemExit: naming what differs, if the folder holds a run with other settings or files of something else.
    """
    settings = {name: value for name, value in settings.items() if name not in FREE_ARGUMENTS}
    record = folder / "run.json"
    begun = any(any(folder.glob(pattern)) for pattern in ("*/checkpoint-*", f"*/{RESULTS}", STAGES))
    if record.exists() and begun:
        earlier = json.loads(record.read_text())
        names = sorted({*settings, *earlier} - FREE_ARGUMENTS)
        different = [name for name in names if settings.get(name) != earlier.get(name)]
        if different:
            lines = [f"  {name}: {earlier.get(name)!r} there, {settings.get(name)!r} now" for name in different]
            raise SystemExit(
                f"{folder} holds another run:\n" + "\n".join(lines) + "\nChoose another --output_dir, or delete that folder."
            )
    elif not record.exists() and folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds files that are no run of this recipe. Choose another --output_dir, or empty it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    except OSError as error:
        raise SystemExit(f"--output_dir {folder} cannot be written to: {error.strerror}.") from None


def settings_of(*arguments: Any) -> dict[str, Any]:
    """Every argument by name, as JSON can hold it."""
    settings: dict[str, Any] = {}
    for group in arguments:
        settings |= group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
    return json.loads(json.dumps(settings, default=str))


def write_json(path: Path, content: Any) -> None:
    """Writes in one step, so that a killed run leaves the old file or the new one, even if several machines write the same."""
    draft = path.with_name(f"{path.name}.{platform.node()}.draft")
    draft.write_text(json.dumps(content, indent=1, default=str) + "\n")
    draft.replace(path)
