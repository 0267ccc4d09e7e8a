"""lm-evaluation-harness gives an exported model's own log-likelihoods, on a task of this test's own, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_neural_attention import export_to_hub
from tests.helpers.neural_models import liven
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


def log_likelihood(model, tokenizer, text: str, choice: str) -> float:
    """Of the choice after the text and a space, as the harness asks for it."""
    start = len(tokenizer(text).input_ids)
    ids = torch.tensor([tokenizer(f"{text} {choice}").input_ids])
    with torch.no_grad():
        scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return scores.gather(1, ids[0, start:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("trusted", (True, False), ids=("code from the folder", "package"))
def test_a_local_task(trusted: bool, tmp_path: Path):
    model, tokenizer = make("gpt2")
    liven(model).eval()
    export_to_hub(model, tmp_path / "model", tokenizer)
    rows = [
        {"text": text, "answer": index % 3}
        for index, text in enumerate(("a b c a b", "c c", "b a b a b", "a", "c b a c b", "b b"))
    ]
    (tmp_path / "rhymes.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rhymes.yaml").write_text(yaml.safe_dump(TASK))
    code = "import sys; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    if not trusted:
        code = f"import hf_neural_attention; {code}"
    arguments = f"pretrained=model,trust_remote_code={trusted},max_length=64"
    flags = ["--model", "hf", "--model_args", arguments, "--tasks", "rhymes", "--include_path", ".", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--batch_size", "2", "--output_path", "results", "--log_samples"],
        cwd=tmp_path, env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    expected = [[log_likelihood(model, tokenizer, row["text"], choice) for choice in TASK["doc_to_choice"]] for row in rows]
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    found = {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
    for index, choices in enumerate(expected):
        assert [float(response[0][0]) for response in found[index]["resps"]] == pytest.approx(choices, abs=1e-4)
    right = [max(range(3), key=choices.__getitem__) == row["answer"] for choices, row in zip(expected, rows, strict=True)]
    (path,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["rhymes"]["acc,none"] == pytest.approx(sum(right) / len(right))
