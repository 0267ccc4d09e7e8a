"""Small models as Transformers tests them: with its tests' configurations and inputs, from a checkout of its source."""

import copy
import importlib
import inspect
import re
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel

from families.patch_examination import in_a_line


# Lists what tests of models import, of Transformers' own: worth importing once, before processes are forked
SHARED = ("test_modeling_common", "causal_lm_tester", "generation.test_utils")


def import_from(tests: Path, name: str) -> Any:
    """A module in the folder `tests` of Transformers' source."""
    constants.HF_HUB_OFFLINE = True  # or else some would wait for the Hub, which has read the variable long ago
    if str(tests.parent) != sys.path[0]:  # comes before any other package `tests`
        sys.path.insert(0, str(tests.parent))
    return importlib.import_module(f"{tests.name}.{name}")


def cases_of(family: str, tests: Path) -> Iterator[type[unittest.TestCase]]:
    """Test cases of a family that name classes of models.

    Args:
        family: a folder of `transformers.models`.
        tests: the folder `tests` of Transformers' source.
    """
    for path in sorted((tests / "models" / family).glob("test_modeling_*.py")):
        module = import_from(tests, f"models.{family}.{path.stem}")
        for _, case in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(case, unittest.TestCase)
                and case.__module__ == module.__name__
                and hasattr(case, "all_model_classes")
            ):
                yield case


def version_of(tests: Path) -> str:
    """The version of Transformers that a folder of its tests belongs to; "unknown" if its source is not beside it."""
    path = tests.parent / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE) if path.exists() else None
    return found[1] if found else "unknown"


def models_as_tested(family: str, tests: Path) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """Models of a family that Transformers' tests build, one of each class, and inputs for them.

    Raises:
        RuntimeError: at the end, if there was none, with the reasons.
    """
    reasons, seen = [], set()
    for case in cases_of(family, tests):
        try:
            test: Any = case()
            test.setUp()
        except Exception as error:  # noqa: BLE001, goes on, since a test case may ask for what is not installed
            reasons.append(f"{case.__name__}: {in_a_line(error)}")
            continue
        classes = getattr(test, "all_model_classes", None) or ()
        for wanted in classes if isinstance(classes, list | tuple) else (classes,):
            if wanted in seen:
                continue
            try:
                torch.manual_seed(0)
                config, inputs = test.model_tester.prepare_config_and_inputs_for_common()
                found = wanted(copy.deepcopy(config)), test._prepare_for_class(inputs, wanted)
            except Exception as error:  # noqa: BLE001, goes on for the same reason
                reasons.append(f"{case.__name__}: {in_a_line(error)}")
            else:
                seen.add(wanted)
                yield found
    if not seen:
        raise RuntimeError("; ".join(dict.fromkeys(reasons)) or "they have no model of it")
