"""The quantisation recipe: perplexity before and after, scorers rounded or left."""

import json
import re

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import quantize
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


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (("--model_name_or_path", "nowhere"), "--model_name_or_path nowhere is no checkpoint: "),
        (("--model_name_or_path", "model", "--batch_size", 0), "--batch_size is 0; expected at least 1"),
        (("--model_name_or_path", "model", "--block_size", 64), "--block_size 64 is more than the 32 positions"),
        (
            ("--model_name_or_path", "model", "--block_size", 32, "--card", "model/config.json/card"),
            "--card .* cannot be written",
        ),
        (("--model_name_or_path", "images"), "--model_name_or_path images cannot be loaded: Unrecognized configuration class"),
        (("--model_name_or_path", "damaged", "--block_size", 32), "--model_name_or_path damaged cannot be loaded: "),
        ((), "--model_name_or_path"),
    ),
)
def test_bad_arguments_get_a_sentence(checkpoints, monkeypatch, capsys, flags: tuple, words: str):
    monkeypatch.chdir(checkpoints)
    monkeypatch.setattr("sys.argv", ["quantize.py", "--max_eval_tokens", "40", *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        quantize.main()
    assert re.search(words, f"{caught.value} {capsys.readouterr().err}")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = GPT2Tokenizer().train_new_from_iterator(["some text"], vocab_size=300)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    for name in ("model", "damaged"):
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "damaged/model.safetensors").write_bytes(b"no weights")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 8}
    ViTForImageClassification(ViTConfig(**small, patch_size=4)).save_pretrained(folder / "images")
    tokenizer.save_pretrained(folder / "images")
    return folder


@pytest.mark.parametrize("tied", (False, True))
def test_the_sizes_of_a_llama_are_those_of_its_tensors(tied: bool):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 10, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    assert quantize.size_of(model) == 4 * sum(parameter.numel() for parameter in model.parameters())
