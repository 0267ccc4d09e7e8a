"""TRL's trainers with patched models. They load their reference model by the name of the one that they train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_neural_attention import patch
from tests.helpers.stock_models import FAMILIES


trl = pytest.importorskip("trl", reason="needs the extra `clients`; `make test-clients` has it")

# Lets TRL call what Transformers has deprecated since
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

PROMPTS = ["some good text", "words that are read", "a b c", "quick brown fox"]
GOOD = [" yes indeed", " right", " sure thing", " of course"]
BAD = [" no", " never ever", " not at all", " hm"]
PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
RATED = {"prompt": PROMPTS * 2, "completion": GOOD + BAD, "label": [True] * 4 + [False] * 4}
FIRST_DPO_LOSS = 0.6931  # ln 2: policy and reference agree

families = pytest.mark.parametrize("family", ["gpt2", "llama"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of letters."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", " ", *map(chr, range(97, 123))]
    backend = Tokenizer(WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer) -> Path:
    """Of each family a stock checkpoint, and a patched one that was saved whole, as `FAMILY` and `FAMILY-patched`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("gpt2", "llama"):
        FAMILIES[name].model().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        patched(folder / name).save_pretrained(folder / f"{name}-patched")
        tokenizer.save_pretrained(folder / f"{name}-patched")
    return folder


def patched(checkpoint: Path, model_class: Any = AutoModelForCausalLM, **fields: Any) -> Any:
    model = model_class.from_pretrained(checkpoint, **fields)
    torch.manual_seed(0)
    return patch(model, "all", mode="replace")


def settings(config: type, folder: Path, **fields: Any) -> Any:
    common = {"max_steps": 1, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    return config(str(folder), per_device_train_batch_size=4, disable_tqdm=True, **common, **fields)


def first_log(trainer: Any) -> dict[str, float]:
    trainer.train()
    return trainer.state.log_history[0]


def dpo(model: Any, tokenizer: Any, folder: Path) -> Any:
    return trl.DPOTrainer(
        model, args=settings(trl.DPOConfig, folder), train_dataset=Dataset.from_dict(PAIRS), processing_class=tokenizer
    )


def kto(model: Any, tokenizer: Any, folder: Path) -> Any:
    return trl.KTOTrainer(
        model, args=settings(trl.KTOConfig, folder), train_dataset=Dataset.from_dict(RATED), processing_class=tokenizer
    )


def grpo(model: Any, tokenizer: Any, folder: Path) -> Any:
    def letters(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    return trl.GRPOTrainer(
        model,
        reward_funcs=letters,
        args=settings(trl.GRPOConfig, folder, num_generations=2, max_completion_length=6, beta=0.1),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )


trainers = pytest.mark.parametrize("trainer", [dpo, kto, grpo])


@trainers
@families
def test_no_reference_model_is_another_one_than_the_one_that_is_trained(trainer, family, checkpoints, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="in memory only: hf_neural_attention has changed this model since it was loaded"):
        trainer(patched(checkpoints / family), tokenizer, tmp_path)


@trainers
@families
@pytest.mark.parametrize("by_path", [True, False])
def test_patched_models_that_were_saved_whole_are_their_own_reference(
    by_path, family, trainer, checkpoints, tokenizer, tmp_path
):
    folder = str(checkpoints / f"{family}-patched")
    model = folder if by_path else AutoModelForCausalLM.from_pretrained(folder)
    log = first_log(trainer(model, tokenizer, tmp_path))
    if trainer is dpo:
        assert log["loss"] == pytest.approx(FIRST_DPO_LOSS, abs=1e-4)
    else:
        assert log["kl"] == pytest.approx(0.0, abs=1e-5)


def test_reward_models_train(checkpoints, tokenizer, tmp_path):
    model = patched(checkpoints / "llama", AutoModelForSequenceClassification, num_labels=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".scorer." in name}
    arguments = settings(trl.RewardConfig, tmp_path)
    log = first_log(
        trl.RewardTrainer(model, args=arguments, train_dataset=Dataset.from_dict(PAIRS), processing_class=tokenizer)
    )
    assert log["grad_norm"] > 0
    changed = [name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))]
    assert any(name.endswith("q_proj.weight") for name in changed)


@families
def test_packed_and_padding_free_batches_have_the_loss_of_padded_ones(family, checkpoints, tokenizer, tmp_path):
    losses = {}
    for name, fields in (
        ("padded", {}),
        ("padding-free", {"padding_free": True, "max_length": None}),
        ("packed", {"packing": True, "max_length": 48}),
    ):
        arguments = settings(trl.SFTConfig, tmp_path, per_device_eval_batch_size=16, **fields)
        data = Dataset.from_dict({"text": PROMPTS * 2})
        model = patched(checkpoints / family)
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
        losses[name] = trainer.evaluate()["eval_loss"]
        assert first_log(trainer)["grad_norm"] > 0
    assert losses["padding-free"] == pytest.approx(losses["padded"], rel=1e-5)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)
