"""Perplexity and accuracy, against their definitions."""

import math
import socket

import pytest

from hf_neural_attention.metrics import Accuracy, Perplexity


def test_perplexity_is_the_exponential_of_the_mean_over_tokens_and_over_words():
    scores = Perplexity(keep_in_memory=True).compute(
        negative_log_likelihood=[6.0, 2.0], num_tokens=[3, 1], tokens_per_word=2.0
    )
    assert scores == {"loss": 2.0, "perplexity": math.exp(2.0), "word_perplexity": math.exp(4.0)}


def test_perplexity_adds_up_and_leaves_words_out_where_there_are_none():
    metric = Perplexity(keep_in_memory=True)
    metric.add(negative_log_likelihood=1.0, num_tokens=1)
    metric.add_batch(negative_log_likelihood=[2.0, 3.0], num_tokens=[1, 2])
    assert metric.compute() == {"loss": 1.5, "perplexity": math.exp(1.5)}


def test_perplexity_of_nothing_is_an_error_and_of_too_much_infinite():
    with pytest.raises(ValueError, match="No token was predicted"):
        Perplexity(keep_in_memory=True).compute(negative_log_likelihood=[0.0], num_tokens=[0])
    assert Perplexity(keep_in_memory=True).compute(negative_log_likelihood=[1e6], num_tokens=[1])["perplexity"] == math.inf


def test_accuracy():
    assert Accuracy(keep_in_memory=True).compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_metrics_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    test_accuracy()
