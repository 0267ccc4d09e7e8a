"""What the tests of `generate` share: models that do not repeat themselves, prompts, and the tokens that they lead to."""

from typing import Any

import torch

from tests.helpers.neural_models import GPT2
from tests.helpers.versions import named


NEW_TOKENS = 8
# Unties embeddings, since a random model with tied ones repeats the token before and agrees with anything; lets none end early
TALKATIVE = {"tie_word_embeddings": False, "eos_token_id": None}


def neural(**fields) -> Any:
    return GPT2.neural(**TALKATIVE, **fields)


def stock_model(**fields) -> Any:
    return GPT2.stock(**TALKATIVE, **fields)


def prompt(padded: bool = True) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, the shorter one padded on the left."""
    ids, mask = torch.randint(3, 98, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if padded:
        ids[1, :4] = mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], **arguments) -> torch.Tensor:
    """New tokens, of which there are always as many, and more than two different ones."""
    torch.manual_seed(3)
    tokens = model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **named(arguments)})
    tokens = tokens[:, inputs["input_ids"].shape[1] :]
    assert tokens.shape[1] == NEW_TOKENS and len(tokens.unique()) > 2, tokens
    return tokens
