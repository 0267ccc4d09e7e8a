"""Private interfaces of other libraries: each is listed with its reason, and is still where it was."""

import ast
import importlib
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module

import hf_neural_attention
from hf_neural_attention.private_interfaces import PRIVATE_INTERFACES, PrivateInterface


PACKAGE = Path(hf_neural_attention.__file__).parent
# lists names public despite the underscore: of named tuples and ctypes, what `evaluate` asks a metric for, an unnamed function
PUBLIC = {"_", "_asdict", "_fields", "_replace", "_fields_", "_info", "_compute"}
OWN = {"_neural_cache", "_neural_stored"}


def private_names() -> dict[str, str]:
    """Names with a leading underscore that sources use of something else's, and where."""
    found: dict[str, str] = {}
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "private_interfaces.py"}:
        tree = ast.parse(path.read_text())
        endings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.FunctionDef):  # overrides one
                names = [node.name]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in endings:  # of `getattr`
                names = [node.value] if re.fullmatch(r"_[a-z]\w+", node.value) else []
            elif isinstance(node, ast.ImportFrom) and re.search(r"(^|\.)_[a-z]", node.module or ""):
                names = [str(node.module)]
            for name in names:
                if re.search(r"(^|\.)_(?!_)", name) and name not in PUBLIC | OWN:
                    found[name] = f"{path.relative_to(PACKAGE)}:{node.lineno}"
    return found


UNDERSCORE = re.compile(r"(^|\.)_(?!_)")


def test_every_private_name_is_listed():
    names = {interface.name for interface in PRIVATE_INTERFACES}
    listed = {name for name in names if UNDERSCORE.search(name)} | {PrivateInterface.__name__}
    used = private_names()
    unlisted = {name: place for name, place in used.items() if name not in listed}
    assert not unlisted, f"list these in hf_neural_attention/private_interfaces.py, or do without them: {unlisted}"
    assert listed - used.keys() == {PrivateInterface.__name__}, "what is not used any more is listed no more"
    sources = "".join(path.read_text() for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "private_interfaces.py"})
    assert [name for name in names - listed if name not in sources] == []


@pytest.mark.parametrize("interface", PRIVATE_INTERFACES, ids=lambda interface: interface.name)
def test_it_is_where_it_was(interface: PrivateInterface):
    assert interface.why.endswith(".") and interface.seen
    if not interface.place:
        return
    module, _, path = interface.place.partition(":")
    library = module.partition(".")[0]
    moved = (
        f"{library} {version(library)} has no {interface.place.replace(':', '.')}, which hf_neural_attention rests on "
        f"({interface.why} Seen in {interface.seen}.). Find what took its place, use that in the sources, and bring "
        "hf_neural_attention/private_interfaces.py up to date."
    )
    try:
        place = importlib.import_module(module)
        for name in filter(None, path.split(".")):
            place = getattr(place, name.removesuffix("()"))
            place = place() if name.endswith("()") else place
    except (ImportError, AttributeError):
        pytest.fail(moved)


def test_those_of_instances_are_there():
    layer = add_hook_to_module(torch.nn.Linear(1, 1), ModelHook())
    product = torch.ones(1, requires_grad=True) * torch.ones(1)
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    found = {"_hf_hook": layer, "_old_forward": layer, "_saved_other": product.grad_fn, "_is_hf_initialized": model.ln_f}
    found |= {'sys.modules["transformers"]': None, "ds_": None}  # tests of DeepSpeed look at its own: tests/clients
    assert found.keys() == {interface.name for interface in PRIVATE_INTERFACES if not interface.place}
    assert all(each is None or hasattr(each, name) for name, each in found.items()), found
    assert sys.modules["transformers"].GPT2Model is transformers.GPT2Model


def test_a_moved_one_fails_with_a_sentence():
    gone = PrivateInterface("_gone", "transformers:PreTrainedModel._gone", "It was there.", "transformers 5.18")
    with pytest.raises(pytest.fail.Exception, match=r"has no transformers\.PreTrainedModel\._gone, which hf_neural_attention"):
        test_it_is_where_it_was(gone)
