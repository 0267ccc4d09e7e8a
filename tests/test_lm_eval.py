"""lm-evaluation-harness evaluates an exported model, on a task of this test's own, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_neural_attention import export_to_hub
from tests.test_export import make


pytest.importorskip("lm_eval", reason="needs lm_eval (pip install '.[dev]')")

TASK = {
    "task": "rhymes",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rhymes.json"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{text}}",
    "doc_to_choice": ["a", "b", "c"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.slow
@pytest.mark.parametrize("trusted", (True, False), ids=("code from the folder", "package"))
def test_a_local_task(trusted: bool, tmp_path: Path):
    model, tokenizer = make("gpt2")
    export_to_hub(model, tmp_path / "model", tokenizer)
    rows = [{"text": "a b c a b", "answer": index % 3} for index in range(6)]
    (tmp_path / "rhymes.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rhymes.yaml").write_text(yaml.safe_dump(TASK))
    code = "import sys; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    if not trusted:
        code = f"import hf_neural_attention; {code}"
    arguments = f"pretrained=model,trust_remote_code={trusted},max_length=64"
    flags = ["--model", "hf", "--model_args", arguments, "--tasks", "rhymes", "--include_path", ".", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--batch_size", "2", "--output_path", "results"],
        cwd=tmp_path, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (path,) = (tmp_path / "results").rglob("results_*.json")
    assert 0.0 <= json.loads(path.read_text())["results"]["rhymes"]["acc,none"] <= 1.0
