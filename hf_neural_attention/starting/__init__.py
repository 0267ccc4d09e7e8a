"""`start_scores`: lets a new model start with attention scores of a size that it can learn from."""

from .start import ScoreStart, StartedLayer, start_scores


__all__ = ["ScoreStart", "StartedLayer", "start_scores"]
