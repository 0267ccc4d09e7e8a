"""What a dot product cannot score: the theory by hand, and one fit."""

import pytest
import torch

from expressiveness import (
    FUNCTIONS,
    DotProduct,
    Network,
    fit,
    least_error_of_embeddings,
    least_error_of_projections,
)


GRID = torch.linspace(-1, 1, 16)[:, None] + 1e-3


def test_a_product_is_what_a_dot_product_is_for():
    target = FUNCTIONS["product, q k"](GRID.double(), GRID.T.double())
    assert least_error_of_projections(GRID, GRID, target) < 1e-9 and least_error_of_embeddings(target, 1) < 1e-6


def test_the_least_errors_are_those_of_the_best_fits():
    target = FUNCTIONS["exclusive-or of the signs"](GRID, GRID.T)
    # of rank one around its mean: embeddings that are signs do it, linear projections do not
    assert least_error_of_embeddings(target, 1) < 1e-3
    best = least_error_of_projections(GRID, GRID, target)
    sign, line = GRID.sign().double(), GRID.double() - GRID.double().mean()
    share = ((sign * line).mean() ** 2 / line.square().mean() / sign.square().mean()) ** 2  # explained by q k
    assert best == pytest.approx((1 - share.item()) ** 0.5, abs=0.02)


@pytest.mark.slow
def test_a_network_scores_what_a_dot_product_cannot():
    target = FUNCTIONS["distance, -abs(q - k)"](GRID, GRID.T)
    torch.manual_seed(0)
    dot, network = fit(DotProduct(8), GRID, GRID, target), min(fit(Network(2), GRID, GRID, target) for _ in range(3))
    assert dot == pytest.approx(least_error_of_projections(GRID, GRID, target), abs=0.01)
    assert network < 0.3 * dot
