"""The page of recipes/demo in a process of its own, and a browser that is on the machine to look at it.

    python -m tests.helpers.browsing FOLDER assets/demo.png

takes the README's picture of the page, FOLDER being where `make quickstart` has left its models.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS_TO_START = 300  # what imports libraries on a busy machine
MILLISECONDS_TO_SHOW = 120_000


def browser() -> str | None:
    """Path of a browser that playwright can drive, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def free_port() -> int:
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        return open_socket.getsockname()[1]


@contextmanager
def running_page(folder: Path) -> Iterator[str]:
    """The address of the page, run in a folder from a copy of recipes/demo that is alone there, as in a Space."""
    port = free_port()
    with tempfile.TemporaryDirectory() as alone:
        shutil.copytree(ROOT / "recipes" / "demo", alone, dirs_exist_ok=True)
        log = Path(alone, "log.txt")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(alone, "app.py")), "--port", str(port)]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(2 * SECONDS_TO_START):
                if process.poll() is not None or "Running on" in log.read_text():
                    break
                time.sleep(0.5)
            assert "Running on" in log.read_text(), log.read_text()[-3000:]
            yield f"http://127.0.0.1:{port}"
            assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def open_page(address: str, *, height: int = 1000, asked: list[str] | None = None) -> Iterator[Any]:
    """A tab of a browser in which the first picture is there; `asked` gets whatever addresses it asks for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser(), headless=True, args=["--no-sandbox"])
        try:
            tab = started.new_page(viewport={"width": 1400, "height": height})
            if asked is not None:
                tab.on("request", lambda request: asked.append(request.url))
            tab.set_default_timeout(MILLISECONDS_TO_SHOW)
            tab.goto(address)
            tab.wait_for_selector("#attention img")
            yield tab
        finally:
            started.close()


def choose(tab: Any, box: str, value: str) -> None:
    """Types a value into a box with choices."""
    tab.fill(f"{box} input", value)
    tab.keyboard.press("Enter")


def take_picture(folder: Path, path: Path) -> None:
    """Of the quick start's neural model, beside the one with the dot product."""
    from PIL import Image

    with running_page(folder) as address, open_page(address, height=868) as tab:
        before = tab.get_attribute("#attention img", "src")
        choose(tab, "#beside", "runs/quickstart/dot")
        tab.wait_for_function("before => document.querySelector('#attention img').src != before", arg=before)
        tab.wait_for_timeout(1000)
        tab.mouse.move(0, 0)
        tab.screenshot(path=path)
    with Image.open(path) as image:
        small = image.convert("RGB").resize((1050, round(image.height * 1050 / image.width)), Image.Resampling.LANCZOS)
    small.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
