"""Tries every model family of the installed Transformers: patches a small model, runs it, and unpatches it.

    python recipes/list_patchable_families.py --tests transformers/tests --output model_cards/families/patchable_families

A family is a folder of `transformers.models`. Its model is random: as Transformers tests it, with the configuration and inputs
of its tests (`--tests` names their folder, in a checkout of Transformers' source), and of its classes that with the most
attention layers; else with two layers and the sizes of its default configuration shrunk by the names of its fields. Tried are
all self-attention layers: in mode "residual" the outputs must be the stock model's (to the bit under eager attention), in mode
"replace" others, and once unpatched the stock model's again.
"""

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from families.examining import examine, in_a_line, num_attention_layers
from families.shrinking import families, shrunk_models
from families.tested import tested_models
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment


TIME_LIMIT = 600  # seconds for a family


def small_models(name: str, model_types: list[str], tests: Path | None) -> Iterator[tuple[str, PreTrainedModel, Any]]:
    """Small models of a family with where they come from, and inputs or None, the likeliest first.

    Raises:
        RuntimeError: at the end, with the reasons for those that cannot be built.
    """
    reasons = []
    if tests is not None:
        try:
            models = [(wanted(config), inputs) for wanted, config, inputs in tested_models(name, tests)]
        except Exception as error:  # noqa: BLE001, goes on, since a test may ask for what is not there
            reasons.append(f"tests: {in_a_line(error)}")
        else:
            for model, inputs in sorted(models, key=lambda pair: -num_attention_layers(pair[0])):
                yield "tests", model, inputs
    try:
        for model in shrunk_models(model_types):
            yield "shrunk", model, None
    except RuntimeError as error:
        reasons.append(str(error))
    raise RuntimeError("; ".join(reasons))


def try_family(name: str, model_types: list[str], tests: Path | None) -> dict[str, Any]:
    """The first clear result of its models; none is clear that no attention layer takes part in."""
    reasons, without = [], None
    try:
        for source, model, inputs in small_models(name, model_types, tests):
            try:
                result = {**examine(model, inputs), "configuration": source}
            except Exception as error:  # noqa: BLE001, goes on, since the next model of the family may do better
                reasons.append(f"{type(model).__name__}: {in_a_line(error)}")
                continue
            if result["status"] != "no interface":
                return result
            without = without or result
    except RuntimeError as error:
        reasons = reasons or [str(error)]
    return without or {"status": "not tried", "reason": "; ".join(dict.fromkeys(reasons))}


def try_in_time(known: dict[str, list[str]], tests: Path | None, name: str) -> tuple[str, dict[str, Any]]:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # passes what catches exceptions

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT)
    try:
        return name, try_family(name, known[name], tests)
    except KeyboardInterrupt:
        return name, {"status": "not tried", "reason": f"took more than {TIME_LIMIT} seconds"}
    finally:
        signal.alarm(0)


def markdown(record: dict[str, Any]) -> str:
    results = record["families"]
    counts = Counter(result["status"] for result in results.values())
    sources = Counter(result.get("configuration") for result in results.values())
    meanings = {
        "works": "all self-attention layers",
        "works with inputs": "all self-attention layers, if `example_inputs` are given",
        "refused": "by `patch`, for a reason that a user is told as well",
        "fails": "patched, but not as it should be",
        "no interface": "its attention does not fetch its function from Transformers' `AttentionInterface`",
        "not tried": "no small model of it could be built and run here; `patch` may well work",
    }
    lines = [
        "# Which model families can be patched",
        "",
        inspect.cleandoc(__doc__ or "").split("\n\n")[-1].replace("\n", " "),
        f"{sources['tests']} models were as tested, {sources['shrunk']} shrunk.",
        "",
        f"Made by `{record['command']}` with Transformers {record['environment']['transformers']} and torch "
        f"{record['environment']['torch']}.",
        "",
        markdown_table(
            ["", "families", ""], [[name, str(counts[name]), text] for name, text in meanings.items() if counts[name]]
        ),
        "",
        markdown_table(
            ["family", "result", "model", "layers patched, of all attention layers", ""], starmap(cells, results.items())
        ),
        "",
    ]
    return "\n".join(lines)


def cells(name: str, result: dict[str, Any]) -> list[str]:
    """A family's row of the table."""
    layers = f"{result['patched_layers']} of {result['attention_layers']}" if "patched_layers" in result else ""
    reason = (result.get("reason") or ", ".join(f"`{stack}`" for stack in result["stacks"])).replace("|", "\\|")
    return [name, result["status"], result.get("class", ""), layers, reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="Try only these; the results of the others stay as they are.")
    parser.add_argument("--tests", type=Path, help="The folder `tests` of Transformers' source. Default: shrink all.")
    parser.add_argument(
        "--output", type=Path, help="Write NAME.md and NAME.json, e.g. model_cards/families/patchable_families."
    )
    parser.add_argument("--resume", action="store_true", help="Leave out the families that the output has already.")
    parser.add_argument("--processes", type=int, default=1, help="How many families to try at a time. Default: 1.")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.processes))

    known = families()
    if unknown := set(arguments.families) - known.keys():
        parser.error(f"no such families: {', '.join(sorted(unknown))}")
    if arguments.tests is not None and not (arguments.tests / "models").is_dir():
        parser.error(
            f"--tests {arguments.tests} has no folder `models`: it must be the folder `tests` of Transformers' source."
        )
    path = arguments.output.with_suffix(".json") if arguments.output else None
    kept = path is not None and path.exists() and (arguments.families or arguments.resume)
    results = json.loads(path.read_text(encoding="utf-8"))["families"] if path and kept else {}
    wanted = [name for name in arguments.families or known if not (arguments.resume and name in results)]
    attempt = partial(try_in_time, known, arguments.tests and arguments.tests.resolve())
    with multiprocessing.get_context("fork").Pool(arguments.processes, maxtasksperchild=20) as pool:
        for name, result in pool.imap_unordered(attempt, wanted):
            results[name] = result
            print(f"{name}: {result['status']} {result.get('reason', '')}", flush=True)
            if path:  # writes each time, so that a run that is stopped can go on with the other families
                left_out = {*known, "--resume"}
                command = " ".join(word for word in command_line().split() if word not in left_out)
                record = {"command": command, "environment": environment(), "families": dict(sorted(results.items()))}
                write_json(path, record)
                path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(Counter(result["status"] for result in results.values()))


if __name__ == "__main__":
    main()
