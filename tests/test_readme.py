"""What the README and the pages of docs/ tell people to type works as it stands there, and what they link to exists."""

import ast
import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, ViTImageProcessorPil

import hf_neural_attention
from hf_neural_attention import (
    NeuralGPT2Config,
    NeuralGPT2LMHeadModel,
    NeuralViTConfig,
    NeuralViTForImageClassification,
    analysis,
    from_pretrained,
    patch_status,
)
from tests.helpers.documents import python_blocks
from tests.helpers.versions import CACHE


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


# Lists page, heading and code of each block
BLOCKS = [(page, *block) for page, text in {"README": README, **GUIDES}.items() for block in python_blocks(text)]
# Lists code in the docstring of each public name; it may use a `model` and its `inputs`
EXAMPLES = {
    name: [code for _, code in python_blocks(inspect.getdoc(getattr(hf_neural_attention, name)) or "")]
    for name in hf_neural_attention.__all__
}
EXAMPLES = {name: examples for name, examples in EXAMPLES.items() if examples}
# Leaves out what differs in nothing: cards of models of the same kind have the same code
CARDS_CODE = sorted({code for path in (ROOT / "model_cards").rglob("*.md") for _, code in python_blocks(path.read_text())})
# Marks exports as slow, since one takes more than ten seconds
CASES = [
    pytest.param(*block, id=", ".join(block[:2]), marks=[pytest.mark.slow] if "exporters" in block[2] else [])
    for block in BLOCKS
]


@pytest.fixture
def in_a_folder_with_models(tmp_path, monkeypatch):
    """The folders that the blocks load: what `make quickstart` leaves, small models in the places of others, and a picture."""
    monkeypatch.chdir(tmp_path)
    texts = ["The import statement binds names."] * 3
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size=270)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    NeuralGPT2LMHeadModel(NeuralGPT2Config(**sizes)).save_pretrained("runs/quickstart/neural")
    tokenizer.save_pretrained("runs/quickstart/neural")
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained("openai-community/gpt2")
    tokenizer.save_pretrained("openai-community/gpt2")
    small = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    NeuralViTForImageClassification(NeuralViTConfig(**small)).save_pretrained("runs/images/neural")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained("runs/images/neural")
    Image.new("RGB", (8, 8)).save("image.png")


def run(code: str, where: str, scope: dict | None = None) -> dict:
    """Runs code as written, and returns the names that it binds."""
    scope = {} if scope is None else scope
    exec(compile(code, where, "exec"), scope)
    return scope


def check(page: str, heading: str, scope: dict, printed: str) -> None:
    """What a block is there to show."""
    match page, heading:
        case "README" | "patching", "Patch a model" | "How do I patch a model that I have?":
            assert "transformer.h.1.attn" in printed
            assert not any("scorer" in name for name, _ in scope["model"].named_parameters())
        case "patching", "How do I replace the dot product without losing what the model knows?":
            assert any("scorer" in name for name, _ in scope["model"].named_parameters())
        case "patching", "How do I use peft with it?":
            trained = [name for name, each in scope["model"].named_parameters() if each.requires_grad and "scorer" in name]
            loaded = (AutoPeftModelForCausalLM.from_pretrained("runs/adapter"), from_pretrained("runs/merged"))
            assert trained and all(map(patch_status, loaded))
        case "compact-form", _:
            assert "would be compact" in printed and scope["model"].transformer.h[1].attn.c_attn.nf < 3 * 32
        case "README", "Train a model":
            assert Path("runs/readme/model/config.json").exists()
        case "training", "Try it in a few minutes":
            assert printed.startswith("The import statement")
        case "training", "Train with `Trainer`" if "output" in scope:
            assert scope["output"].shape == (1, 12, 100, 64)
        case "speed-and-backends", "How much smaller is the cache?":
            assert scope["tokens"].shape == (1, 8) and isinstance(scope["cache"], hf_neural_attention.NeuralCache)
        case "looking-inside", "Watch scorers while they train":
            assert any(name.endswith("attn/score_std") for name in scope["trainer"].state.log_history[0])


def test_every_page_with_code_is_found():
    pages = {page for page, _, _ in BLOCKS}
    named = {
        "how-scorers-start",
        "looking-inside",
        "patching",
        "publishing-and-export",
        "speed-and-backends",
        "training",
        "versions",
    }
    assert pages == {"README", "compact-form", *named}
    assert len(BLOCKS) == sum(text.count("```python") for text in (README, *GUIDES.values()))


# Ignores what torch has deprecated, since Transformers' exporters use it, as in test_export_formats.py
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("page", "heading", "code"), CASES)
def test_the_blocks_run_as_written(page, heading, code, in_a_folder_with_models, capsys):
    scope = run(code, f"{page}, {heading}")
    check(page, heading, scope, capsys.readouterr().out)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_docstrings_run(name, in_a_folder_with_models):
    model = NeuralGPT2LMHeadModel.from_pretrained("runs/quickstart/neural")
    scope = {"model": model, "inputs": model.dummy_inputs, name: getattr(hf_neural_attention, name)}
    for example in EXAMPLES[name]:
        # builds large models without their weights, which take seconds
        with torch.device("meta") if name.endswith("Config") else nullcontext():
            run(example.replace("past_key_values=", f"{CACHE}="), name, scope)
    assert name != "NeuralCache" or scope["tokens"].shape[1] > 20


@pytest.mark.parametrize("code", CARDS_CODE, ids=lambda code: "images" if "image-classification" in code else "text")
def test_the_code_of_cards_runs(code, in_a_folder_with_models, capsys):
    is_image = "image-classification" in code
    run(code.replace("FOLDER", f"runs/{'images' if is_image else 'quickstart'}/neural"), "card")
    said = "'score': " if is_image else "The" if "AutoTokenizer" in code else "tensor("  # of tokens without words, in recall's
    assert said in capsys.readouterr().out


def test_a_patched_checkpoint_computes_what_it_computed(in_a_folder_with_models):
    (call,) = re.findall(r"^`(NeuralGPT2LMHeadModel\.from_pretrained\(.*\))`", GUIDES["patching"], re.MULTILINE)
    model = eval(call)
    stock = GPT2LMHeadModel.from_pretrained("openai-community/gpt2").eval()
    inputs = stock.dummy_inputs["input_ids"] % stock.config.vocab_size
    difference = model.eval()(inputs).logits - stock(inputs).logits
    assert difference.abs().max() < 1e-5
    assert len([name for name, _ in model.named_parameters() if name.endswith("scorer.linear1.weight")]) == 2


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def anchors_of(text: str) -> set[str]:
    """Names by which GitHub, and the site, refer to headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_commands_and_files_that_documents_name_exist():
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
    documents += [ROOT / "hf_neural_attention/ops/README.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        text = document.read_text()
        name = document.relative_to(ROOT)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            file = document.parent / target if target else document
            assert file.exists(), f"{name} links to {target}"
            assert not anchor or anchor in anchors_of(file.read_text()), f"{name} links to {target}#{anchor}"
        for file in re.findall(r"\b(?:recipes|model_cards|assets|tests|docs)/[\w./-]+\.(?:py|yaml|md|png|css)\b", text):
            assert (ROOT / file).exists(), f"{name} names {file}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_the_readme_leads_to_every_guide():
    assert set(re.findall(r"\]\(docs/([\w-]+)\.md\)", README)) == GUIDES.keys()


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    literals = []
    for path in (path for folder in ("hf_neural_attention", "recipes") for path in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        literals += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    # adds what Transformers reads there and puts into its own error
    literals += [path.read_text() for path in (ROOT / "hf_neural_attention").rglob("*.json")]
    quotes = re.findall(r"^> .*(?:\n> .*)*", GUIDES["troubleshooting"], re.MULTILINE)
    assert len(quotes) > 15
    for quote in quotes:
        text = re.sub(r"\n> ", " ", quote.removeprefix("> "))
        for part in filter(None, re.split(r"\s*…\s*", text)):
            assert any(part in literal for literal in literals), part


def test_every_public_name_has_its_place_in_the_reference():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    places = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(set(places)) == len(places)
    wanted = {f"hf_neural_attention.{name}" for name in hf_neural_attention.__all__ if name != "__version__"}
    wanted |= {f"hf_neural_attention.analysis.{name}" for name in analysis.__all__}
    assert wanted <= set(places)
