"""The quantisation recipe: perplexity before and after, scorers rounded or left."""

import json

import pytest
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel
from tests.helpers.running import run_in
from training.text import TextArguments, load_text


@pytest.mark.slow
@pytest.mark.parametrize("is_compact", (False, True), ids=("whole", "compact"))
@pytest.mark.parametrize("flags", ((), ("--keep_scorers", "True")), ids=("all", "scorers kept"))
def test_before_and_after(tmp_path, flags, is_compact):
    texts = load_text(TextArguments(vocab_size=300))["train"]["text"][:50]
    GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=300).save_pretrained(tmp_path / "model")
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
    config = NeuralGPT2Config(**sizes, neural_layers="all", neural_compact=is_compact, bos_token_id=0, eos_token_id=0)
    NeuralGPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    command = ("--model_name_or_path", "model", "--block_size", 32, "--max_eval_tokens", 500, "--card", "card", *flags)
    printed = run_in(tmp_path, "quantize.py", *command)
    before, after = json.loads((tmp_path / "card.json").read_text())["rows"]
    assert "| int8 |" in printed and (tmp_path / "card.md").exists()
    assert before["layers"] == [] and "transformer.h.1.attn.c_attn" in after["layers"]
    assert any("scorer" in name for name in after["layers"]) == (not flags)
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.05)
    assert after["perplexity"] != before["perplexity"] and after["megabytes"] < before["megabytes"]


def test_the_sizes_of_a_llama_are_those_of_its_tensors():
    from quantize import size_of

    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=10, num_attention_heads=2))
    assert size_of(model) == 4 * sum(parameter.numel() for parameter in model.parameters())
