"""Tries every model family of the installed Transformers: patches a small model, runs it, and unpatches it.

    python recipes/list_patchable_families.py --tests transformers/tests --output model_cards/families/patchable_families

A family is a folder of `transformers.models`. Its models are random: as Transformers tests them, with the configurations and
inputs of its tests (`--tests` names their folder, in a checkout of Transformers' source), that with the most attention layers
first, until one works; else with two layers, and the sizes of its default configuration shrunk by the names of its fields.
Tried are all self-attention layers: in mode "residual" the outputs must be the stock model's (to the bit under eager
attention, but for sinks and for layers that stay under sdpa then), in mode "replace" others, and once unpatched the stock
model's again.
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

from families.patch_examination import BOOLEAN, ZEROS, examine, in_a_line, num_attention_layers
from families.small_models import families, shrunk_models
from families.transformers_test_models import SHARED, import_from, models_as_tested, version_of
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment


DIED = "its process died"

MEANINGS = {
    "works": "all self-attention layers",
    "works with inputs": "all self-attention layers, if `example_inputs=` are given",
    "in part": "some of its classes; others are refused",
    "refused": "by `patch`, for a reason that a user is told as well",
    "fails": "patched, but not as it should be",
    "no interface": "its attention does not fetch its function from Transformers' `AttentionInterface`",
    "not tried": "no small model of it could be built and run here; `patch` may well work",
}


def tested_first(name: str, tests: Path | None, reasons: list[str]) -> Iterator[tuple[PreTrainedModel, Any]]:
    """Models as tested, with their inputs, those with the most attention layers first; or the reason why there is none."""
    if tests is None:
        return
    try:
        models = list(models_as_tested(name, tests))
    except Exception as error:  # noqa: BLE001, goes on, since a test may ask for what is not there
        reasons.append(f"its tests: {in_a_line(error)}")
    else:
        yield from sorted(models, key=lambda pair: -num_attention_layers(pair[0]))


def try_family(name: str, model_types: list[str], tests: Path | None) -> dict[str, Any]:
    """What becomes of its models: the first one that works, but for what others say that were tried before it."""
    reasons: list[str] = []
    results = []
    for models, source in ((tested_first(name, tests, reasons), "tests"), (shrunk_models(model_types), "shrunk")):
        result = examined(models, source, reasons)
        if result and result["status"] != "no interface":
            return result
        results.append(result)
    return results[0] or results[1] or not_tried("; ".join(dict.fromkeys(reasons)))


def not_tried(reason: str) -> dict[str, Any]:
    return {"status": "not tried", "reason": reason}


def examined(models: Iterator[tuple[PreTrainedModel, Any]], source: str, reasons: list[str]) -> dict[str, Any] | None:
    """The result of the first model that works, or else of the first that has one. None if no result is clear, and then
    `reasons` get why. That a model has no attention layer is none if another one has."""
    results: list[dict[str, Any]] = []
    unclear = False
    try:
        for model, inputs in models:
            try:
                results.append({**examine(model, inputs), "configuration": source})
            except Exception as error:  # noqa: BLE001, goes on, since the next model of the family may do better
                reasons.append(f"{type(model).__name__}: {in_a_line(error)}")
                unclear = unclear or num_attention_layers(model) > 0
                continue
            if results[-1]["status"] in ("works", "works with inputs", "fails"):
                break
    except RuntimeError as error:
        reasons.append(str(error))
    with_layers = [result for result in results if result["status"] != "no interface"]
    if not with_layers:
        return None if unclear or not results else results[0]
    first, last = with_layers[0], with_layers[-1]
    if last["status"] == "fails" or first is last:
        return last
    return (
        first
        if last["status"] == "refused"
        else {**last, "status": "in part", "reason": f"{first['class']}: {first['reason']}"}
    )


def try_in_time(known: dict[str, list[str]], tests: Path | None, limit: int, name: str) -> tuple[str, dict[str, Any]]:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # passes what catches exceptions

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        return name, try_family(name, known[name], tests)
    except KeyboardInterrupt:
        return name, not_tried(f"took more than {limit} seconds of the processor")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def try_all(
    wanted: list[str], known: dict[str, list[str]], tests: Path | None, limit: int, processes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of families as they come. Each family has a process of its own, since some take much memory."""
    left = set(wanted)
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        results = pool.imap_unordered(partial(try_in_time, known, tests, limit), wanted)
        while left:
            try:
                name, result = results.next(timeout=10 * limit)
            except multiprocessing.TimeoutError:
                yield from ((name, not_tried(DIED)) for name in left)
                return
            left.remove(name)
            yield name, result


def markdown(record: dict[str, Any]) -> str:
    results = record["families"]
    counts = Counter(result["status"] for result in results.values())
    sources = Counter(result.get("configuration") for result in results.values())
    padding, boolean = (sum(key in result for result in results.values()) for key in (ZEROS, BOOLEAN))
    lines = [
        "# Which model families can be patched",
        "",
        inspect.cleandoc(__doc__ or "").split("\n\n")[-1].replace("\n", " "),
        f"{sources['tests']} models were as tested (by Transformers {record['tests']}), {sources['shrunk']} shrunk. In "
        f"{padding} families there are tokens that may attend to nothing, padding most of all: they get zeros, where stock "
        f"attention gives them the mean of all values. {boolean} hand eager attention a boolean mask, which stock "
        "functions add to the scores as 0 and 1, so that it masks nothing. Patched layers honour it, as both do under sdpa. "
        "All others are equal.",
        "",
        f"Made by `{record['command']}` with Transformers {record['environment']['transformers']} and torch "
        f"{record['environment']['torch']}.{record.get('note', '')}",
        "",
        markdown_table(
            ["", "families", ""], [[name, str(counts[name]), text] for name, text in MEANINGS.items() if counts[name]]
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


def how_tried(record: dict[str, Any]) -> str:
    """What results hang on, and must have in common to stand in one table."""
    where = record["environment"]
    return f"Transformers {where['transformers']} (tests: {record['tests']}), torch {where['torch']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="Try only these; the results of the others stay as they are.")
    parser.add_argument("--tests", type=Path, help="The folder `tests` of Transformers' source. Default: shrink all.")
    parser.add_argument(
        "--output", type=Path, help="Write NAME.md and NAME.json, e.g. model_cards/families/patchable_families."
    )
    parser.add_argument("--resume", action="store_true", help="Leave out the families that the output has.")
    parser.add_argument("--seconds", type=int, default=60, help="Time of the processor for a family. Default: 60.")
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
    path = Path(f"{arguments.output}.json") if arguments.output else None
    kept = path is not None and path.exists() and (arguments.families or arguments.resume)
    before = json.loads(path.read_text(encoding="utf-8")) if path and kept else {}
    results = before.get("families", {})
    done = {name for name, result in results.items() if result.get("reason") != DIED} if arguments.resume else set()
    wanted = [name for name in arguments.families or known if name not in done]
    tests = arguments.tests and arguments.tests.resolve()
    for name in SHARED if tests else ():
        import_from(tests, name)
    command = " ".join(word for word in command_line().split() if word not in {*known, "--resume"})
    record: dict[str, Any] = {"command": command, "environment": environment(), "families": results}
    record["tests"] = version_of(tests) if tests else "none"
    if before and (old := how_tried(before)) != (new := how_tried(record)):
        parser.error(
            f"{path} has families that were tried with {old}; this would be with {new}. Take another --output, or try all."
        )
    for name, result in try_all(wanted, known, tests, arguments.seconds, arguments.processes):
        results[name] = result
        print(f"{name}: {result['status']} {result.get('reason', '')}", flush=True)
        if path:  # writes each time, so that a run that is stopped can go on with the other families
            record["families"] = dict(sorted(results.items()))
            write_json(path, record)
            Path(f"{arguments.output}.md").write_text(markdown(record), encoding="utf-8")
    print(Counter(result["status"] for result in results.values()))


if __name__ == "__main__":
    main()
