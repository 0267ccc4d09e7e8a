"""What a dot product cannot score: the theory by hand, and one fit."""

import pytest
import torch

from expressiveness import (
    FUNCTIONS,
    DotProduct,
    Network,
    centred,
    fit,
    least_error_of_embeddings,
    least_error_of_projections,
    relative_error,
)


GRID = torch.linspace(-1, 1, 16)[:, None] + 1e-3


def test_a_product_is_what_a_dot_product_is_for():
    target = FUNCTIONS["product, q k"](GRID.double(), GRID.T.double())
    assert least_error_of_projections(GRID, GRID, target) < 1e-9 and least_error_of_embeddings(target, 1) < 1e-6


def test_the_least_errors_are_those_of_the_best_fits():
    target = FUNCTIONS["exclusive-or of the signs"](GRID, GRID.T)
    # has rank one around its rows' mean: embeddings that are signs reach it, linear projections do not
    assert least_error_of_embeddings(target, 1) < 1e-3
    best = least_error_of_projections(GRID, GRID, target)
    sign, line = GRID.sign().double(), GRID.double() - GRID.double().mean()
    share = ((sign * line).mean() ** 2 / line.square().mean() / sign.square().mean()) ** 2  # finds what q k explains
    assert best == pytest.approx((1 - share.item()) ** 0.5, abs=0.02)


@pytest.mark.slow
def test_a_network_scores_what_a_dot_product_cannot():
    targets = torch.stack([FUNCTIONS[name](GRID, GRID.T) for name in ("distance, -abs(q - k)", "product, q k")])
    dot, network = (fit(kind, 2, GRID, GRID, targets) for kind in (DotProduct, Network))
    assert dot[0].item() == pytest.approx(least_error_of_projections(GRID, GRID, targets[0]), abs=0.01)
    assert network[0] < 0.3 * dot[0] and dot[1] < 0.01 < network[1]


def test_constants_of_a_row_are_no_error():
    scores = torch.randn(4, 5)
    shifted = scores + torch.randn(4, 1)
    assert relative_error(centred(shifted), centred(scores)) < 1e-6
    assert relative_error(torch.zeros(4, 5), centred(scores)) == 1.0
