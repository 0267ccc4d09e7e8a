"""Perplexity of a causal language model over a long row of tokens."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hf_neural_attention.metrics import Perplexity


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    tokens: np.ndarray,
    *,
    window: int,
    stride: int,
    batch_size: int,
    tokens_per_word: float | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = True,
) -> dict[str, float]:
    """Perplexity over windows of `window` tokens that start every `stride` tokens.

    `stride == window` is the cheap way: each window starts from nothing. A smaller stride is the fair way: after the first
    window, only the last `stride` tokens of each are scored, so that each of these has at least `window - stride` tokens of
    context. Every token but the first (of each window, in the cheap way) is predicted once.

    Args:
        tokens: integer array of shape `[num_tokens]`.
        tokens_per_word: of the text, for a figure per word.
        context: makes the context of each forward: autocast, if the model was trained with it.

    Returns:
        See `hf_neural_attention.metrics.Perplexity`.
    """
    if not 0 < stride <= window:
        raise ValueError(f"`stride` is {stride}; it must be from 1 to the window's {window} tokens.")
    device = next(model.parameters()).device
    starts = list(range(0, max(len(tokens) - (window - stride), 1), stride))
    whole = [start for start in starts if start + window <= len(tokens)]
    batches = [whole[:1]] + [whole[i : i + batch_size] for i in range(1, len(whole), batch_size)]
    batches += [[start] for start in starts if start + window > len(tokens)]  # adds the last, shorter window by itself
    metric = Perplexity(keep_in_memory=True)
    taken = inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    for batch in tqdm(
        [batch for batch in batches if batch], desc=f"perplexity, stride {stride}", leave=False, disable=not progress
    ):
        inputs = torch.from_numpy(np.stack([tokens[start : start + window] for start in batch])).to(device, torch.int64)
        # scores the first window whole; others skip what the window before has scored
        scored = inputs.shape[1] - 1 if batch[0] == 0 or stride == window else inputs.shape[1] - (window - stride)
        if scored < 1:
            continue
        options = {"use_cache": False, "logits_to_keep": scored + 1}  # spares work, in models that know them
        with context():
            outputs = model(input_ids=inputs, **{name: value for name, value in options.items() if name in taken})
        logits = outputs.logits[:, -scored - 1 : -1]
        targets = inputs[:, -scored:]
        losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        metric.add(negative_log_likelihood=losses.item(), num_tokens=targets.numel())
    model.train(was_training)
    return metric.compute(tokens_per_word=tokens_per_word)
