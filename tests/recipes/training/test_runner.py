"""What makes a comparison fair, and what makes a run safe to stop."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, ViTImageProcessorPil, default_data_collator

from hf_neural_attention import NeuralGPT2LMHeadModel, patch
from tests.helpers.versions import CHECKPOINTING
from training.arms import Arm
from training.augmentation import AugmentedImages, CountEpochs
from training.experiment import Experiment
from training.images import ImageArguments, load_images
from training.model_families import GPT2, VIT
from training.runner import StepClock, run
from training.text import cut_into_blocks
from training.text_task import collate as collate_blocks
from training.timed_steps import training_step


SIZES = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 1, "eos_token_id": 2}
BLOCK = 8  # tokens of an example to train on


class Recorder(TrainerCallback):
    """Notes what each arm starts from and sees."""

    def __init__(self):
        self.starts, self.batches = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.starts.append({name: value.clone() for name, value in model.state_dict().items()})


class Killed(TrainerCallback):
    """Ends the process's training abruptly, as an outage would, once."""

    def __init__(self, at_step):
        self.at_step = at_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            self.at_step = None
            raise KeyboardInterrupt


def build_model(arm):
    return GPT2[arm].model(GPT2[arm].config(**SIZES))


def make_experiment(folder, *callbacks, seen=None, **settings):
    tokens = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(0)).numpy()

    def collate(examples):
        batch = collate_blocks(examples)
        if seen is not None and batch["input_ids"].shape[1] == BLOCK:
            seen.append(batch["input_ids"])
        return batch

    training = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=5,
        num_train_epochs=2,
        learning_rate=1e-2,
        save_steps=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Experiment(
        training=training,
        build_model=build_model,
        evaluate=lambda trainer: {"figure": 1.0},
        show=lambda model, path: "a sample",
        trainer_arguments={
            "train_dataset": cut_into_blocks(tokens, BLOCK),
            "eval_dataset": cut_into_blocks(tokens, BLOCK // 2),
            "data_collator": collate,
            "callbacks": list(callbacks),
        },
        settings={"seed": 42, **settings},
    )


BOTH = (Arm.DOT, Arm.NEURAL)


class Finished(NamedTuple):
    folder: Path
    result: dict[str, Any]  # of the arm "dot"

    @property
    def losses(self) -> list[float]:
        return losses_of(self.result)


def losses_of(result):
    return [entry["loss"] for entry in result["history"] if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one arm that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return Finished(folder, run(make_experiment(folder), (Arm.DOT,))[Arm.DOT])


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(make_experiment(folder, Killed(at_step=10)), (Arm.DOT,))
    return folder


@pytest.fixture
def killed(killed_run, tmp_path):
    """A copy of the same run, killed after its checkpoints of steps 4 and 8."""
    return Path(shutil.copytree(killed_run, tmp_path / "parts"))


def test_both_arms_start_from_the_same_weights_and_see_the_same_data(tmp_path):
    recorder, seen = Recorder(), []
    results = run(make_experiment(tmp_path, recorder, seen=seen), BOTH)
    dot, neural = recorder.starts
    assert all(torch.equal(neural[name], value) for name, value in dot.items())
    assert all(".scorer." in name for name in set(neural) - set(dot)) and len(neural) > len(dot)
    half = 20  # counts the batches of an arm; after both, one more for each is collated to time the two by turns
    assert len(seen) == 42 and all(map(torch.equal, seen[:half], seen[half:-2]))
    assert not torch.equal(seen[0], seen[1])
    assert results[Arm.NEURAL]["parameters"] - results[Arm.DOT]["parameters"] == results[Arm.NEURAL]["scorer_parameters"] > 0
    for arm in BOTH:
        assert results[arm]["memory_footprint"] == 4 * results[arm]["parameters"]
        assert results[arm]["cache_bytes_per_token"] == 2 * 2 * 16 * 4  # of two layers, keys and values
    assert losses_of(results[Arm.DOT]) != losses_of(results[Arm.NEURAL])
    assert all(0 < results[arm]["seconds_in_turn"] < 5 for arm in BOTH)
    assert results[Arm.DOT]["scorer_health"] == {"start": [], "end": []} and results[Arm.DOT]["training_memory"] >= 0
    start, end = (results[Arm.NEURAL]["scorer_health"][when][0] for when in ("start", "end"))
    assert start["dead"] == 0 and start["score_std"] != end["score_std"]


def test_a_timed_step_accumulates_gradients_as_training_does(tmp_path):
    experiment = make_experiment(tmp_path)
    experiment.training.gradient_accumulation_steps = 3
    calls = []
    build = experiment.build_model

    def counted(arm):
        model = build(arm)
        model.register_forward_hook(lambda *_: calls.append(arm))
        return model

    experiment.build_model = counted
    training_step(experiment, Arm.DOT, whole=True).run(None)
    assert calls == [Arm.DOT] * 3


def test_timed_steps_keep_activations_as_training_does(tmp_path):
    experiment = make_experiment(tmp_path)
    made, build = [], experiment.build_model
    experiment.build_model = lambda arm: made.append(build(arm)) or made[-1]
    training_step(experiment, Arm.DOT)
    setattr(experiment.training, CHECKPOINTING, True)
    training_step(experiment, Arm.DOT)
    kept = [[getattr(module, "gradient_checkpointing", False) for module in model.modules()] for model in made]
    assert [any(each) for each in kept] == [False, True]


def test_models_that_do_not_fit_beside_each_other_are_not_timed(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("training.runner.time_by_turns", full)
    experiment = make_experiment(tmp_path)
    experiment.training.max_steps = 1
    results = run(experiment, BOTH)
    assert not any("seconds_in_turn" in results[arm] for arm in BOTH)
    assert "their steps are not timed by turns" in capsys.readouterr().out


def test_scores_of_both_arms_start_with_the_spread_that_is_asked_for(tmp_path):
    experiment = make_experiment(tmp_path)
    experiment.training.max_steps = 1  # looks at the start alone
    experiment.score_spread = 2.0
    assert experiment.spread_of(Arm.DOT_STARTED) == 2.0
    results = run(experiment, BOTH)
    names = ["transformer.h.0.attn", "transformer.h.1.attn"]
    for arm, scorers in ((Arm.DOT, ["dot product"] * 2), (Arm.NEURAL, ["replace", "dot product"])):
        started, looked_at = results[arm]["score_start"], results[arm]["score_statistics"]["start"]
        assert [layer["layer"] for layer in started] == names and [layer["scorer"] for layer in started] == scorers
        assert all(layer["before"] < 1 and layer["after"] == pytest.approx(2.0, rel=0.02) for layer in started)
        assert all(1 < layer["spread"] < 4 for layer in looked_at)  # on other examples
        assert results[arm]["score_spread"] == 2.0


def test_some_layers_alone_start_with_it(tmp_path):
    experiment = make_experiment(tmp_path)
    experiment.score_spread, experiment.score_spread_layers = 0.0, [0]
    result = run(experiment, (Arm.DOT,))[Arm.DOT]
    first, second = (layer["spread"] for layer in result["score_statistics"]["end"])
    assert first == 0.0 < second and [layer["layer"] for layer in result["score_start"]] == ["transformer.h.0.attn"]


def test_one_dot_product_starts_with_a_spread_of_one_by_itself(tmp_path):
    experiment = make_experiment(tmp_path)
    experiment.training.max_steps = 1
    results = run(experiment, tuple(Arm))
    assert [results[arm]["score_spread"] for arm in Arm] == [None, 1.0, None]
    started = results[Arm.DOT_STARTED]["score_start"]
    assert len(started) == 2 and all(layer["after"] == pytest.approx(1.0, rel=0.02) for layer in started)
    assert not results[Arm.DOT]["score_start"] and not results[Arm.NEURAL]["score_start"]


def test_scores_that_cannot_be_started_are_known_before_anything_is_trained(tmp_path, monkeypatch):
    experiment = make_experiment(tmp_path, Killed(1))
    build = experiment.initial_model

    def initial_model(arm):
        if arm is Arm.DOT_STARTED:
            raise ValueError("its queries are clipped")
        return build(arm)

    monkeypatch.setattr(experiment, "initial_model", initial_model)
    with pytest.raises(SystemExit, match="The dot_started model cannot be built: its queries are clipped"):
        run(experiment, (Arm.DOT, Arm.DOT_STARTED))


def test_uniform_attention_stays_uniform_for_dot_products_and_is_refused_for_networks(tmp_path):
    experiment = make_experiment(tmp_path)
    experiment.score_spread = 0.0
    result = run(experiment, (Arm.DOT,))[Arm.DOT]
    assert [layer["spread"] for layer in result["score_statistics"]["end"]] == [0.0, 0.0]
    with pytest.raises(SystemExit, match=r"The neural model cannot be built: .* a spread of zero would not stay zero"):
        run(experiment, (Arm.NEURAL,))


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = run(make_experiment(tmp_path / "whole"), (Arm.NEURAL,))[Arm.NEURAL]
    with pytest.raises(KeyboardInterrupt):
        run(make_experiment(tmp_path / "parts", Killed(at_step=10)), (Arm.NEURAL,))
    parts = run(make_experiment(tmp_path / "parts"), (Arm.NEURAL,))[Arm.NEURAL]
    assert losses_of(parts) == losses_of(whole) and len(losses_of(whole)) == 20
    one, two = (NeuralGPT2LMHeadModel.from_pretrained(tmp_path / name / "neural") for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert parts["steps"] == 20 and parts["train_seconds"] > 0
    assert one.config.use_cache  # checks that it is on again: Trainer had switched it off


def test_a_run_that_is_killed_after_its_last_step_trains_no_further(tmp_path):
    def experiment(evaluate):
        made = make_experiment(tmp_path)
        made.training.max_steps, made.training.lr_scheduler_type = 8, "constant"  # ends within an epoch, at a full rate
        made.evaluate = evaluate
        return made

    def killed(trainer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(experiment(killed), (Arm.DOT,))
    before = load_file(tmp_path / "dot/model.safetensors")
    result = run(experiment(lambda trainer: {"figure": 1.0}), (Arm.DOT,))[Arm.DOT]
    after = load_file(tmp_path / "dot/model.safetensors")
    assert result["steps"] == 8 and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("dot", "neural", "patched"))
def test_an_interrupted_run_of_a_vit_too(tmp_path, kind):
    # trains a ViT, whose checkpoints name weights as old versions did, unless told not to
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_labels": 10, "hidden_dropout_prob": 0.1}
    digits = load_images(ImageArguments(max_train_samples=20), seed=0).splits["train"]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})

    def build(arm):
        classes = VIT[Arm.NEURAL if kind == "neural" else Arm.DOT]
        model = classes.model(classes.config(**sizes))
        return patch(model, "all", mode="replace") if kind == "patched" else model

    def experiment(name, *callbacks):
        data = AugmentedImages(digits, processor, "paper", 8, seed=0)
        made = make_experiment(tmp_path / name, CountEpochs(data), *callbacks)
        made.build_model = build
        made.trainer_arguments |= {"train_dataset": data, "eval_dataset": data, "data_collator": default_data_collator}
        return made

    whole = run(experiment("whole"), (Arm.DOT,))[Arm.DOT]
    with pytest.raises(KeyboardInterrupt):
        run(experiment("parts", Killed(at_step=6)), (Arm.DOT,))
    parts = run(experiment("parts"), (Arm.DOT,))[Arm.DOT]
    assert losses_of(parts) == losses_of(whole) and len(losses_of(whole)) == 8
    states = [load_file(tmp_path / name / "dot/model.safetensors") for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any("encoder.layer.0" in name for name in states[0]) == (kind != "patched")  # names the last as stock models do


def test_a_finished_arm_is_not_trained_again(whole, capsys):
    recorder = Recorder()
    again = run(make_experiment(whole.folder, recorder), (Arm.DOT,))
    assert not recorder.starts and "finished before" in capsys.readouterr().out
    assert json.loads(json.dumps({Arm.DOT: whole.result})) == again


def test_models_that_cannot_be_built_are_said_plainly(tmp_path):
    def refuse(arm):
        raise ValueError("`neural_proj_dim` is 0; it must be at least 1.")

    experiment = make_experiment(tmp_path)
    experiment.build_model = refuse
    with pytest.raises(SystemExit, match="The dot model cannot be built: `neural_proj_dim` is 0"):
        run(experiment, (Arm.DOT,))


def test_what_cannot_be_built_is_said_before_any_training(tmp_path):
    recorder = Recorder()
    experiment = make_experiment(tmp_path, recorder)
    build = experiment.build_model

    def refuse(arm):
        if arm.is_neural:
            raise ValueError("`neural_layers` has 12.")
        return build(arm)

    experiment.build_model = refuse
    with pytest.raises(SystemExit, match="The neural model cannot be built: `neural_layers` has 12"):
        run(experiment, (Arm.DOT, Arm.NEURAL))
    assert not recorder.starts


def test_the_clock_goes_on_from_a_checkpoint():
    state = StepClock(seconds=3.5).state()
    assert StepClock(**state["args"]).seconds == 3.5


FILES = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(whole, killed, capsys, file):
    damaged = killed / "dot/checkpoint-8" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    parts = run(make_experiment(killed), (Arm.DOT,))[Arm.DOT]
    said = capsys.readouterr().out
    assert f"checkpoint-8 is damaged ({file}" in said and "resuming from" in said and "checkpoint-4\n" in said
    assert losses_of(parts) == whole.losses and len(whole.losses) == 20


def test_with_no_checkpoint_left_it_starts_again(killed, capsys):
    shutil.rmtree(killed / "dot/checkpoint-8")
    (killed / "dot/checkpoint-4/trainer_state.json").unlink()
    assert run(make_experiment(killed), (Arm.DOT,))[Arm.DOT]["steps"] == 20
    said = capsys.readouterr().out
    assert "trainer_state.json is missing: it was not finished" in said and "training from the start" in said


FULL = (
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0: No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_said_and_the_run_goes_on_later(whole, tmp_path, monkeypatch, error):
    def full(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("transformers.trainer.Trainer._save_rng_state", full)  # fails in the midst of a checkpoint
        with pytest.raises(SystemExit, match=r"No space left on device.*\nThe same command goes on"):
            run(make_experiment(tmp_path / "parts"), (Arm.DOT,))
    parts = run(make_experiment(tmp_path / "parts"), (Arm.DOT,))[Arm.DOT]
    assert losses_of(parts) == whole.losses


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written to: Not a directory"):
        run(make_experiment(tmp_path / "file" / "run"), (Arm.DOT,))


@pytest.mark.parametrize("of_all, of_scorers", ((0.1, 0.0), (0.0, 0.1)))
def test_scorers_may_have_an_optimiser_of_their_own(of_all, of_scorers, tmp_path):
    groups = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    groups[names[id(parameter)]] = (group["initial_lr"], group["weight_decay"])

    experiment = make_experiment(tmp_path, Look())
    experiment.training.max_steps = 1
    experiment.training.weight_decay = of_all
    experiment.scorer_settings = {"scorer_learning_rate": 1e-3, "scorer_weight_decay": of_scorers}
    run(experiment, (Arm.NEURAL,))
    scorer = "transformer.h.0.attn.scorer."
    assert groups[f"{scorer}linear1.weight"] == (1e-3, of_scorers) and groups[f"{scorer}linear1.bias"] == (1e-3, 0.0)
    assert groups["transformer.h.0.attn.c_attn.weight"] == (1e-2, of_all) and groups["transformer.h.0.ln_1.bias"] == (
        1e-2,
        0.0,
    )
    assert f"{scorer}linear3.bias" not in groups  # leaves out what is frozen
    parameters = [name for name, each in build_model(Arm.NEURAL).named_parameters() if each.requires_grad]
    assert sorted(groups) == sorted(parameters)
