"""Pictures of trained models."""

import sys
from typing import Any

import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTImageProcessorPil

import look_inside
from hf_neural_attention import NeuralViTConfig, NeuralViTForImageClassification, patch


def look(monkeypatch: Any, *flags: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["look_inside.py", *map(str, flags)])
    look_inside.main()


def check_pictures(folder: Any) -> None:
    assert {path.name for path in folder.iterdir()} == {f"a-{name}.png" for name in look_inside.PICTURES}
    assert all(path.stat().st_size > 5000 for path in folder.iterdir())


def test_of_a_patched_language_model(tmp_path, monkeypatch, capsys):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "rose": 1, "is": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    patch(LlamaForCausalLM(LlamaConfig(**sizes)), [0], mode="replace").save_pretrained(tmp_path / "model")
    flags = ["--text", "rose is a rose is a rose", "--output", tmp_path / "pictures/a"]
    look(monkeypatch, tmp_path / "model", *flags)
    assert "model.layers.0.self_attn" in capsys.readouterr().out
    check_pictures(tmp_path / "pictures")
    with pytest.raises(SystemExit, match=r"has 1 token.s.; expected 2 to 2048"):
        look(monkeypatch, tmp_path / "model", "--text", "rose", *flags[2:])
    with pytest.raises(SystemExit, match=r"--head is 2; expected 0 to 1, which all neural layers have"):
        look(monkeypatch, tmp_path / "model", *flags, "--head", 2)
    with pytest.raises(SystemExit, match="nowhere"):
        look(monkeypatch, tmp_path / "nowhere", *flags)


@pytest.mark.parametrize("is_compact", (False, True), ids=("whole", "compact"))
def test_scorers_without_a_network_have_no_health(tmp_path, monkeypatch, is_compact):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {"neural_layers": "all", "neural_mode": "thin", "neural_compact": is_compact}
    config = NeuralViTConfig(**sizes, image_size=16, patch_size=4, **fields)
    NeuralViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    PIL.Image.fromarray(torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()).save(tmp_path / "i.png")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a-health.png").touch()  # of another model
    look(monkeypatch, tmp_path / "model", "--image", tmp_path / "i.png", "--output", tmp_path / "pictures/a")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "a-attention.png",
        "a-scores.png",
        "a-surface.png",
    ]


@pytest.mark.parametrize("is_compact", (False, True), ids=("whole", "compact"))
def test_of_an_image_classifier(tmp_path, monkeypatch, is_compact):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NeuralViTConfig(**sizes, image_size=16, patch_size=4, neural_layers="all", neural_compact=is_compact)
    NeuralViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    PIL.Image.fromarray(torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()).save(tmp_path / "i.png")
    look(monkeypatch, tmp_path / "model", "--image", tmp_path / "i.png", "--output", tmp_path / "pictures/a")
    check_pictures(tmp_path / "pictures")
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(SystemExit, match=r"--image .*no.png cannot be read: cannot identify image file"):
        look(monkeypatch, tmp_path / "model", "--image", tmp_path / "no.png", "--output", tmp_path / "pictures/a")
    (tmp_path / "cut.png").write_bytes((tmp_path / "i.png").read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"--image .*cut.png cannot be read: "):
        look(monkeypatch, tmp_path / "model", "--image", tmp_path / "cut.png", "--output", tmp_path / "pictures/a")
    with pytest.raises(SystemExit, match=r"--output .* cannot be written to: "):
        look(monkeypatch, tmp_path / "model", "--image", tmp_path / "i.png", "--output", tmp_path / "i.png/a")
    with pytest.raises(SystemExit, match=r"tokenizer"):
        look(monkeypatch, tmp_path / "model", "--text", "some text", "--output", tmp_path / "pictures/a")


def test_of_a_compact_model_without_a_dot_product(tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NeuralViTConfig(**sizes, image_size=16, patch_size=4, neural_layers=[1], neural_compact=True)
    NeuralViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    PIL.Image.fromarray(torch.arange(4096, dtype=torch.int32).view(64, 64).numpy().astype("uint16")).save(tmp_path / "i.png")
    look(monkeypatch, tmp_path / "model", "--image", tmp_path / "i.png", "--output", tmp_path / "pictures/a")
    check_pictures(tmp_path / "pictures")


def test_long_texts_and_many_heads_stay_within_bounds():
    figure = look_inside.draw_maps((torch.rand(1, 16, 100, 100),), ["a"] * 100)
    assert figure.get_size_inches().tolist() == [80.0, 5.0]
    assert "a" not in [label.get_text() for label in figure.axes[0].get_xticklabels()]
