"""What the page shows, without a browser; the page itself is tested in tests/clients/test_demo.py."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from transformers import (
    DeiTImageProcessorPil,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

import drawing
import looking
from hf_neural_attention import analysis, compact, patch, patch_status
from looking import Mistake, Opened
from tests.helpers.comparing import assert_same_state
from tests.helpers.demo_models import TEXT, make_models
from tests.helpers.packages import PINNED, pins
from visiting import BEFORE, DOT_PRODUCT, look_beside, status_of, visit_of


DEMO = Path(looking.__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_models(folder)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(models, monkeypatch):
    monkeypatch.chdir(models)


@pytest.fixture(scope="module")
def stock(models) -> Opened:
    return looking.open_model(str(models / "runs/quickstart/dot"))


@pytest.fixture(scope="module")
def neural(models) -> Opened:
    return looking.open_model(str(models / "runs/quickstart/neural"))


@pytest.fixture(scope="module")
def images(models) -> Opened:
    return looking.open_model(str(models / "runs/images/neural"))


def patched(opened: Opened, layers: str = "all", mode: str = "replace", steps: int = 0, **settings: Any) -> Opened:
    given: Any = {"proj_dim": 4, "per_head": False, **settings}
    return looking.patch_copy(opened, looking.read_text(opened, TEXT), layers, mode, calibration_steps=steps, **given)


def looked(opened: Opened) -> looking.Look:
    return looking.look(opened, looking.read_text(opened, TEXT))


def test_the_quick_start_comes_first():
    assert looking.local_models() == ["runs/quickstart/neural", "runs/quickstart/dot", "runs/images/neural"]


def damaged(folder: Path) -> str:
    shutil.copytree("runs/quickstart/dot", folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("", "Type a folder"),
        (" ", "Type a folder"),
        ("runs/quickstart", r"no config.json, so it holds no model. .* do: runs/quickstart/neural, runs/quickstart/dot\."),
        ("runs/quickstart/dot/config.json", "is a file; expected a folder"),
        ("runs/quickstart/nothing/there", "There is no folder runs/quickstart/nothing/there"),
        ("n" * 300, "cannot be looked up: File name too long"),
        ("../nowhere", r"There is no folder \.\./nowhere"),
        ("no/model", "no/model is neither a folder here nor a model that the Hub gives out, or the Hub cannot be reached"),
    ),
)
def test_wrong_names_get_a_sentence(name: str, words: str):
    with pytest.raises(Mistake, match=words):
        looking.open_model(name)


def test_wrong_folders_get_a_sentence(tmp_path):
    with pytest.raises(Mistake, match="damaged cannot be loaded: "):
        looking.open_model(damaged(tmp_path / "damaged"))
    ignored = shutil.ignore_patterns("*token*", "*vocab*", "merges*", "*processor*")
    shutil.copytree("runs/quickstart/dot", tmp_path / "bare", ignore=ignored)
    with pytest.raises(Mistake, match="bare has no tokenizer"):
        looking.open_model(str(tmp_path / "bare"))
    shutil.copytree("runs/images/neural", tmp_path / "blind", ignore=ignored)
    with pytest.raises(Mistake, match=r"The image processor of .*blind cannot be loaded: "):
        looking.open_model(str(tmp_path / "blind"))
    shutil.copytree("runs/quickstart/dot", tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "pickled/pytorch_model.bin").write_text("no weights")
    with pytest.raises(Mistake, match=r"The weights of .*pickled are damaged"):
        looking.open_model(str(tmp_path / "pickled"))
    sizes = {"vocab_size": 9, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(Mistake, match="t5 has an encoder and a decoder; this page shows models with one stack"):
        looking.open_model(str(tmp_path / "t5"))
    (tmp_path / "of nobody").mkdir()
    (tmp_path / "of nobody/config.json").write_text(json.dumps({"model_type": "nobody's"}))
    with pytest.raises(Mistake, match="of nobody cannot be loaded: "):
        looking.open_model(str(tmp_path / "of nobody"))


def test_models_that_were_opened_are_shared_until_they_change(tmp_path):
    name = str(shutil.copytree("runs/quickstart/dot", tmp_path / "dot"))
    opened = looking.open_model(name)
    assert looking.open_model(name) is opened
    opened.model.transformer.wte.weight.data.zero_()  # as nobody does here, to tell it apart
    saved = GPT2LMHeadModel.from_pretrained(name)
    saved.save_pretrained(name)
    again = looking.open_model(name)
    assert again is not opened and torch.equal(again.model.transformer.wte.weight, saved.transformer.wte.weight)


@pytest.mark.parametrize("fields", ({"num_labels": 1}, {"problem_type": "multi_label_classification"}), ids=("one", "several"))
def test_classifiers_whose_outputs_are_no_shares_predict_nothing(tmp_path, fields):
    config = GPT2Config.from_pretrained("runs/quickstart/dot", pad_token_id=0, **fields)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    GPT2Tokenizer.from_pretrained("runs/quickstart/dot").save_pretrained(tmp_path / "classifier")
    look = looked(looking.open_model(str(tmp_path / "classifier")))
    assert look.logits is None and not looking.predictions(look)


def test_attention_that_is_of_no_image_gets_a_sentence(images, monkeypatch):
    """As that of Swin, in windows of fewer patches than the image has."""
    example = visit_of(images, "", None).looked.example
    monkeypatch.setattr(analysis, "patch_grid", lambda *_: (8, 8))
    with pytest.raises(Mistake, match="runs/images/neural cannot be laid over an image: There are 17 tokens"):
        looking.look(images, example)


def test_each_map_lies_over_what_its_model_sees(images, tmp_path):
    shutil.copytree("runs/images/neural", tmp_path / "crops")
    sizes = {"size": {"height": 24, "width": 24}, "crop_size": {"height": 16, "width": 16}}
    DeiTImageProcessorPil(**sizes).save_pretrained(tmp_path / "crops")
    visit = look_beside(visit_of(images, "", None), str(tmp_path / "crops"))
    assert visit.beside.example.shown.size != visit.looked.example.shown.size
    _, own, other = drawing.draw_beside(visit.looked, visit.beside, 0, 0).axes
    for axis, look in ((own, visit.looked), (other, visit.beside)):
        assert axis.images[0].get_array().shape[:2] == look.example.shown.size[::-1]


def test_large_models_of_the_hub_are_refused(stock, monkeypatch):
    looking.check_size(looking.AutoModelForCausalLM, stock.model.config, "some/model")
    monkeypatch.setattr(looking, "MOST_PARAMETERS", 1000)
    with pytest.raises(Mistake, match=r"some/model has [\d,]+ parameters; this page takes up to 1,000"):
        looking.check_size(looking.AutoModelForCausalLM, stock.model.config, "some/model")


def test_texts_are_of_the_models_length(stock):
    assert "".join(looking.read_text(stock, TEXT).tokens) == TEXT
    with pytest.raises(Mistake, match="The text has 0 tokens; expected 2 to 64"):
        looking.read_text(stock, "")
    with pytest.raises(Mistake, match="The text has 65 tokens; expected 2 to 64"):
        looking.read_text(stock, "0" * 65)


def test_what_is_shown_is_what_the_model_does(neural):
    look = looked(neural)
    inputs = look.example.inputs
    assert look.scorers == ["replace", "dot product"] and list(look.dot_products) == list(look.seen) == [0]
    for weights, expected in zip(look.maps, analysis.attention_maps(neural.model, **inputs), strict=True):
        assert torch.equal(weights, expected[0])
    assert torch.equal(look.dot_products[0], analysis.dot_product_maps(neural.model, **inputs)[look.names[0]][0])
    assert look.health == analysis.scorer_health(neural.model, **inputs)
    assert look.surface(1, 0) is None and look.surface(0, 1).network.std() > 0
    (best, *_), shares = looking.predictions(look), neural.model(**inputs).logits.detach()[0, -1].softmax(-1)
    assert best.probability == pytest.approx(float(shares.max())) and len(looking.predictions(look)) == 5
    loss = neural.model(**inputs, labels=inputs["input_ids"]).loss
    assert looking.perplexity(look) == pytest.approx(float(loss.detach().exp()), rel=1e-4)
    assert "2 layers of 2 heads. Neural: layer 0 (mode `replace`, " in status_of(look)


def test_a_patch_leaves_the_model_as_it_was(stock):
    before = copy.deepcopy(stock.model)
    first = patched(stock, steps=50)
    assert_same_state(stock.model, before)
    assert_same_state(patched(stock, steps=50).model, first.model)
    assert not patch_status(stock.model) and len(patch_status(first.model)) == 2 and first.unpatched is stock
    again = patched(first, "0", "thin")  # starts from the stock model
    assert len(patch_status(again.model)) == 1 and again.unpatched is stock


def test_changes_of_a_patch(stock):
    before = looked(stock)
    residual = looked(patched(stock, mode="residual"))
    same = looking.changes(before, residual)
    assert max(same.layers) < 1e-5 and same.output < 1e-6
    shares = [prediction.probability for prediction in same.before]
    assert [prediction.probability for prediction in same.after] == pytest.approx(shares, rel=1e-4)
    assert drawing.change_words(same, residual).startswith("**Nothing changes**")
    drawn = looking.changes(before, looked(patched(stock)))
    fitted = looking.changes(before, looked(patched(stock, steps=100)))
    assert drawing.change_words(drawn, looked(patched(stock))).startswith(f"**{100 * max(drawn.layers):.2g} %** of attention")
    assert 0.02 < max(fitted.layers) < max(drawn.layers) < 1 and fitted.output < drawn.output
    assert drawn.perplexities[0] == looking.perplexity(before) != drawn.perplexities[1]
    second = looking.changes(before, looked(patched(stock, "1")))
    assert second.layers[0] == 0 and second.layers[1] > 0.02
    # computes by hand, of the first layer, in which queries and keys stay
    moved = (looked(patched(stock)).maps[0] - before.maps[0]).abs().sum(-1) / 2
    assert drawn.layers[0] == pytest.approx(float(moved.mean()))


@pytest.mark.parametrize(
    ("layers", "words"),
    (
        ("first", "The layers are 'first'; expected all, or numbers"),
        ("", "expected all, or numbers"),
        ("0, 7", "7 is no layer of"),
    ),
)
def test_wrong_layers_get_a_sentence(stock, layers: str, words: str):
    with pytest.raises(Mistake, match=words):
        patched(stock, layers)
    assert not patch_status(stock.model)


def test_a_neural_model_is_not_patched_again(neural):
    with pytest.raises(Mistake, match=r"has neural layers already\. Open a stock model"):
        patched(neural)


def test_what_stands_beside(stock, neural, images):
    visit = visit_of(neural, TEXT, None)
    assert visit.beside is None and visit.before is None
    other = look_beside(visit, "runs/quickstart/dot")
    assert other.beside.scorers == ["dot product"] * 2 and look_beside(other, DOT_PRODUCT).beside is None
    again = visit_of(neural, "binds the names", None, "runs/quickstart/dot", other)
    assert again.beside.opened is other.beside.opened and again.beside.example.tokens == again.looked.example.tokens
    with pytest.raises(Mistake, match=r"not patched here\. Patch a copy of it first"):
        look_beside(visit, BEFORE)
    with pytest.raises(Mistake, match="runs/images/neural takes images, unlike the model that is open"):
        look_beside(visit, "runs/images/neural")
    with pytest.raises(Mistake, match="There is no folder"):
        look_beside(visit, "no/such/model")
    changed = visit_of(patched(stock), TEXT, None, BEFORE)
    assert changed.beside is changed.before and changed.before.opened is stock
    assert "a patched copy" in status_of(changed.looked) and "by the dot product" in status_of(changed.before)
    pictures = look_beside(visit_of(images, "", None), "runs/images/neural")
    assert all(map(torch.equal, pictures.beside.maps, pictures.looked.maps))


def test_images_are_read(images, tmp_path):
    ramp = np.linspace(0, 65535, 24 * 20).reshape(20, 24).astype(np.uint16)
    PIL.Image.fromarray(ramp).save(tmp_path / "ramp.png")
    example = looking.read_image(images, tmp_path / "ramp.png")
    assert example.image.size == (24, 20) and np.asarray(example.image)[..., 0].std() > 60
    assert example.inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert visit_of(images, "", None).looked.example.shown.height == 512, "the photograph"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ramp.png").read_bytes()[:200])
    for name in ("text.png", "cut.png"):
        with pytest.raises(Mistake, match=f"^{name} is no image that can be read: ") as caught:
            looking.read_image(images, tmp_path / name)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(Mistake, match="Drop an image first"):
        looking.read_image(images, None)


def test_pictures(stock, neural, images, tmp_path):
    copies = [patched(stock), patched(stock, "0", "residual"), patched(stock, mode="thin", per_head=True)]
    folded = Opened(
        "compact", compact(patch(GPT2LMHeadModel.from_pretrained(stock.name), mode="replace")), stock.reader, "token"
    )
    visits = [visit_of(opened, TEXT, None) for opened in (stock, neural, images, *copies, folded)]
    for number, visit in enumerate(visits):
        look = visit.looked
        figures = [drawing.draw_beside(look, None, 0, 1), drawing.draw_beside(look, look, 1, 0), drawing.draw_all(look)]
        figures += [drawing.draw_surfaces(look, 0, 1), drawing.draw_health(look)]
        if visit.before is not None:
            change = looking.changes(visit.before, look)
            figures.append(drawing.draw_changes(visit.before, look, change, 0, 0))
            assert len(drawing.prediction_rows(change.before, change.after)) == 5 and drawing.change_words(change, look)
        assert drawing.health_words(look) and all(len(row) == 8 for row in drawing.health_rows(look))
        for figure in figures:
            if number in (1, 3):  # leaves it to two to become files, which takes time: a neural model and a patched copy
                figure.savefig(tmp_path / "figure.png")
                assert (tmp_path / "figure.png").stat().st_size > 4000
            else:
                figure.draw_without_rendering()
    words = [text.get_text() for axis in drawing.draw_beside(visits[0].looked, None, 0, 0).axes for text in axis.texts]
    assert words == ["This layer scores by the dot product itself."]


def test_maps_of_other_models_must_fit(neural, models, tmp_path):
    look = looked(neural)
    with pytest.raises(Mistake, match="has no head 3 in a layer 1"):
        drawing.of_other(look, look, 1, 3)
    other = looking.look(neural, looking.read_text(neural, "another text"))
    with pytest.raises(Mistake, match="cuts the input into other pieces"):
        drawing.of_other(look, other, 0, 0)


def test_the_folder_is_a_space():
    _, front, _ = (DEMO / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    needed = dict(re.findall(r"^([\w]+)(?:\[\w+\])?[=>]=([\d.]+)$", (DEMO / "requirements.txt").read_text(), re.MULTILINE))
    assert card["sdk"] == "gradio" and card["sdk_version"] == needed["gradio"] and (DEMO / card["app_file"]).exists()
    assert len(card["short_description"]) <= 60 and card["license"] == "apache-2.0"
    assert needed["torch"] == pins(PINNED)["torch"]
    own = {path.stem for path in DEMO.glob("*.py")}
    recipes = {path.stem for path in DEMO.parent.iterdir() if path.suffix in ("", ".py")} - own
    imported = {
        word for path in DEMO.glob("*.py") for word in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    }
    assert {"looking", "gradio"} <= imported and not imported & recipes, "a Space has this folder alone"
