"""Clients that load the folder of a patched model by themselves, once this package is imported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from hf_neural_attention import patch, patch_status
from tests.helpers.stock_models import FAMILIES


BERT = FAMILIES["bert"]
TEXTS = ["some good text", "words that are read"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A patched BERT that was saved whole, with a tokenizer of letters."""
    where = tmp_path_factory.mktemp("bert")
    letters = ["<pad>", "<unk>", "<mask>", " ", *map(chr, range(97, 123))]
    backend = Tokenizer(WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(where)
    patch(BERT.model(), "all", mode="replace", proj_dim=4).save_pretrained(where)
    return where


def test_sentence_transformers(folder: Path, tmp_path: Path):
    library = pytest.importorskip("sentence_transformers", reason="needs the extra `clients`; `make test-clients` has it")
    embedder = library.SentenceTransformer(str(folder), device="cpu")
    assert len(patch_status(embedder)) == 3
    embedded = embedder.encode(TEXTS, convert_to_tensor=True)
    inputs = embedder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    assert torch.allclose(embedded, (hidden * mask).sum(1) / mask.sum(1), atol=1e-5)
    embedder.save(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), embedded)


def test_pipeline(folder: Path):
    run: Any = pipeline("fill-mask", str(folder), device="cpu")
    assert len(patch_status(run.model)) == 3
    guesses = run("some <mask>ood text", top_k=3)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    inputs = run.tokenizer("some <mask>ood text", return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits[inputs["input_ids"] == run.tokenizer.mask_token_id].softmax(-1)
    assert [guess["token"] for guess in guesses] == scores.topk(3).indices[0].tolist()


def test_the_best_model_is_loaded_at_the_end(folder: Path, tmp_path: Path):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    rows = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True,
        learning_rate=0.5, use_cpu=True, report_to="none", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    expected = AutoModelForMaskedLM.from_pretrained(best).state_dict()
    assert any(".scorer." in name for name in expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
