"""`transformers serve` on the loopback: a patched model's folder with this package imported, an exported one without it. The
tokens are those of `generate`."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils.import_utils import is_serve_available

from hf_neural_attention import compact, export_to_hub, patch
from tests.helpers.neural_models import liven
from tests.helpers.stock_models import FAMILIES


pytestmark = [
    pytest.mark.skipif(not is_serve_available(), reason="needs the extra `clients`; `make test-clients` has it"),
    pytest.mark.slow,
]

PROMPT, LENGTH = "some text", 12
CHAT = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of characters, 99 tokens; its chat template adds nothing."""
    characters = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    backend = Tokenizer(WordLevel({each: number for number, each in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


@contextmanager
def serving(folder: Path, *options: str, code: str = "", **environment: str) -> Iterator[str]:
    """A server in a process of its own, in a folder without sources, by the address that it listens to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = f"{code}\nfrom transformers.cli.transformers import app\napp()"
    flags = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *options]
    isolated = ["-S"] if "PYTHONPATH" in environment else []
    process = subprocess.Popen(
        [sys.executable, *isolated, "-c", run, *flags],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, process.stdout and process.stdout.read()[-3000:]
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except URLError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, **fields: Any) -> list[dict[str, Any]]:
    """The answers of a server, which are several where it streams."""
    kind = "chat/completions" if "messages" in fields else "completions"
    body = json.dumps({"max_tokens": LENGTH, "temperature": 0, **fields}).encode()
    with urlopen(Request(f"{address}/v1/{kind}", body, {"Content-Type": "application/json"}), timeout=200) as answer:
        text = answer.read().decode()
    if not fields.get("stream"):
        return [json.loads(text)]
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def check_answers(address: str, folder: Path, expected: str) -> None:
    (completed,) = ask(address, model=str(folder), prompt=PROMPT)
    assert completed["choices"][0]["text"] == expected
    (said,) = ask(address, model=str(folder), messages=CHAT)
    assert said["choices"][0]["message"]["content"] == expected
    streamed = ask(address, model=str(folder), messages=CHAT, stream=True)
    pieces = [choice["delta"].get("content") or "" for part in streamed for choice in part["choices"]]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 1
    streamed = ask(address, model=str(folder), prompt=PROMPT, stream=True)
    assert "".join(choice["text"] for part in streamed for choice in part["choices"]) == expected


def generated(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(tokens.unique()) > 3
    return tokenizer.decode(tokens, skip_special_tokens=True)


def patched(name: str, **settings: Any) -> Any:
    return liven(patch(FAMILIES[name].model(), "all", **settings))


@pytest.mark.parametrize("options", ((), ("--continuous-batching",)), ids=("one by one", "continuous batching"))
def test_patched_models(options: tuple[str, ...], tokenizer: Any, tmp_path: Path):
    models = {
        "gpt2": patched("gpt2", mode="replace"),
        "llama": patched("llama", mode="residual"),
        "mistral": patched("mistral", mode="replace", per_head=True),
        "compact": compact(patched("gpt2", mode="replace", hidden_dims=(4, 2))),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with serving(tmp_path, *options, code="import hf_neural_attention") as address:
        for name, model in models.items():
            check_answers(address, tmp_path / name, generated(model, tokenizer))


@pytest.mark.parametrize("options", ((), ("--continuous-batching",)), ids=("one by one", "continuous batching"))
def test_exported_models_without_this_package(options: tuple[str, ...], tokenizer: Any, tmp_path: Path):
    models = {"gpt2": patched("gpt2", mode="replace"), "llama": patched("llama", mode="replace", per_head=True)}
    models["compact"] = compact(patched("gpt2", mode="replace", hidden_dims=(4, 2)))
    for name, model in models.items():
        export_to_hub(model, tmp_path / name, tokenizer)
    # leaves out this package alone, whose source is no part of site-packages
    code = 'import importlib.util\nassert importlib.util.find_spec("hf_neural_attention") is None'
    paths = os.pathsep.join(path for path in sys.path if path.endswith("site-packages")) or sysconfig.get_path("purelib")
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": paths}
    with serving(tmp_path, "--trust-remote-code", *options, code=code, **modules) as address:
        for name, model in models.items():
            with torch.no_grad():
                check_answers(address, tmp_path / name, generated(model, tokenizer))
