"""Pictures of scores, layer by layer."""

import matplotlib
import pytest

from hf_neural_attention import analysis
from tests.test_scores import images, neural_vit


matplotlib.use("Agg")


def test_pictures_of_scores():
    axes = analysis.draw_scores(analysis.score_statistics(neural_vit(), **images()))
    assert [ax.get_title() for ax in axes] == ["spread of scores", "entropy of attention", "saturated rows"]
    assert all(len(ax.patches) == 2 for ax in axes)
    many = analysis.score_statistics(neural_vit(num_hidden_layers=32), **images())
    low, high = (analysis.draw_scores(each)[0].figure.get_figheight() for each in (many[:2], many))
    assert high > low + 3  # has room for all names
    with pytest.raises(ValueError, match="`axes` has 2; this picture needs 3"):
        analysis.draw_scores(many, axes[:2])
    with pytest.raises(ValueError, match="`axes` has 1; this picture needs 3"):
        analysis.draw_scores(many, axes[0])
