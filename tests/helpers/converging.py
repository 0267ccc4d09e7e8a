"""Trains tiny models from fixed seeds on tasks that only attention solves, and keeps the reference's curves of it.

    python -m tests.helpers.converging

writes `tests/convergence_curves.json` anew (some minutes on one core).
"""

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from hf_neural_attention import use_backend
from tests.helpers.neural_models import GPT2, VIT, Family


CURVES = Path(__file__).parents[1] / "convergence_curves.json"
COMMAND = "python -m tests.helpers.converging"

STEPS = 200
MODES = ("replace", "residual")
# Counts trainings, each with rounding errors of its own
PERTURBATIONS = 16


class Task(NamedTuple):
    """A family's task: batches of it, and the loss of guessing, which no model without attention can better."""

    family: Family
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]]
    guessing: float

    def model(self, mode: str) -> Any:
        torch.manual_seed(0)
        form: dict[str, Any] = {"neural_compact": True} if mode == "compact" else {"neural_mode": mode}
        fields = {
            "neural_layers": "all",
            "neural_proj_dim": 8,
            "neural_hidden_dims": "paper",
            "initializer_range": 0.1,
            **form,
        }
        config = self.family.config(num_hidden_layers=2, **fields)
        return self.family.neural_class()(config).train()


def copying(generator: torch.Generator, batch: int = 16, length: int = 4, symbols: int = 16) -> dict[str, torch.Tensor]:
    """`length` random symbols, then the same again; only the second time counts. Longer ones are learned by leaving a plateau,
    which multiplies rounding errors by a hundred thousand."""
    half = torch.randint(3, 3 + symbols, (batch, length), generator=generator)  # begins after the special tokens
    return {"input_ids": half.repeat(1, 2), "labels": torch.cat([torch.full_like(half, -100), half], 1)}


def finding(generator: torch.Generator, batch: int = 32, kinds: int = 5) -> dict[str, torch.Tensor]:
    """Pictures of 4 x 4 patches of `kinds` patterns in the first two channels. The third marks one patch, whose pattern is the
    label."""
    patterns = torch.randn(kinds, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    kind = torch.randint(kinds, (batch, 16), generator=generator)
    marked = torch.randint(16, (batch, 1), generator=generator)
    mark = torch.zeros(batch, 16).scatter_(1, marked, 1.0)[:, :, None, None, None].expand(-1, -1, 1, 4, 4)
    patches = torch.cat([patterns[kind], mark], 2).unflatten(1, (4, 4))  # [batch, down, across, channel, 4, 4]
    return {
        "pixel_values": patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, 16, 16),
        "labels": kind.gather(1, marked)[:, 0],
    }


TASKS = {"GPT2": Task(GPT2, copying, math.log(16)), "ViT": Task(VIT, finding, math.log(5))}


@torch.no_grad()
def perturb(model: Any, generator: torch.Generator) -> None:
    """Moves every weight to the next number above or below it, at random."""
    for parameter in model.parameters():
        towards = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -math.inf, math.inf)
        parameter.copy_(torch.nextafter(parameter, towards.to(parameter.device)))


def train(
    task: Task,
    mode: str,
    backend: str,
    bfloat16: bool = False,
    perturbation: int | None = None,
    steps: int = STEPS,
    device: str = "cpu",
) -> torch.Tensor:
    """Losses of `steps` steps in float32, `[steps]` float64.

    Args:
        bfloat16: forward under autocast.
        perturbation: seed of a rounding error of one unit in the last place in every weight before every step.
    """
    model = task.model(mode).to(device)
    # sets epsilon above rounding errors, which Adam would turn into whole steps where a gradient is exactly zero
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.0)
    data = torch.Generator().manual_seed(1)
    noise = None if perturbation is None else torch.Generator().manual_seed(perturbation)
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            if noise is not None:
                perturb(model, noise)
            batch = {key: tensor.to(device) for key, tensor in task.batch(data).items()}
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def measure(task: Task, mode: str) -> dict[str, Any]:
    """The reference's curve, how far rounding takes it from that up to each step, and how far bfloat16 ever does."""
    curve = train(task, mode, "reference")
    runs = torch.stack([train(task, mode, "reference", perturbation=seed) for seed in range(PERTURBATIONS)])
    departures = (runs - curve).abs().amax(0).cummax(0).values
    rough = (train(task, mode, "reference", bfloat16=True) - curve).abs().max().item()
    return {
        "loss": [float(f"{loss:.9g}") for loss in curve.tolist()],  # keeps the whole float32 number
        "rounding": [float(f"{departure:.2g}") for departure in departures.tolist()],
        "bfloat16": float(f"{rough:.2g}"),
    }


def main() -> None:
    torch.set_num_threads(1)
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    curves = {f"{name} {mode}": measure(task, mode) for name, task in TASKS.items() for mode in MODES}
    CURVES.write_text(json.dumps({"command": COMMAND, "versions": versions, "curves": curves}) + "\n")


if __name__ == "__main__":
    main()
