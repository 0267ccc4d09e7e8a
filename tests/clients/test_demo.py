"""The page of recipes/demo in a real browser. `make test-clients` runs it in the page's own environment."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.helpers.browsing import browser, choose, open_page, running_page
from tests.helpers.demo_models import make_models


def missing() -> str | None:
    """What the tests need and do not find. Packages are looked up and not imported, since gradio takes seconds."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; it is in `.venv-demo`"
    return None if browser() else "there is no Chromium or Chrome on this machine"


# Skips test by test, since pytest calls it a failure where a run collects none
pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(missing() is not None, reason=missing() or "")]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("demo")
    make_models(folder)
    with running_page(folder) as address:
        yield address


@pytest.fixture
def tab(address) -> Iterator[Any]:
    """The page as it is at first, which must not ask for anything from elsewhere."""
    asked: list[str] = []
    with open_page(address, asked=asked) as tab:
        yield tab
    assert address in "".join(asked)
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def picture(tab: Any, name: str) -> str:
    """What a figure shows."""
    return tab.get_attribute(f"#{name} img", "src")


def wait_for_other(tab: Any, name: str, before: str) -> str:
    """What a figure shows once that is something else."""
    changed = "([name, before]) => (document.querySelector(`#${name} img`)?.src ?? before) != before"
    tab.wait_for_function(changed, arg=[name, before])
    return picture(tab, name)


def wait_for_text(tab: Any, name: str, words: str) -> None:
    tab.locator(f"#{name}", has_text=words).wait_for()


def show(tab: Any, name: str) -> None:
    tab.get_by_role("tab", name=name).click()


def test_pictures_change_with_what_is_chosen(tab):
    wait_for_text(tab, "status", "runs/quickstart/neural: NeuralGPT2LMHeadModel")
    first = picture(tab, "attention")
    tab.fill("#head input[type=number]", "1")
    tab.keyboard.press("Enter")
    second = wait_for_other(tab, "attention", first)
    tab.fill("#layer input[type=number]", "1")
    tab.keyboard.press("Enter")
    third = wait_for_other(tab, "attention", second)
    choose(tab, "#beside", "runs/quickstart/dot")
    fourth = wait_for_other(tab, "attention", third)
    tab.fill("#text textarea", "names binds statement")
    tab.click("#look")
    fifth = wait_for_other(tab, "attention", fourth)
    assert len({first, second, third, fourth, fifth}) == 5
    for name, figure in (
        ("All layers and heads", "everything"),
        ("Score surface", "surface"),
        ("Health of scorers", "health"),
    ):
        show(tab, name)
        tab.locator(f"#{figure} img").wait_for()
    wait_for_text(tab, "health-words", "alive")
    wait_for_text(tab, "health-rows", "transformer.h.0.attn")


def test_a_patch_made_and_taken_off(tab):
    choose(tab, "#model", "runs/quickstart/dot")
    tab.click("#open")
    wait_for_text(tab, "status", "All layers score by the dot product")
    stock = picture(tab, "attention")
    show(tab, "Patch it")
    tab.fill("#layers textarea, #layers input", "0")
    tab.click("#patch")
    wait_for_text(tab, "status", "Neural: layer 0 (mode replace")
    wait_for_text(tab, "changed-words", "% of attention is elsewhere")
    tab.locator("#changed img").wait_for()
    wait_for_text(tab, "changed-rows", "before")
    show(tab, "Attention")
    wait_for_other(tab, "attention", stock)
    show(tab, "Patch it")
    tab.click("#unpatch")
    wait_for_text(tab, "status", "All layers score by the dot product")
    tab.click("#unpatch")
    wait_for_text(tab, "message", "nothing to take off")
    show(tab, "Attention")
    assert picture(tab, "attention") == stock


def test_mistakes_get_a_sentence_and_lose_nothing(tab, tmp_path):
    before = picture(tab, "attention")
    choose(tab, "#model", "runs/nowhere")
    tab.click("#open")
    wait_for_text(tab, "message", "runs/nowhere is neither a folder here nor a model that the Hub gives out")
    tab.fill("#text textarea", "")
    tab.click("#look")
    wait_for_text(tab, "message", "The text has 0 tokens")
    show(tab, "Patch it")
    tab.click("#patch")
    wait_for_text(tab, "message", "runs/quickstart/neural has neural layers already")
    show(tab, "Attention")
    assert picture(tab, "attention") == before and "runs/quickstart/neural" in tab.inner_text("#status")


def test_images(tab, tmp_path):
    choose(tab, "#model", "runs/images/neural")
    tab.click("#open")
    wait_for_text(tab, "status", "NeuralViTForImageClassification")
    photograph = picture(tab, "attention")
    (tmp_path / "text.png").write_text("no image")
    tab.set_input_files("#image input[type=file]", tmp_path / "text.png")
    wait_for_text(tab, "message", "text.png is no image that can be read")
    assert picture(tab, "attention") == photograph
    tab.click("#image [aria-label=Clear], #image [aria-label='Remove this file'], #image [aria-label='Clear files']")
    ramp = np.linspace(0, 65535, 24 * 20).reshape(20, 24).astype(np.uint16)
    PIL.Image.fromarray(ramp).save(tmp_path / "ramp.png")
    tab.set_input_files("#image input[type=file]", tmp_path / "ramp.png")
    wait_for_other(tab, "attention", photograph)
    tab.locator("#message").wait_for(state="hidden")
    wait_for_text(tab, "predicted", "%")
