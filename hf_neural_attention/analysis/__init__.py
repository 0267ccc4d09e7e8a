"""Looks into attention layers: their scores, whatever makes them, attention maps; score surfaces and the health of scorers; as
arrays, and as pictures (matplotlib)."""

from ..scores import LayerScores, ScoreStatistics, score_statistics
from .callback import ScoreCallback, ScorerHealthCallback, WatchingCallback
from .drawing import draw_attention, draw_attention_over_image, draw_health, draw_scores, draw_surface
from .health import LayerHealth, ScorerHealth, scorer_health
from .maps import attention_maps, attention_over_image
from .surface import ScoreSurface, score_surface
from .watching import QueriesAndKeys, queries_and_keys


__all__ = [
    "LayerHealth",
    "LayerScores",
    "QueriesAndKeys",
    "ScoreCallback",
    "ScoreStatistics",
    "ScoreSurface",
    "ScorerHealth",
    "ScorerHealthCallback",
    "WatchingCallback",
    "attention_maps",
    "attention_over_image",
    "draw_attention",
    "draw_attention_over_image",
    "draw_health",
    "draw_scores",
    "draw_surface",
    "queries_and_keys",
    "score_statistics",
    "score_surface",
    "scorer_health",
]
