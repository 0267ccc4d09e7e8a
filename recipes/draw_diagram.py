"""Draws the README's picture: how a query is scored against a key, by a dot product and by a network.

python recipes/draw_diagram.py --output assets/how_it_works.png
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


QUERY, KEY, PAIR, SCORE = "#cfe3f7", "#fbe0c3", "#e3e3e3", "#d3ecd0"


def box(axis: Axes, x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.62) -> None:
    axis.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=color, edgecolor="#555555"))
    axis.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#555555", "shrinkA": 0, "shrinkB": 0})


def draw(axis: Axes) -> None:
    axis.set(xlim=(-0.2, 13.6), ylim=(-0.9, 3.5))
    axis.axis("off")
    axis.text(0.9, 3.25, "once per token", ha="center", fontsize=9, color="#555555")
    axis.text(6.9, 3.25, "for every pair of query $i$ and key $j$", ha="center", fontsize=9, color="#555555")
    axis.axvline(4.3, 0.33, 0.9, color="#bbbbbb", linestyle=":")

    box(axis, 0.9, 2.5, "query $q_i$\n(64 numbers)", QUERY)
    box(axis, 0.9, 1.2, "key $k_j$\n(64 numbers)", KEY)
    box(axis, 3.2, 2.5, "$u_i$\n(2 numbers)", QUERY)
    box(axis, 3.2, 1.2, "$w_j$\n(2 numbers)", KEY)
    for y in (2.5, 1.2):
        arrow(axis, (1.65, y), (2.45, y))
    box(axis, 6.0, 1.85, "relu$(u_i + w_j)$", PAIR, 2.0)
    box(axis, 8.7, 1.85, "relu$(W_2\\,\\cdot + b_2)$", PAIR, 2.1)
    box(axis, 11.1, 1.85, "$w_3 \\cdot$", PAIR, 1.0)
    box(axis, 12.9, 1.85, "score $s_{ij}$", SCORE, 1.3)
    arrow(axis, (3.95, 2.5), (5.0, 2.0))
    arrow(axis, (3.95, 1.2), (5.0, 1.7))
    for start, end in ((7.0, 7.65), (9.75, 10.6), (11.6, 12.25)):
        arrow(axis, (start, 1.85), (end, 1.85))

    axis.text(
        6.7,
        -0.15,
        "then as always: output$_i$ = $\\Sigma_j$ softmax$_j(s_{ij})\\,v_j$.   A dot product in its place would be "
        "$s_{ij} = q_i \\cdot k_j\\,/\\,\\sqrt{64}$.",
        ha="center",
        fontsize=10,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/how_it_works.png"))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axis = figure.subplots()
    draw(axis)
    figure.savefig(parser.parse_args().output, dpi=110)


if __name__ == "__main__":
    main()
