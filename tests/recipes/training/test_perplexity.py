"""Windowed perplexity against a token-by-token loop that says what it means."""

import math

import numpy as np
import pytest
import torch

from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel
from training.perplexity import perplexity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = NeuralGPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    return NeuralGPT2LMHeadModel(config).eval()


def one_by_one(model, tokens, window, stride):
    """Scores each token once, in the first window that holds it with something before it."""
    total, count, scored = 0.0, 0, {0}
    for start in range(0, len(tokens), stride):
        part = torch.tensor(tokens[start : start + window])
        logs = model(input_ids=part[None]).logits[0].log_softmax(-1)
        for offset in range(1, len(part)):
            if start + offset not in scored:
                total -= logs[offset - 1, part[offset]].item()
                count += 1
                scored.add(start + offset)
        if start + window >= len(tokens):
            break
    return total / count


@pytest.mark.parametrize("length", [2, 5, 8, 9, 12, 16, 29])
@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_equals_scoring_one_token_at_a_time(model, length, stride, batch_size):
    tokens = np.random.default_rng(0).integers(0, 17, length)
    scores = perplexity(model, tokens, window=8, stride=stride, batch_size=batch_size, progress=False)
    assert scores["loss"] == pytest.approx(one_by_one(model, tokens, 8, stride), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model):
    model = NeuralGPT2LMHeadModel(model.config)
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = np.arange(16) % 17
    for stride in (4, 8):  # scores whole windows too, where fewer tokens are predicted, of no fewer words
        scores = perplexity(model.train(), tokens, window=8, stride=stride, batch_size=2, tokens_per_word=2.0, progress=False)
        assert scores["perplexity"] == pytest.approx(17, rel=1e-5)
        assert scores["word_perplexity"] == pytest.approx(17**2, rel=1e-4)
    assert model.training


def test_a_stride_beyond_the_window_is_an_error(model):
    with pytest.raises(ValueError, match="`stride` is 9; it must be from 1 to the window's 8 tokens"):
        perplexity(model, np.arange(9), window=8, stride=9, batch_size=1)
