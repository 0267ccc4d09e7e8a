"""Perplexity and accuracy as `evaluate` modules that are part of this package, so that none is fetched from a network.

They need the extra `recipes` (`pip install 'hf_neural_attention[recipes]'`), which brings evaluate, datasets and scikit-learn.
"""

import math

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score


class Perplexity(evaluate.Metric):
    """Perplexity from summed negative log-likelihoods, per token and per word.

    `compute(negative_log_likelihood=[...], num_tokens=[...])` takes one entry per window or batch: the sum over its
    predicted tokens in nats, and their number. Optional `tokens_per_word` is the number of tokens of the text per word of it.

    Returns `loss` (nats per token), `perplexity` (`exp(loss)`) and, given `tokens_per_word`, `word_perplexity`
    (`exp(loss * tokens_per_word)`), which can be compared between tokenizers (Merity et al. 2016 report this one).

    Raises `ValueError` if nothing was predicted.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=datasets.Features(
                {"negative_log_likelihood": datasets.Value("float64"), "num_tokens": datasets.Value("int64")}
            ),
        )

    def _compute(self, negative_log_likelihood, num_tokens, tokens_per_word: float | None = None) -> dict[str, float]:
        total, tokens = float(np.sum(negative_log_likelihood)), int(np.sum(num_tokens))
        if tokens == 0:
            raise ValueError("No token was predicted: the text is shorter than two tokens.")
        scores = {"loss": total / tokens, "perplexity": exp_or_inf(total / tokens)}
        if tokens_per_word:
            scores["word_perplexity"] = exp_or_inf(total / tokens * tokens_per_word)
        return scores


class Accuracy(evaluate.Metric):
    """Share of `predictions` that equal `references` (class indices)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def exp_or_inf(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
