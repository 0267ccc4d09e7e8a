"""Assisted generation: a smaller model drafts, and what comes out is what the model alone generates."""

import pytest
import torch

from tests.helpers.comparing import use
from tests.helpers.generating import generate, neural, prompt, stock_model
from tests.helpers.neural_models import GPT2, all_variants, eager_and_sdpa


@pytest.fixture(autouse=True)
def no_logged_deprecation():
    """Instead of conftest.py's: Transformers 5.23 calls the assistant in a way that it deprecates itself."""


def one_prompt() -> dict[str, torch.Tensor]:
    """Assistants take one at a time."""
    return {name: tensor[:1] for name, tensor in prompt(padded=False).items()}


@eager_and_sdpa
@pytest.mark.parametrize("assistant_is_neural", (True, False))
@all_variants
def test_assistants(implementation: str, assistant_is_neural: bool, fields: dict):
    model, inputs = neural(attn_implementation=implementation, **fields), one_prompt()
    expected = generate(model, inputs)
    make = neural if assistant_is_neural else stock_model
    # takes an assistant that knows little, and one that is always right
    for assistant in (make(n_layer=1), use(model, implementation)):
        assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)


@eager_and_sdpa
def test_sampling_with_an_assistant(implementation: str):
    model, inputs = neural(attn_implementation=implementation, neural_layers="all"), one_prompt()
    arguments = {"do_sample": True, "assistant_model": neural(n_layer=1)}
    assert torch.equal(generate(model, inputs, **arguments), generate(model, inputs, **arguments)), "the same seed"
    assert torch.equal(generate(model, inputs, top_k=1, **arguments), generate(model, inputs)), "one token to choose from"


@eager_and_sdpa
@all_variants
def test_prompt_lookup(implementation: str, fields: dict):
    model, inputs = neural(attn_implementation=implementation, **fields), one_prompt()
    # repeats the prompt, so that there is something to look up
    inputs = {name: torch.cat((tensor, tensor), dim=1) for name, tensor in inputs.items()}
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), generate(model, inputs))


def test_a_neural_model_assists_a_stock_one():
    torch.manual_seed(1)
    stock, inputs = stock_model(), one_prompt()
    expected = generate(stock, inputs)
    for assistant in (neural(n_layer=1), GPT2.twin(stock, neural_layers="all", neural_mode="residual")):
        assert torch.equal(generate(stock, inputs, assistant_model=assistant), expected)
