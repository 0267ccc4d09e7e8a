"""DeepSpeed's ZeRO-3 on CPUs: two processes that share out all weights start, load, train and save as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_neural_attention import from_pretrained, patch_status
from hf_neural_attention.analysis import scorer_health
from hf_neural_attention.models.neural_attention_initialization import relu_sum_std
from tests.helpers.comparing import assert_near, run
from tests.helpers.neural_models import ALL, GPT2, VIT, Family, scorers
from tests.helpers.running import RECIPES, ROOT, run_in
from tests.helpers.spread_models import BORN, LLAMA, SPREAD_MODELS, WHOLE, assert_trained, train_alone
from tests.models.test_initialization import assert_alive
from tests.recipes.test_patch_and_finetune import QUICK, REPLACE, TEXT, text_checkpoint
from tests.recipes.test_stopped_and_spread_runs import EACH_OF_TWO, ONE_PROCESS, assert_goes_on, assert_same


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

ON_CPUS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launched(launcher: str, *words: object, folder: Path, **environment: str) -> str:
    """What a script says that this module of Python starts in two processes."""
    command = [sys.executable, "-m", launcher, *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | ON_CPUS | environment, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def save_without_scorers(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".scorer." not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have found checkpoints and left what they saw."""
    folder = tmp_path_factory.mktemp("zero3")
    given = folder / "given"
    for family in (GPT2, VIT):
        family.stock().save_pretrained(given / family.stem)
        save_without_scorers(family.neural(**ALL, neural_compact=True), given / f"{family.stem} that lacks scorers")
    for name, spread in SPREAD_MODELS.items():
        spread.build().save_pretrained(given / name)
    LLAMA.model().save_pretrained(given / "llama")
    GPT2.neural(neural_layers="all").save_pretrained(given / "neural GPT-2")
    launched(
        "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "tests/clients/zero3.py", folder, folder=folder
    )
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "seen.pt")


@torch.no_grad()
def assert_compact_alive(attention: Any) -> None:
    """Scores of each head have a standard deviation of one on unit-normal hidden states."""
    size = attention.projection_size
    if hasattr(attention, "c_attn"):
        query, key = attention.c_attn.weight.T[: 2 * size].split(size)
    else:
        query, key = attention.q_proj.weight, attention.k_proj.weight
    units = torch.cat((query, key), dim=-1).unflatten(0, (attention.num_attention_heads, -1))
    weights = attention.scorer.weights()
    if attention.scorer.mode == "thin":
        assert_near(units.norm(dim=-1), torch.ones(units.shape[:2]) * 2**0.5, 1e-4)
        return
    coefficients = (weights.weight3 @ weights.weight2).squeeze(-2).expand(len(units), -1)
    for each, rows in zip(coefficients, units, strict=True):
        assert abs(relu_sum_std(each, rows @ rows.T) - 1) < 1e-4


def test_scorers_start_right_however_they_are_made(seen: dict[str, Any], folder: Path):
    assert len(seen["born"]) == 2 * (3 * len(BORN) - 3 + 1)
    for how, state in seen["born"].items():
        _, stem, variant = how.split(", ")
        family: Family = GPT2 if stem == "GPT2" else VIT
        model = family.neural_class()(family.config(**ALL | BORN[variant])).eval()
        model.load_state_dict(state)
        for scorer in scorers(model):
            if variant in ("shared", "per head"):
                assert_alive(scorer)
            elif variant == "residual":
                assert not scorer.linear3.weight.any() and scorer.linear2.weight.any(), how
            elif variant == "paper":
                parts = [part * layer.in_features**0.5 for layer in scorer.layers for part in (layer.weight, layer.bias)]
                drawn = torch.cat([part.flatten() for part in parts])
                assert drawn.abs().max() <= 1 and abs(drawn.std().item() - 3**-0.5) < 0.1, how
        if how.startswith("lacking"):
            loaded = load_file(folder / f"given/{stem} that lacks scorers/model.safetensors")
            assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items() if name in state)
            assert all(scorer.linear2.weight.any() and not scorer.linear2.bias.any() for scorer in scorers(model))
            continue
        if "compact" in variant:
            for module in model.modules():
                if hasattr(module, "scorer"):
                    assert_compact_alive(module)
        layers = [scorer.q_proj.weight for scorer in scorers(model) if hasattr(scorer, "q_proj")]
        assert not any(torch.equal(layers[0], other) for other in layers[1:]), how


def test_a_model_is_patched_that_processes_share(seen: dict[str, Any]):
    stock = LLAMA.model().state_dict()
    assert all(torch.equal(seen["patched"][name], tensor) for name, tensor in stock.items())
    born = {name: tensor for name, tensor in seen["patched"].items() if ".scorer.linear1.weight" in name}
    assert len(born) == 3 and all(torch.equal(weight[0], -weight[1]) and weight.any() for weight in born.values())


@pytest.mark.parametrize(
    ("how", "name"), [*(("loaded", name) for name in SPREAD_MODELS), *(("whole", name) for name in WHOLE)]
)
def test_two_processes_train_as_one(how: str, name: str, seen: dict[str, Any], folder: Path):
    spread, ours = SPREAD_MODELS[name], seen[how][name]
    model = spread.build()
    born = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if how == "loaded":
        assert ours["start"].keys() == born.keys()
        assert all(torch.equal(ours["start"][key], tensor) for key, tensor in born.items())
    expected, losses = train_alone(spread)
    assert ours["losses"] == pytest.approx(losses, rel=1e-5)
    assert_trained(ours["end"], expected, born)
    model.load_state_dict(ours["end"])
    saved = from_pretrained(folder / how / name)
    assert torch.equal(run(saved, **spread.inputs()), run(model.eval(), **spread.inputs()))
    if "compact" not in name:
        patch = load_file(folder / how / name / "patch/neural_patch.safetensors")
        assert patch.keys() == {key for key in expected if ".scorer." in key}
        assert all(torch.equal(tensor, ours["end"][key]) for key, tensor in patch.items())


def test_a_model_is_looked_at_that_processes_share(seen: dict[str, Any], folder: Path):
    model = from_pretrained(folder / "given/replace")
    expected = scorer_health(model, **SPREAD_MODELS["replace"].inputs())
    assert [layer[0] for layer in seen["looks"]["health"]] == [layer.layer for layer in expected]
    assert [layer[1:] for layer in seen["looks"]["health"]] == [pytest.approx(layer[1:]) for layer in expected]
    assert seen["looks"]["counted"] == sum(parameter.numel() for each in scorers(model) for parameter in each.parameters())
    neural = GPT2.neural_class().from_pretrained(folder / "given/neural GPT-2")
    ids = neural.generate(torch.arange(3, 9)[None], cache_implementation="neural", do_sample=False, max_new_tokens=8)
    assert torch.equal(seen["looks"]["ids"], ids)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a recipe's run in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_in(folder, "language_modeling.py", *ONE_PROCESS)
    return folder / "one"


def launched_recipe(script: str, *flags: object, folder: Path) -> str:
    """As the configuration has it, but for the number of processes and the precision, and on CPUs."""
    config = RECIPES / "accelerate_configs/deepspeed_zero3.yaml"
    options = ("--config_file", config, "--num_processes", 2, "--mixed_precision", "no")
    return launched("accelerate.commands.launch", *options, RECIPES / script, *flags, "--ddp_backend", "gloo", folder=folder)


def test_a_recipe_trains_saves_and_resumes(undisturbed: Path, tmp_path: Path):
    launched_recipe("language_modeling.py", *EACH_OF_TWO, folder=tmp_path)
    two = tmp_path / "two"
    assert json.loads((two / "comparison.json").read_text())["environment"]["processes"] == 2
    assert_same(two, undisturbed, 1e-4)
    assert_goes_on(lambda: launched_recipe("language_modeling.py", *EACH_OF_TWO, folder=tmp_path), two, undisturbed)


def test_a_checkpoint_is_patched_and_fine_tuned(tmp_path: Path):
    flags = ("--model_name_or_path", text_checkpoint(tmp_path / "llama"), *QUICK, *REPLACE, *TEXT)
    alone = (*flags, "--output_dir", "alone", "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2)
    run_in(tmp_path, "patch_and_finetune.py", *alone)
    spread = (*flags, "--output_dir", "spread", "--per_device_train_batch_size", 2)
    launched_recipe("patch_and_finetune.py", *spread, folder=tmp_path)
    stages, expected = (json.loads((tmp_path / run / "stages.json").read_text()) for run in ("spread", "alone"))
    for stage in ("checkpoint", "patched", "calibrated"):
        assert stages[stage] == pytest.approx(expected[stage], rel=1e-4)
    model = from_pretrained(tmp_path / "spread/neural")
    assert {layer.mode for layer in patch_status(model)} == {"replace"}
    saved = load_file(tmp_path / "spread/neural/model.safetensors")
    scorers = {name: tensor for name, tensor in model.state_dict().items() if ".scorer." in name}
    assert scorers and all(torch.equal(saved[name], tensor) for name, tensor in scorers.items()), "saved whole"


def test_processes_that_know_nothing_of_each_other_stop(tmp_path: Path):
    autos = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}} | dict.fromkeys(autos, "auto")))
    words = ("--standalone", "--nproc_per_node", 2, RECIPES / "recall.py", "--output_dir", "two", "--deepspeed", "zero3.json")
    with pytest.raises(AssertionError, match="2 processes were started, and accelerate knows 1"):
        launched("torch.distributed.run", *words, folder=tmp_path)
