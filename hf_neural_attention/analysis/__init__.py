"""Looks into attention layers: their scores, whatever makes them, attention maps; score surfaces and the health of scorers; as
arrays, and as pictures (matplotlib)."""

from ..scores import LayerScores, ScoreStatistics, score_statistics
from .callback import ScoreCallback, ScorerHealthCallback, WatchingCallback
from .drawing import draw_attention, draw_attention_over_image, draw_health, draw_scores, draw_surface
from .health import LayerHealth, ScorerHealth, scorer_health
from .image_modes import as_seen, to_rgb
from .layer_recording import QueriesAndKeys, queries_and_keys
from .maps import attention_maps, attention_over_image, dot_product_maps, patch_grid
from .surface import ScoreSurface, score_surface, surface_around


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
    "as_seen",
    "attention_maps",
    "attention_over_image",
    "dot_product_maps",
    "draw_attention",
    "draw_attention_over_image",
    "draw_health",
    "draw_scores",
    "draw_surface",
    "patch_grid",
    "queries_and_keys",
    "score_statistics",
    "score_surface",
    "scorer_health",
    "surface_around",
    "to_rgb",
]
