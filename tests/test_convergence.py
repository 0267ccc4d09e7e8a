"""Training by every backend follows the curve that the reference left in `convergence_curves.json`, and arrives.

A training repeats every operation hundreds of times on weights that it made itself: a gradient that is a little wrong shows,
where a comparison of one step with its tolerance does not. Triton trains on a GPU alone, since its interpreter is slower by a
factor of a thousand.
"""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from hf_neural_attention.models.neural_attention_backends import BACKENDS
from tests.helpers.converging import COMMAND, CURVES, MODES, STEPS, TASKS, train
from tests.helpers.numerics import CPU_BACKENDS


# Widens the stored bound, the largest of 16 draws, since a run is one more draw from what rounding can do, and a backend
# rounds otherwise than the reference at every operation, where those 16 did so once per step
FACTOR = 4
# Tries up to three trainings, which differ in rounding alone. In about one of twenty a rounding error puts a pair on the other
# side of a ReLU, and the curve departs by up to a hundredth. Chance does not strike three times; what is wrong always does
ATTEMPTS = (None, 0, 1)
# Allows for float32, which stores the curve: its numbers from 2 to 4 are 2.4e-7 apart; a mean loss is rounded a few times
RESOLUTION = 2e-6
# Shows what is a little wrong, which leaves the curve at once
FIRST_STEPS = 40
# Bounds what training leaves of the loss of guessing, which no model without attention can better
LEFT = 0.05

# leaves out the reference, which made the curves
BACKENDS_TO_TRAIN = [name for name in CPU_BACKENDS if name not in ("reference", "triton")]

every_case = pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in TASKS for mode in MODES])


def stored(name: str, mode: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The reference's losses and the bound on a departure from them, both `[STEPS]`; and bfloat16's largest departure."""
    content = json.loads(CURVES.read_text())
    assert content["command"] == COMMAND
    curve = content["curves"][f"{name} {mode}"]
    losses, rounding = (torch.tensor(curve[key], dtype=torch.float64) for key in ("loss", "rounding"))
    assert len(losses) == len(rounding) == STEPS
    return losses, RESOLUTION + FACTOR * rounding, curve["bfloat16"]


def excess(losses: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> float:
    """Largest departure in units of the bound: at most 1 for a curve that follows the other."""
    return ((losses - expected).abs() / bound).max().item()


def assert_arrives(losses: torch.Tensor, guessing: float) -> None:
    assert losses[0] > 0.9 * guessing, "it begins with guessing, or worse"
    assert losses[-10:].mean() < LEFT * guessing, "it does not learn"


@every_case
def test_the_stored_curve_arrives_and_its_bound_means_something(name: str, mode: str):
    losses, bound, rough = stored(name, mode)
    assert_arrives(losses, TASKS[name].guessing)
    # allows a hundredth of what there is to lose, at most
    assert bound.max() < 0.01 * TASKS[name].guessing
    assert rough < 0.05 * TASKS[name].guessing


def assert_follows(name: str, mode: str, backend: str, device: str) -> None:
    task, (expected, bound, _) = TASKS[name], stored(name, mode)
    found = []
    for perturbation in ATTEMPTS:
        losses = train(task, mode, backend, perturbation=perturbation, device=device)
        assert_arrives(losses, task.guessing)
        found.append(excess(losses, expected, bound))
        if found[-1] <= 1:
            return
    pytest.fail(f"all {len(ATTEMPTS)} trainings left the curve, by {found} times the bound")


def cases() -> Iterator[Any]:
    """Texts, and images by the first backend, which is the fastest, in the paper's mode. Other images are slow."""
    for backend, name, mode in product(BACKENDS_TO_TRAIN, TASKS, MODES):
        is_slow = name == "ViT" and (backend, mode) != (BACKENDS_TO_TRAIN[0], "replace")
        yield pytest.param(name, mode, backend, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(("name", "mode", "backend"), list(cases()))
def test_training_follows_the_curve_of_the_reference(name: str, mode: str, backend: str):
    assert_follows(name, mode, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_case
def test_training_on_a_gpu_follows_it_too(name: str, mode: str):
    assert_follows(name, mode, "triton", "cuda")


@pytest.mark.parametrize("name", TASKS)
def test_the_compact_form_arrives(name: str):
    """Has no curve of its own, since it runs the same operation, on queries that are projected already."""
    assert_arrives(train(TASKS[name], "compact", BACKENDS_TO_TRAIN[0]), TASKS[name].guessing)


@pytest.mark.parametrize("mode", MODES)
def test_training_in_bfloat16_goes_no_further_from_it_than_the_reference_does(mode: str):
    """By the 2x rule: twice as far as the reference goes in bfloat16, at most."""
    task, (expected, _, rough) = TASKS["GPT2"], stored("GPT2", mode)
    losses = train(task, mode, BACKENDS_TO_TRAIN[0], bfloat16=True)
    assert_arrives(losses, task.guessing)
    assert (losses - expected).abs().max() <= 2 * rough
    assert (losses - expected).abs().max() > 1e-5, "nothing was in bfloat16"


@pytest.mark.parametrize("wrong", ("scores", "gradient"))
def test_a_backend_that_is_a_little_wrong_leaves_the_curve(wrong: str, monkeypatch: pytest.MonkeyPatch):
    right = BACKENDS["reference"].run

    def run(query, key, value, weights, **options):
        if wrong == "scores":  # makes scores a hundredth too large
            weights = weights._replace(weight3=1.01 * weights.weight3)
        else:  # drops a hundredth of the keys' gradient
            key = 0.99 * key + 0.01 * key.detach()
        return right(query, key, value, weights, **options)

    monkeypatch.setitem(BACKENDS, "reference", BACKENDS["reference"]._replace(run=run))
    expected, bound, _ = stored("GPT2", "residual")
    for perturbation in ATTEMPTS:
        losses = train(TASKS["GPT2"], "residual", "reference", perturbation=perturbation, steps=FIRST_STEPS)
        assert excess(losses, expected[:FIRST_STEPS], bound[:FIRST_STEPS]) > 10
