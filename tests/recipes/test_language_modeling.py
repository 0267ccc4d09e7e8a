"""The text recipe from the command line to a model that loads and generates."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

import hf_neural_attention
from language_modeling import ModelArguments, build_model, check_fit
from tests.helpers.running import run_in
from training.arms import Arm
from training.checkpoints import load_checkpoint_config
from training.model_families import GPT2, VIT
from training.neural_arguments import NeuralArguments
from training.text import TextArguments, load_text, load_tokenizer
from training.text_task import generate_sample


TINY = (
    *("--vocab_size", 300, "--block_size", 32, "--n_embd", 16, "--n_layer", 2, "--n_head", 2, "--max_train_samples", 16),
    *("--max_eval_tokens", 200, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--eval_strategy", "steps"),
    *("--eval_steps", 2, "--report_to", "none", "--per_device_train_batch_size", 4),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of both arms, and what it printed."""
    folder = tmp_path_factory.mktemp("language_modeling")
    return folder / "run", run_in(folder, "language_modeling.py", *TINY, "--output_dir", "run", "--card", "cards/model")


@pytest.mark.slow
def test_both_arms_end_as_models_with_cards_a_table_and_pictures(trained):
    folder, printed = trained
    assert "| test perplexity per token (windows of 32, stride 16) |" in printed and "Sample: " in printed
    for arm in ("dot", "neural"):
        for file in ("model.safetensors", "tokenizer.json", "results.json", "README.md", "sample.txt", "comparison.png"):
            assert (folder / arm / file).stat().st_size > 0, file
    assert (folder.parent / "cards/model.md").exists() and (folder.parent / "cards/model.png").exists()
    record = json.loads((folder.parent / "cards/model.json").read_text())
    figures = [record["results"][arm]["metrics"] for arm in ("dot", "neural")]
    assert figures[0].keys() == figures[1].keys() and figures[0] != figures[1]
    assert record["command"].startswith("python") and record["environment"]["torch"]


@pytest.mark.slow
def test_the_trained_model_loads_and_generates(trained):
    folder = trained[0] / "neural"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is hf_neural_attention.NeuralGPT2LMHeadModel and model.config.use_cache
    assert type(AutoModelForCausalLM.from_pretrained(trained[0] / "dot")).__name__ == "GPT2LMHeadModel"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("The import", max_new_tokens=3)[0]["generated_text"]
    assert text.startswith("The import") and len(text) > len("The import")


@pytest.mark.slow
def test_the_same_command_goes_on_and_another_is_refused(trained, run_recipe):
    folder = trained[0]
    printed = run_recipe("language_modeling.py", *TINY, "--output_dir", folder)
    assert printed.count("finished before") == 2 and "| test perplexity per token" in printed
    refused = run_recipe("language_modeling.py", *TINY, "--output_dir", folder, "--seed", 7, fails=True)
    assert "holds another run" in refused and "seed: 42 there, 7 now" in refused


@pytest.mark.slow
def test_a_stock_checkpoint_is_fine_tuned(trained, run_recipe):
    flags = ("--model_name_or_path", trained[0] / "dot", "--attention", "neural", "--neural_mode", "residual")
    printed = run_recipe("language_modeling.py", *TINY, *flags, "--output_dir", "tuned")
    assert "| test perplexity per token" in printed and "nothing is compared" in printed


@pytest.mark.slow
def test_a_compact_arm_is_trained_from_scratch_and_from_a_stock_checkpoint(trained, tmp_path):
    compact = ("--neural_compact", "True", "--neural_layers", "all", "--neural_hidden_dims", 4, 2)
    start = ("--model_name_or_path", trained[0] / "dot")
    for more in ((), start):
        run_in(tmp_path, "language_modeling.py", *TINY, *compact, *more, "--output_dir", f"run{len(more)}", "--card", "card")
        dot, neural = (json.loads((tmp_path / f"run{len(more)}/{arm}/results.json").read_text()) for arm in ("dot", "neural"))
        assert neural["parameters"] < dot["parameters"] and neural["memory_footprint"] < dot["memory_footprint"]
        assert neural["cache_bytes_per_token"] / dot["cache_bytes_per_token"] == (4 + 8) / (8 + 8)
        assert "| bytes of a stock cache per token | 256 | 192 | 0.750 |" in (tmp_path / "card.md").read_text()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"run{len(more)}/neural")
        assert model.config.neural_compact and len(neural["scorer_health"]["end"]) == 2
    # goes on from a compact model, which shares no weights with a stock one
    further = ("--model_name_or_path", tmp_path / "run0/neural", "--attention", "neural", "--learning_rate", 0.0)
    run_in(tmp_path, "language_modeling.py", *TINY, *further, "--output_dir", "further")
    states = [load_file(tmp_path / name / "neural/model.safetensors") for name in ("run0", "further")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "license:" not in (tmp_path / "further/neural/README.md").read_text()  # is for whoever made the checkpoint to say


@pytest.mark.slow
def test_errors_reach_the_user_without_a_traceback(run_recipe):
    refused = run_recipe("language_modeling.py", *TINY, "--dataset_name", "./nowhere", "--output_dir", "run", fails=True)
    assert "There is no file or folder ./nowhere" in refused


def test_text_tokenizer_and_model_that_do_not_fit_are_refused(tmp_path):
    arguments = TextArguments(vocab_size=300, block_size=32)
    tokenizer = load_tokenizer(arguments, None, load_text(arguments))
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    for vocabulary in (300, 290):
        GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)).save_pretrained(tmp_path / str(vocabulary))
    fitting = ModelArguments(model_name_or_path=str(tmp_path / "300"))
    assert check_fit(fitting, arguments, NeuralArguments(), tokenizer) == 32
    with pytest.raises(SystemExit, match="--block_size 64 is more than the 32 positions"):
        check_fit(fitting, TextArguments(block_size=64), NeuralArguments(), tokenizer)
    with pytest.raises(SystemExit, match=r"The tokenizer has 300 tokens and .* embeddings for 290"):
        check_fit(ModelArguments(model_name_or_path=str(tmp_path / "290")), arguments, NeuralArguments(), tokenizer)
    for stride in (0, 33):
        with pytest.raises(ValueError, match=f"--stride {stride} must be from 1 to --block_size, 32 tokens"):
            TextArguments(block_size=32, stride=stride)


def test_a_prompt_longer_than_the_model_is_cut(tmp_path, capsys):
    arguments = TextArguments(vocab_size=300)
    tokenizer = load_tokenizer(arguments, None, load_text(arguments))
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    generate_sample(model, tmp_path, tokenizer, "a very long prompt " * 20, seed=0)
    assert (tmp_path / "sample.txt").read_text().startswith("a very")
    torch.nn.init.constant_(model.transformer.ln_f.weight, torch.nan)  # has diverged, and its figures are to be kept
    assert generate_sample(model, tmp_path, tokenizer, "a prompt", seed=0).startswith("It generates no text: probability")


def test_a_neural_checkpoint_keeps_its_fields_and_starts_no_dot_product(tmp_path):
    sizes = {
        "vocab_size": 300,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    fields = {"neural_layers": "all", "neural_mode": "residual", "neural_proj_dim": 3}
    hf_neural_attention.NeuralGPT2LMHeadModel(hf_neural_attention.NeuralGPT2Config(**sizes, **fields)).save_pretrained(
        tmp_path
    )
    model = ModelArguments(model_name_or_path=str(tmp_path))
    built = build_model(Arm.NEURAL, model, NeuralArguments(attention="neural"), TextArguments(), None)
    assert {name: getattr(built.config, name) for name in fields} == fields
    with pytest.raises(SystemExit, match="was trained with Neural Attention: no dot-product model can start from it"):
        load_checkpoint_config(str(tmp_path), GPT2, NeuralArguments(attention="both"))
    with pytest.raises(SystemExit, match="is a model of type neural_gpt2; this recipe trains vit"):
        load_checkpoint_config(str(tmp_path), VIT, NeuralArguments())
    with pytest.raises(SystemExit, match="is no checkpoint"):
        load_checkpoint_config(str(tmp_path / "nowhere"), GPT2, NeuralArguments())
