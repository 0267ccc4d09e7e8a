"""What SECURITY.md promises of the sources and of repositories with code."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_neural_attention
from hf_neural_attention import export_to_hub
from tests.helpers.neural_models import GPT2


ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "hf_neural_attention").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]

# lists modules that unpickle, and functions that run or unpickle what they are given
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FUNCTIONS = {"eval", "exec", "compile", "torch.load", "torch.hub.load", "np.load", "numpy.load", "os.system", "os.popen"}
FUNCTIONS |= {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}


def findings(source: str) -> Iterator[str]:
    """What SECURITY.md says that the sources do not do."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FUNCTIONS:
                yield f"calls {called}"
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "shell", "allow_pickle"):
                    yield f"sets {keyword.arg}"


def test_the_search_itself_works():
    lines = ["import pickle, os", "from joblib import load", "torch.load(f)", "run(c, shell=True)", "eval('1')"]
    assert sorted(findings("\n".join([*lines, "x.y(trust_remote_code=True)"]))) == [
        "calls eval",
        "calls torch.load",
        "imports joblib",
        "imports pickle",
        "sets shell",
        "sets trust_remote_code",
    ]
    assert len(SOURCES) > 50


def test_sources_run_and_unpickle_nothing():
    found = {file.relative_to(ROOT).as_posix(): list(findings(file.read_text(encoding="utf-8"))) for file in SOURCES}
    assert not {file: lines for file, lines in found.items() if lines}


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """An exported folder whose code leaves a mark when it is run; and where."""
    folder, mark = tmp_path / "hostile", tmp_path / "mark"
    export_to_hub(GPT2.neural(), folder)
    files = list(folder.glob("*.py"))
    assert len(files) > 5
    for file in files:
        file.write_text(f"open({str(mark)!r}, 'w').close()\n" + file.read_text())
    return folder, mark


def test_code_in_a_repository_is_not_run_where_the_package_is(hostile):
    folder, mark = hostile
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is hf_neural_attention.NeuralGPT2LMHeadModel and not mark.exists()


LOAD = """
import os, sys
sys.modules["hf_neural_attention"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM

folder, mark = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("it was loaded without trust")
assert not os.path.exists(mark)
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""


def test_code_in_a_repository_runs_where_it_is_trusted_only(hostile):
    folder, mark = hostile
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(mark)],
        env=os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert mark.exists(), "a mark that nothing can leave would prove nothing"
