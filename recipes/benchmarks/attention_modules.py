"""The attention module of GPT-2 124M against the length, its projections included: stock on SDPA, neural, and compact."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from benchmarks.correctness import Check
from benchmarks.time_and_memory import Limits
from hf_neural_attention import use_backend
from tools.own_process import in_own_process
from tools.peak_memory import peak_memory, return_large_tensors
from tools.timing_by_turns import Runner, Spread, ratio_of
from training.arms import Arm
from training.model_families import GPT2


STOCK = "stock"
# Sets fields of the config, by the names that pictures and tables translate
MODULES: dict[str, dict[str, Any]] = {
    STOCK: {},
    "neural 2x1": {"neural_layers": "all", "neural_hidden_dims": (2, 1)},
    "compact 2x1": {"neural_layers": "all", "neural_hidden_dims": (2, 1), "neural_compact": True},
    "compact 16x2": {"neural_layers": "all", "neural_hidden_dims": (16, 2), "neural_compact": True},
    "compact 16x8": {"neural_layers": "all", "neural_hidden_dims": (16, 8), "neural_compact": True},
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PHASES = ("forward", "both")
CHECKED_LENGTH = 256


def build_module(name: str, length: int) -> nn.Module:
    """With random weights, without dropout, at the stock config's sizes."""
    set_seed(0)
    classes = GPT2[Arm.DOT if name == STOCK else Arm.NEURAL]
    config = classes.config(
        n_layer=1,
        n_positions=length,
        vocab_size=1,  # saves a second that embeddings would take, of which nothing is measured
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        attn_implementation="sdpa",
        **MODULES[name],
    )
    model: Any = classes.model(config)
    return model.base_model.h[0].attn


def draw_states(module: Any, length: int) -> torch.Tensor:
    return torch.randn(1, length, module.embed_dim, generator=torch.Generator().manual_seed(0))


def module_runner(name: str, length: int, phase: str) -> Runner:
    module = build_module(name, length)
    states = draw_states(module, length)

    def forward(_: Any) -> None:
        with torch.no_grad():
            module(states)

    def both(_: Any) -> None:
        output = module(states.requires_grad_())[0]
        output.backward(states.detach())
        module.zero_grad()
        states.grad = None

    return Runner(forward if phase == "forward" else both)


def check_module(name: str) -> Check:
    """Output, and gradients as one vector, at few tokens, beside the reference backend's in float64: errors by their norms, at
    most twice those of the reference backend in float32, and one rounding."""
    module = build_module(name, CHECKED_LENGTH)
    states = draw_states(module, CHECKED_LENGTH)

    def results(module: Any, states: torch.Tensor, backend: str) -> list[torch.Tensor]:
        states = states.clone().requires_grad_()
        with use_backend(backend):
            output = module(states)[0]
        wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(output, [states, *wanted], states.detach())
        return [output, torch.cat([gradient.flatten() for gradient in gradients])]

    exact = results(copy.deepcopy(module).double(), states.double(), "reference")
    ours, usual = results(module, states, "auto"), results(module, states, "reference")
    for mine, same, expected in zip(ours, usual, exact, strict=True):
        error, allowed = ((each.double() - expected).norm() for each in (mine, same))
        if not error <= 2 * allowed + torch.finfo(mine.dtype).eps * expected.norm():
            return Check(
                False, f"does not match the reference (error {error.item():.3g}, the reference's {allowed.item():.3g})"
            )
    return Check(True, f"at {CHECKED_LENGTH} tokens")


def own_peak_bytes(name: str, length: int, phase: str) -> int:
    return_large_tensors()
    warm_up = module_runner(name, CHECKED_LENGTH, phase)
    warm_up.run(None)  # keeps libraries and threads from being counted
    runner = module_runner(name, length, phase)
    with peak_memory("cpu") as peak:
        runner.run(None)
    return peak.size


def measure_modules(limits: Limits, lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, Any]]:
    """A row for each module, length and phase: seconds by turns, and what a call needs of memory beyond its inputs."""
    checks = {name: check_module(name) for name in MODULES}
    for length in lengths:
        for phase in PHASES:
            runners = {name: module_runner(name, length, phase) for name in MODULES if checks[name].passed}
            times = limits.times_of(runners)
            for name, check in checks.items():
                row = {"provider": name, "length": length, "phase": phase, "note": check.message}
                if name in times:
                    row |= Spread.of(times[name]).fields("seconds") | {"turns": len(times[name])}
                    row |= ratio_of(times[name], times[STOCK]).fields("to_sdpa")
                    row["peak_bytes"] = in_own_process(own_peak_bytes, name, length, phase)
                yield row
