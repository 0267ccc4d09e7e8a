"""Measures how scorers start: how many are dead at birth, and how far their scores spread.

    python recipes/measure_initialization.py --output model_cards/studies/initialization

A scorer is dead if its last hidden layer is zero for every pair of many unit-normal queries and keys: all its scores are
then equal, attention is uniform, and no gradient ever changes that.
"""

import argparse
from pathlib import Path

import torch

from hf_neural_attention import NeuralScorer
from hf_neural_attention.models.configuration_neural_attention import INITIALIZATIONS
from hf_neural_attention.models.neural_attention_reference import reference_scores
from tools.command_lines import make_folder_of
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment


PROJ_DIMS = (1, 2, 3, 4, 8, 16)


@torch.no_grad()
def measure(init: str, proj_dim: int, head_dim: int, seeds: int, length: int) -> dict[str, float]:
    """Share of dead scorers and quantiles of the standard deviation of scores over all pairs of `length` tokens."""
    deviations = torch.empty(seeds)
    for seed in range(seeds):
        torch.manual_seed(seed)
        scorer = NeuralScorer(head_dim, proj_dim, "paper", init=init)
        query, key = torch.randn(2, 1, 1, length, head_dim)
        deviations[seed] = reference_scores(query, key, scorer.weights()).std()
    low, median, high = deviations.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    # counts as dead what differs by rounding alone, as equal scores do
    return {"dead": (deviations < 1e-6).float().mean().item(), "std_5%": low, "std_median": median, "std_95%": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--output", help="Write NAME.md and NAME.json, e.g. model_cards/studies/initialization.")
    arguments = parser.parse_args()
    if arguments.output:
        make_folder_of("--output", arguments.output)

    results = {
        init: {p: measure(init, p, arguments.head_dim, arguments.seeds, arguments.length) for p in PROJ_DIMS}
        for init in INITIALIZATIONS
    }
    table = markdown_table(
        ["initialisation", "proj_dim", "dead at birth", "std of scores: 5 %", "median", "95 %"],
        [
            [init, str(proj_dim), f"{row['dead']:.1%}", *(f"{row[name]:.3g}" for name in ("std_5%", "std_median", "std_95%"))]
            for init, by_size in results.items()
            for proj_dim, row in by_size.items()
        ],
    )
    print(table)
    if arguments.output:
        record = {"command": command_line(), "environment": environment(), "results": results}
        write_json(Path(f"{arguments.output}.json"), record)
        text = (
            f"# How scorers start\n\n{arguments.seeds} seeds, head_dim {arguments.head_dim}, all pairs of {arguments.length} "
            f"unit-normal queries and keys. Measured by `{record['command']}`.\n\n{table}\n\nThe scaled dot product has "
            "standard deviation 1 on these inputs.\n"
        )
        Path(f"{arguments.output}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
