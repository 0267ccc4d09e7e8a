"""What the README tells people to type works as it stands there."""

import re
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SECTIONS = re.findall(r"^## (\w[\w ]*)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
BLOCKS = [(heading, code) for heading, text in SECTIONS for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.fixture
def in_a_folder_with_models(tmp_path, monkeypatch):
    """The folders that the blocks load: what `make quickstart` leaves, and a small GPT-2 in the place of the Hub's."""
    monkeypatch.chdir(tmp_path)
    texts = ["The import statement binds names."] * 3
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=270)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    NeuralGPT2LMHeadModel(NeuralGPT2Config(**sizes)).save_pretrained("runs/quickstart/neural")
    tokenizer.save_pretrained("runs/quickstart/neural")
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained("openai-community/gpt2")
    tokenizer.save_pretrained("openai-community/gpt2")


def test_every_section_that_shows_code_is_found():
    assert [heading for heading, _ in BLOCKS] == [
        "Load",
        "Train",
        "Patch",
        "Patch",
        "Publish",
        "How it works",
        "Speed",
        "Look inside",
    ]


@pytest.mark.parametrize(("heading", "code"), BLOCKS, ids=[heading for heading, _ in BLOCKS])
def test_the_blocks_run_as_written(heading, code, in_a_folder_with_models, capsys):
    scope = {}
    exec(compile(code, f"README, {heading}", "exec"), scope)
    if heading == "Load":
        assert capsys.readouterr().out.startswith("The import statement")
    if heading == "Patch":
        assert "transformer.h.1.attn" in capsys.readouterr().out
        assert any("scorer" in name for name, _ in scope["model"].named_parameters()) == ("load_patch" in scope)
    if heading == "Speed":
        assert scope["tokens"].shape == (1, 8)
    if heading == "How it works":
        assert scope["output"].shape == (1, 12, 100, 64)


def test_a_patched_checkpoint_computes_what_it_computed(in_a_folder_with_models):
    (call,) = re.findall(r"^`(NeuralGPT2LMHeadModel\.from_pretrained\(.*\))`", README, re.MULTILINE)
    model = eval(call)
    stock = GPT2LMHeadModel.from_pretrained("openai-community/gpt2").eval()
    inputs = stock.dummy_inputs["input_ids"] % stock.config.vocab_size
    difference = model.eval()(inputs).logits - stock(inputs).logits
    assert difference.abs().max() < 1e-5
    assert len([name for name, _ in model.named_parameters() if name.endswith("scorer.linear1.weight")]) == 2


def test_commands_and_files_that_documents_name_exist():
    for document in ("README.md", "recipes/README.md", "model_cards/README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"
        for name in re.findall(r"(?:recipes|model_cards|assets)/[\w./-]+\.(?:py|yaml|md|png)", text):
            assert (ROOT / name).exists(), f"{document} names {name}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in README
