"""Recipes train new models of any family: configs from flags, the same weights in both arms, and the next token's loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    MarianForCausalLM,
    Trainer,
    TrainingArguments,
)

import image_classification
import language_modeling
from hf_neural_attention import NeuralGPT2LMHeadModel, NeuralViTForImageClassification, patch_status
from tests.helpers.comparing import assert_same_state
from tests.helpers.running import run_in
from tests.helpers.stock_models import FAMILIES
from training.arms import Arm
from training.causal_models import loss_of_the_next_token, predicts_the_next_token
from training.experiment import share_weights
from training.neural_arguments import NeuralArguments
from training.new_models import check_one_source, family_note


TINY = {
    "language_modeling.py": (
        *("--vocab_size", 300, "--block_size", 16, "--n_embd", 16, "--n_layer", 2, "--n_head", 4, "--max_train_samples", 8),
        *("--max_eval_tokens", 60),
    ),
    "image_classification.py": (
        *("--image_size", 8, "--hidden_size", 16, "--num_hidden_layers", 2, "--num_attention_heads", 2),
        *("--max_train_samples", 16, "--max_eval_samples", 16),
    ),
}
STEPS = ("--max_steps", 2, "--report_to", "none", "--eval_strategy", "no", "--logging_steps", 1, "--disable_tqdm", True)
GROUPED = "num_key_value_heads=2"
POST_NORM = "do_layer_norm_before=false"


def load(recipe: str, folder: Path, *flags: Any) -> Any:
    """Experiment and task of a recipe with a tiny model, nothing trained."""
    module: Any = language_modeling if recipe == "language_modeling.py" else image_classification
    if module is language_modeling:
        (folder.parent / "text.txt").write_text("Some words of a text that is short.\n" * 200)
        flags = ("--dataset_name", folder.parent / "text.txt", *flags)
    words = (*TINY[recipe], *STEPS, "--use_cpu", True, "--output_dir", folder, "--neural_layers", "all", *flags)
    return module.load_experiment([str(word) for word in words])[:2]


@pytest.mark.parametrize(
    "recipe, model_type, overrides, name, sizes",
    (
        ("language_modeling.py", "llama", GROUPED, "LlamaForCausalLM", {"num_key_value_heads": 2, "intermediate_size": 64}),
        ("language_modeling.py", "marian", "scale_embedding=true", "MarianForCausalLM", {"decoder_ffn_dim": 64}),
        ("language_modeling.py", "opt", POST_NORM, "OPTForCausalLM", {"ffn_dim": 64, "do_layer_norm_before": False}),
        ("image_classification.py", "deit", "qkv_bias=false", "DeiTForImageClassification", {"qkv_bias": False}),
        ("image_classification.py", "dinov2", "mlp_ratio=2", "Dinov2ForImageClassification", {"mlp_ratio": 2}),
    ),
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_both_arms_of_a_family(recipe: str, model_type: str, overrides: str, name: str, sizes: dict, tmp_path: Path):
    experiment, task = load(recipe, tmp_path / "run", "--model_type", model_type, "--config_overrides", overrides)
    dot, neural = (experiment.initial_model(arm) for arm in (Arm.DOT, Arm.NEURAL))
    assert type(dot).__name__ == type(neural).__name__ == name and f"`{model_type}` (`{name}`)" in task.notes
    config = dot.config.to_dict()
    assert config["hidden_size" if "hidden_size" in config else "d_model"] == 16
    assert {field: config[field] for field in sizes} == sizes
    assert len(patch_status(neural)) == 2 and {layer.mode for layer in patch_status(neural)} == {"replace"}
    theirs, own = dot.state_dict(), neural.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.items())
    assert all(".scorer." in key for key in own.keys() - theirs.keys()) and len(own) > len(theirs)
    # saves it so that the Auto classes load it
    auto_class: Any = AutoModelForCausalLM if recipe == "language_modeling.py" else AutoModelForImageClassification
    neural.save_pretrained(tmp_path / "saved")
    loaded = auto_class.from_pretrained(tmp_path / "saved")
    assert_same_state(loaded, neural)
    assert type(loaded) is type(dot) and len(patch_status(loaded)) == 2
    # trains a decoder of an encoder-decoder to predict tokens, not to repeat them
    assert ("compute_loss_func" in experiment.trainer_arguments) == (model_type == "marian")
    if model_type == "marian":  # whose loss is the recipe's, which smooths nothing
        smoothing = ("--label_smoothing_factor", 0.1)
        with pytest.raises(SystemExit, match="--label_smoothing_factor: models of this family get the next token's loss"):
            load(recipe, tmp_path / "run", "--model_type", model_type, "--config_overrides", overrides, *smoothing)


def test_the_recipes_own_families_keep_their_classes(tmp_path: Path):
    GPT2Config(n_embd=8, n_layer=3, n_head=2, n_positions=64).save_pretrained(tmp_path / "config")
    flags: dict[str, tuple[Any, ...]] = {
        "plain": (),
        "named": ("--model_type", "gpt2", "--config_overrides", "n_head=2,activation_function=relu"),
        "from a config": ("--config_name", tmp_path / "config", "--config_overrides", "resid_pdrop=0.5"),
    }
    made = {name: load("language_modeling.py", tmp_path / "run", *words)[0] for name, words in flags.items()}
    models = {name: each.initial_model(Arm.NEURAL) for name, each in made.items()}
    assert all(type(model) is NeuralGPT2LMHeadModel for model in models.values())
    assert models["plain"].config.n_head == 4 and models["plain"].config.activation_function == "gelu_new"
    assert models["named"].config.n_head == 2 and models["named"].config.activation_function == "relu"
    config = models["from a config"].config
    assert (config.n_embd, config.n_layer, config.n_positions, config.vocab_size) == (
        8,
        3,
        64,
        models["plain"].config.vocab_size,
    )
    assert config.resid_pdrop == 0.5 and config.neural_layers == "all" and config.model_type == "neural_gpt2"
    assert (
        type(load("image_classification.py", tmp_path / "run")[0].initial_model(Arm.NEURAL)) is NeuralViTForImageClassification
    )


@pytest.mark.parametrize(
    "flags",
    (
        ("--neural_mode", "thin", "--neural_proj_dim", 4),
        ("--neural_mode", "residual"),
        ("--neural_per_head", True, "--neural_init", "paper"),
        ("--neural_hidden_dims", 6, 3, "--neural_proj_dim", 6),
    ),
    ids=("thin", "residual", "per head", "hidden layers"),
)
@pytest.mark.parametrize("from_a_config", (False, True), ids=("by type", "by config"))
def test_neural_options_go_to_patch(flags: tuple[Any, ...], from_a_config: bool, tmp_path: Path):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=99).save_pretrained(tmp_path / "config")
    family = ("--config_name", tmp_path / "config") if from_a_config else ("--model_type", "llama")
    heads = () if from_a_config else ("--config_overrides", GROUPED)
    model: Any = load("language_modeling.py", tmp_path / "run", *family, *heads, *flags)[0].initial_model(Arm.NEURAL)
    assert model.config.hidden_size == (24 if from_a_config else 16) and model.config.num_key_value_heads == 2
    scorers = [layer.self_attn.scorer for layer in model.model.layers]
    name, value = flags[0].removeprefix("--neural_"), flags[1]
    for scorer in scorers:
        if name == "mode":
            assert scorer.mode == value
        elif name == "per_head":
            assert scorer.num_heads == 4
        else:
            assert (scorer.linear2.in_features, scorer.linear2.out_features) == (6, 3)


def test_a_compact_arm_starts_as_the_whole_one(tmp_path: Path):
    flags = ("--model_type", "deit", "--neural_proj_dim", 4)
    whole, packed = (
        load("image_classification.py", tmp_path / "run", *flags, *more)[0].initial_model(Arm.NEURAL)
        for more in ((), ("--neural_compact", True))
    )
    pixels = torch.randn(2, 3, 8, 8)
    assert all(layer.compact for layer in patch_status(packed)) and len(patch_status(packed)) == 2
    assert torch.allclose(whole.eval()(pixels).logits, packed.eval()(pixels).logits, atol=1e-5)
    other = copy.deepcopy(packed)
    with torch.no_grad():
        other.classifier.weight.zero_()
    share_weights(other, load("image_classification.py", tmp_path / "run", *flags)[0].initial_model(Arm.DOT))
    assert_same_state(other, packed)


@pytest.mark.parametrize(
    "recipe, flags, message",
    (
        ("language_modeling.py", ("--model_type", "lama"), "--model_type lama is no model type"),
        ("language_modeling.py", ("--model_type", "neural_gpt2"), "has neural layers by itself. Name the stock one, gpt2"),
        ("language_modeling.py", ("--model_type", "deit"), "no model of type deit for this task"),
        ("language_modeling.py", ("--model_type", "mistral"), "4 heads cannot have keys and values in 8 "),
        ("language_modeling.py", ("--model_type", "bert"), "is no causal language model: .* is_decoder=true"),
        (
            "language_modeling.py",
            ("--model_type", "bloom"),
            "The neural model of type bloom cannot be built: .*cannot be reached",
        ),
        ("language_modeling.py", ("--model_type", "llama", "--neural_compact", True), "cannot be built: .*compact: .*rotary"),
        ("language_modeling.py", ("--model_type", "llama", "--neural_layers", 7), "cannot be built: .*7 is no layer"),
        ("language_modeling.py", ("--neural_proj_dim", 0), "The neural model of type gpt2 cannot be built: .*proj_dim"),
        ("language_modeling.py", ("--model_type", "llama", "--neural_layers", "none"), "--neural_layers none: "),
        ("language_modeling.py", ("--model_type", "llama", "--config_overrides", "n=2"), "llama have no field 'n'"),
        ("language_modeling.py", ("--config_overrides", "relu"), "expected name=value,name=value; 'relu' is no such pair"),
        ("language_modeling.py", ("--config_overrides", "n_layer=two"), "This config of type gpt2 cannot be made: .*n_layer"),
        ("language_modeling.py", ("--config_overrides", "vocab_size=9"), "9 embeddings, and the tokenizer [0-9]+ tokens"),
        ("language_modeling.py", ("--config_overrides", "n_positions=9"), "--block_size 16 is more than the 9 positions"),
        ("language_modeling.py", ("--n_head", 3), "width 16 cannot have 3 heads"),
        ("language_modeling.py", ("--config_overrides", "n_head=0"), "This config of type gpt2 cannot be made: .*zero"),
        ("language_modeling.py", ("--config_overrides", "dtype=bfloat16"), "cannot set dtype: --bf16 or --fp16 trains"),
        ("language_modeling.py", ("--config_overrides", "model_type=llama"), "cannot set model_type: --model_type names"),
        ("language_modeling.py", ("--model_type", "gemma4_text"), "type gemma4_text cannot be made"),
        (
            "language_modeling.py",
            ("--model_type", "roberta", "--config_overrides", "is_decoder=true"),
            "A model of type roberta fails on blocks of 16 tokens: TypeError.*by --config_overrides",
        ),
        (
            "language_modeling.py",
            ("--model_type", "roberta", "--config_overrides", "is_decoder=true,pad_token_id=1"),
            "A model of type roberta fails on blocks of 16 tokens: .*out of",
        ),
        (
            "image_classification.py",
            ("--config_overrides", "num_labels=3"),
            "num_labels is what the data and ",
        ),
        ("language_modeling.py", ("--config_name", "nowhere/at-all"), "--config_name nowhere/at-all is no config"),
        ("language_modeling.py", ("--model_type", "llama", "--config_name", "x"), "each say which model to train"),
        ("language_modeling.py", ("--score_spread", 0), "--score_spread 0 is attention without scores"),
        (
            "language_modeling.py",
            ("--score_spread", 1.0, "--attention", "all"),
            "--score_spread goes to every model, and --attention",
        ),
        (
            "image_classification.py",
            ("--model_type", "resnet"),
            "--hidden_size: configs of type resnet have none of the fields",
        ),
        (
            "image_classification.py",
            ("--model_type", "dinov2", "--intermediate_size", 8),
            "--intermediate_size: configs of type",
        ),
        ("image_classification.py", ("--config_overrides", "patch_size=3"), "--image_size 8 is no multiple of --patch_size 3"),
    ),
)
def test_what_does_not_fit_is_said_before_training(recipe: str, flags: tuple, message: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=message):
        load(recipe, tmp_path / "run", *flags)


def test_a_trained_checkpoint_has_a_config_of_its_own():
    arguments = language_modeling.ModelArguments(model_name_or_path="x", config_overrides="n_layer=2")
    with pytest.raises(SystemExit, match="--config_overrides changes new models, and --model_name_or_path x is trained"):
        check_one_source("x", arguments)


def marian_decoder() -> MarianForCausalLM:
    """Without dropout, so that its loss is the same in training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    return MarianForCausalLM(MarianConfig(**sizes, dropout=0.0, max_position_embeddings=32, is_decoder=True, pad_token_id=0))


def test_the_loss_is_that_of_the_next_token(tmp_path: Path):
    """Through Trainer, alone and accumulated: of families whose own loss it is, with it and without, and of a Marian decoder,
    whose own loss is of the same token."""
    rows = [
        {"input_ids": ids, "labels": ids} for ids in torch.randint(3, 98, (8, 9), generator=torch.Generator().manual_seed(0))
    ]
    for accumulated in (1, 2):
        for family in ("llama", "opt", "marian"):
            model = (marian_decoder() if family == "marian" else FAMILIES[family].model()).train()
            own = predicts_the_next_token(model, family)
            assert model.training and own == (family != "marian")
            tokens = torch.stack([row["labels"] for row in rows])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits
            expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:]).item()
            for more in ({}, {"compute_loss_func": loss_of_the_next_token})[not own :]:
                trained = copy.deepcopy(model)
                arguments = TrainingArguments(
                    str(tmp_path),
                    max_steps=1,
                    per_device_train_batch_size=8 // accumulated,
                    gradient_accumulation_steps=accumulated,
                    use_cpu=True,
                    report_to="none",
                    logging_steps=1,
                    max_grad_norm=0.0,
                )
                trainer = Trainer(trained, arguments, train_dataset=rows, **more)
                trainer.train()
                assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    alone = loss_of_the_next_token({"logits": logits}, labels)
    assert loss_of_the_next_token({"logits": logits}, labels, 16) == pytest.approx(alone.item() / 2)
    assert alone == pytest.approx(torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:]).item())


def test_cards_name_the_family():
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    note = family_note(AutoModelForCausalLM.from_config(config))
    assert note == "Family: `llama` (`LlamaForCausalLM`). Llama is pre-norm; the paper's own models are post-norm."
    assert family_note(FAMILIES["phi"].model()) == "Family: `phi` (`PhiForCausalLM`)."
    assert NeuralArguments().score_spread is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, flags",
    (
        ("language_modeling.py", ("--model_type", "llama", "--config_overrides", GROUPED)),
        ("language_modeling.py", ("--model_type", "marian", "--config_overrides", "scale_embedding=true")),
        ("image_classification.py", ("--model_type", "dinov2", "--score_spread", 1.0)),
    ),
    ids=("llama", "marian", "dinov2"),
)
def test_a_run_of_another_family_from_the_command_line(recipe: str, flags: tuple, tmp_path: Path):
    command = (*TINY[recipe], *STEPS, *flags, "--output_dir", "run", "--neural_layers", "all")
    printed = run_in(tmp_path, recipe, *command)
    assert "| of which scorers | 0 |" in printed and "timed by turns" in printed
    card = (tmp_path / "run/neural/README.md").read_text()
    assert f"Family: `{flags[1]}`" in card and "import hf_neural_attention  #" in card
    auto_class: Any = AutoModelForCausalLM if recipe == "language_modeling.py" else AutoModelForImageClassification
    assert len(patch_status(auto_class.from_pretrained(tmp_path / "run/neural"))) == 2
    assert run_in(tmp_path, recipe, *command).count("finished before") == 2
