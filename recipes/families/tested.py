"""Small models as Transformers tests them: with its tests' configurations and inputs, from a checkout of its source."""

import copy
import importlib
import inspect
import os
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def test_cases(family: str, tests: Path) -> Iterator[type[unittest.TestCase]]:
    """Test cases of a family that name classes of models.

    Args:
        family: a folder of `transformers.models`.
        tests: the folder `tests` of Transformers' source.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # or else some would wait for the Hub
    if str(tests.parent) != sys.path[0]:  # comes before any other package `tests`
        sys.path.insert(0, str(tests.parent))
    for path in sorted((tests / "models" / family).glob("test_modeling_*.py")):
        module = importlib.import_module(f"{tests.name}.models.{family}.{path.stem}")
        for _, case in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(case, unittest.TestCase)
                and case.__module__ == module.__name__
                and hasattr(case, "all_model_classes")
            ):
                yield case


def tested_models(family: str, tests: Path) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Any]]]:
    """Class, configuration and inputs of every model of a family that Transformers' tests build.

    Raises:
        RuntimeError: at the end, with the reasons for those test cases that gave none.
    """
    reasons, seen = [], set()
    for case in test_cases(family, tests):
        try:
            test = case()
            test.setUp()
            classes = getattr(test, "all_model_classes", None) or ()
            for wanted in classes if isinstance(classes, list | tuple) else (classes,):
                torch.manual_seed(0)
                config, inputs = test.model_tester.prepare_config_and_inputs_for_common()
                if wanted not in seen and isinstance(config, PreTrainedConfig):
                    seen.add(wanted)
                    yield wanted, copy.deepcopy(config), test._prepare_for_class(inputs, wanted)
        except Exception as error:  # noqa: BLE001, goes on, since a test case may ask for what is not installed
            reasons.append(f"{case.__name__}: {type(error).__name__}: {error}")
    if not seen:
        raise RuntimeError("; ".join(reasons) or "its tests have no model")
