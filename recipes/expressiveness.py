"""Score functions that no dot product can represent, fitted by a dot product and by Neural Attention. Takes half a minute.

    python recipes/expressiveness.py --output model_cards/studies/expressiveness

The paper (section 3) says that a network can score pairs as no dot product can. Here a query and a key are one number each,
uniform in [-1, 1], and each score function is fitted by

- a dot product of learned projections `(a q + b) . (c k + d)`, of width 1 to 8: whatever the width, that is
  `w0 + w1 q + w2 k + w3 q k`, so its least error is known;
- a `NeuralScorer` with hidden layers of four and two times that width.

A softmax sees scores less the mean of their row, the query's, and so do fits and errors here. Errors are root mean squares,
divided by the standard deviation of the scores within rows: 1 is what uniform attention has. The last column, the tail of the
singular values, is what a dot product of any embeddings, however nonlinear, must miss at that width.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn, vmap
from torch.func import functional_call, stack_module_state

from hf_neural_attention import NeuralScorer
from hf_neural_attention.models.neural_attention_reference import reference_scores
from tools.command_lines import make_folder_of
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "distance, -abs(q - k)": lambda q, k: -(q - k).abs(),
    "exclusive-or of the signs": lambda q, k: ((q > 0) != (k > 0)).float(),
    "threshold, q > k": lambda q, k: (q > k).float(),
    "maximum": torch.maximum,
    "product, q k": lambda q, k: q * k,
}
WIDTHS = (1, 2, 4, 8)
GRID, STEPS, RESTARTS = 32, 1000, 3


class DotProduct(nn.Module):
    """`(a q + b) . (c k + d)` of a width."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(1, width), nn.Linear(1, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.q_proj(query) @ self.k_proj(key).T


class Network(nn.Module):
    """A `NeuralScorer` for heads of size 1; hidden layers four times as wide as its projections."""

    def __init__(self, width: int):
        super().__init__()
        self.scorer = NeuralScorer(1, proj_dim=1, hidden_dims=(4 * width, 2 * width), init="paper")

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return reference_scores(query[None, None], key[None, None], self.scorer.weights())[0, 0]


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fit(kind: type[nn.Module], width: int, query: torch.Tensor, key: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Relative errors `[functions]` of the best of some fits each, all at once, to targets `[functions, queries, keys]`."""
    torch.manual_seed(0)
    models = [kind(width) for _ in range(RESTARTS * len(targets))]
    parameters, buffers = stack_module_state(models)
    wanted = centred(targets).repeat(RESTARTS, 1, 1)

    def scores() -> torch.Tensor:
        return centred(vmap(lambda *state: functional_call(models[0], state, (query, key)))(parameters, buffers))

    optimizer = torch.optim.Adam([each for each in parameters.values() if each.requires_grad], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (scores() - wanted).square().mean((1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return relative_error(scores(), wanted).view(RESTARTS, -1).amin(0)


def centred(scores: torch.Tensor) -> torch.Tensor:
    """Less the mean of each row."""
    return scores - scores.mean(-1, keepdim=True)


def relative_error(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of centred scores `[..., queries, keys]`: the root of their mean square, to that of the target."""
    return ((scores - target).square().mean((-1, -2)) / target.square().mean((-1, -2))).sqrt()


def least_error_of_projections(query: torch.Tensor, key: torch.Tensor, target: torch.Tensor) -> float:
    """Of the span of k and q k: all that a dot product of linear projections of any width holds beside constants of a row."""
    q, k = torch.meshgrid(query[:, 0].double(), key[:, 0].double(), indexing="ij")
    wanted = centred(target.double())
    basis = torch.stack([centred(k), centred(q * k)], dim=-1).flatten(0, 1)
    solution = torch.linalg.lstsq(basis, wanted.flatten()[:, None]).solution
    return relative_error((basis @ solution)[:, 0].view_as(wanted), wanted).item()


def least_error_of_embeddings(target: torch.Tensor, width: int) -> float:
    """Of dot products of any embeddings of this width, which make a matrix of that rank: what the singular values beyond hold
    (Eckart and Young 1936)."""
    values = torch.linalg.svdvals(centred(target.double()))
    return (values[width:].square().sum() / values.square().sum()).sqrt().item()


def measure() -> list[dict[str, Any]]:
    query = key = torch.linspace(-1, 1, GRID)[:, None] + 1e-3  # avoids ties
    targets = torch.stack([function(query, key.T) for function in FUNCTIONS.values()])
    rows = []
    for width in WIDTHS:
        kinds: dict[str, type[nn.Module]] = {"dot_product": DotProduct, "network": Network}
        errors = {label: fit(kind, width, query, key, targets).tolist() for label, kind in kinds.items()}
        for index, name in enumerate(FUNCTIONS):
            row: dict[str, Any] = {"function": name, "width": width}
            for label, kind in kinds.items():
                row |= {label: errors[label][index], f"parameters_of_{label}": parameters_of(kind(width))}
            row["least_of_projections"] = least_error_of_projections(query, key, targets[index])
            row["least_of_embeddings"] = least_error_of_embeddings(targets[index], width)
            rows.append(row)
    return sorted(rows, key=lambda row: list(FUNCTIONS).index(row["function"]))


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
    """With the number of parameters in brackets."""
    header = ["score function", "width", "dot product", "least possible", "Neural Attention", "any embeddings: least possible"]
    lines = [
        [
            row["function"],
            str(row["width"]),
            f"{row['dot_product']:.3f} ({row['parameters_of_dot_product']})",
            f"{row['least_of_projections']:.3f}",
            f"{row['network']:.3f} ({row['parameters_of_network']})",
            f"{row['least_of_embeddings']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Write NAME.md, NAME.json and NAME.png.")
    arguments = parser.parse_args()
    if arguments.output is not None:
        make_folder_of("--output", arguments.output)
    rows = measure()
    print(table(rows))
    if arguments.output is not None:
        where = environment()
        write_json(Path(f"{arguments.output}.json"), {"command": command_line(), "environment": where, "rows": rows})
        draw(rows, Path(f"{arguments.output}.png"))
        explanation = (__doc__ or "").split("\n\n", 2)[2].strip()
        text = (
            f"# What a dot product cannot score\n\n{explanation}\n\n{table(rows)}\n\n"
            f"![Relative error against width]({arguments.output.name}.png)\n\n"
            f"In brackets: parameters. The best of {RESTARTS} starts, {STEPS} steps each, on a grid of {GRID} x {GRID}. By "
            f"`{command_line()}`, torch {where['torch']}, {where['cpu']}.\n"
        )
        Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
