"""Score functions that no dot product can represent, fitted by a dot product and by Neural Attention. Takes two minutes.

    python recipes/expressiveness.py --output model_cards/expressiveness

The paper (section 3) says that a network can score pairs as no dot product can. Here a query and a key are one number each,
uniform in [-1, 1], and each score function is fitted by

- a dot product of learned projections `(a q + b) . (c k + d)`, of width 1 to 8: whatever the width, that is
  `w0 + w1 q + w2 k + w3 q k`, so its least error is known: the distance to the span of those four functions;
- a `NeuralScorer` with hidden layers of four and two times that width.

Errors are root mean squares, divided by the standard deviation of the scores: 1 is what a constant has. The last column, the
tail of the singular values, is what a dot product of any embeddings, however nonlinear, must miss at that width.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from experiment import write_json
from hf_neural_attention import NeuralScorer
from hf_neural_attention.models.neural_attention_reference import reference_scores
from reporting import command_line, environment


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "distance, -abs(q - k)": lambda q, k: -(q - k).abs(),
    "exclusive-or of the signs": lambda q, k: ((q > 0) != (k > 0)).float(),
    "threshold, q > k": lambda q, k: (q > k).float(),
    "maximum": torch.maximum,
    "product, q k": lambda q, k: q * k,
}
WIDTHS = (1, 2, 4, 8)
GRID, STEPS, RESTARTS = 64, 1000, 3


class DotProduct(nn.Module):
    """`(a q + b) . (c k + d) + e` of a width."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(1, width), nn.Linear(1, width)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.q_proj(query) @ self.k_proj(key).T + self.bias


class Network(nn.Module):
    """A `NeuralScorer` for heads of size 1; hidden layers four times as wide as its projections."""

    def __init__(self, width: int):
        super().__init__()
        self.scorer = NeuralScorer(1, proj_dim=1, hidden_dims=(4 * width, 2 * width), init="paper")
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return reference_scores(query[None, None], key[None, None], self.scorer.weights())[0, 0] + self.bias


def fit(model: nn.Module, query: torch.Tensor, key: torch.Tensor, target: torch.Tensor) -> float:
    """Relative error after training."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(query, key) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return relative_error(model(query, key), target)


def relative_error(scores: torch.Tensor, target: torch.Tensor) -> float:
    return ((scores - target).square().mean().sqrt() / target.std(correction=0)).item()


def least_error_of_projections(query: torch.Tensor, key: torch.Tensor, target: torch.Tensor) -> float:
    """Of the span of 1, q, k and q k: dot products of linear projections, of any width from 2 on."""
    q, k = torch.meshgrid(query[:, 0].double(), key[:, 0].double(), indexing="ij")
    basis = torch.stack([torch.ones_like(q), q, k, q * k], dim=-1).flatten(0, 1)
    solution = torch.linalg.lstsq(basis, target.double().flatten()[:, None]).solution
    return relative_error((basis @ solution)[:, 0].view_as(target), target.double())


def least_error_of_embeddings(target: torch.Tensor, width: int) -> float:
    """Of dot products of any embeddings of this width plus a constant, which is a matrix of rank `width + 1` at most: what the
    singular values beyond hold (Eckart and Young 1936)."""
    values = torch.linalg.svdvals(target.double())[width + 1 :]
    return (values.square().sum().sqrt() / target.numel() ** 0.5 / target.double().std(correction=0)).item()


def measure() -> list[dict[str, Any]]:
    query = key = torch.linspace(-1, 1, GRID)[:, None] + 1e-3  # no ties
    rows = []
    for name, function in FUNCTIONS.items():
        target = function(query, key.T).contiguous()
        for width in WIDTHS:
            row: dict[str, Any] = {"function": name, "width": width}
            for label, kind in (("dot_product", DotProduct), ("network", Network)):
                errors = []
                for seed in range(RESTARTS):
                    torch.manual_seed(seed)
                    errors.append(fit(kind(width), query, key, target))
                row[label] = min(errors)
            row["least_of_projections"] = least_error_of_projections(query, key, target)
            row["least_of_embeddings"] = least_error_of_embeddings(target, width)
            rows.append(row)
            print(f"{name}, width {width}: dot product {row['dot_product']:.3f}, network {row['network']:.3f}", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(3 * len(FUNCTIONS), 3.4), layout="constrained")
    axes = figure.subplots(1, len(FUNCTIONS), sharey=True)
    for axis, name in zip(axes, FUNCTIONS, strict=True):
        chosen = [row for row in rows if row["function"] == name]
        widths = [row["width"] for row in chosen]
        axis.plot(widths, [row["dot_product"] for row in chosen], "o-", color="tab:gray", label="dot product, fitted")
        axis.plot(widths, [row["network"] for row in chosen], "o-", color="tab:blue", label="Neural Attention, fitted")
        axis.plot(widths, [row["least_of_projections"] for row in chosen], "k--", label="least of linear projections")
        axis.plot(widths, [row["least_of_embeddings"] for row in chosen], "k:", label="least of any embeddings")
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, map(str, widths))
        axis.set(title=name, xlabel="width")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| score function | width | dot product | least possible | Neural Attention | any embeddings: least possible |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = (row[name] for name in ("dot_product", "least_of_projections", "network", "least_of_embeddings"))
        lines.append(f"| {row['function']} | {row['width']} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Write NAME.md, NAME.json and NAME.png.")
    arguments = parser.parse_args()
    rows = measure()
    print(table(rows))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        where = environment()
        write_json(arguments.output.with_suffix(".json"), {"command": command_line(), "environment": where, "rows": rows})
        draw(rows, arguments.output.with_suffix(".png"))
        explanation = (__doc__ or "").split("\n\n", 2)[2].strip()
        text = (
            f"# What a dot product cannot score\n\n{explanation}\n\n{table(rows)}\n\n"
            f"![Relative error against width]({arguments.output.name}.png)\n\n"
            f"The best of {RESTARTS} starts, {STEPS} steps each, on a grid of {GRID} x {GRID}. By `{command_line()}`, torch "
            f"{where['torch']}, {where['cpu']}.\n"
        )
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
