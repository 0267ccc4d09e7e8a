"""Shared by all tests: no network, libraries' caches elsewhere, and what torch and Transformers are to drop is an error."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # leaves workers what the process that starts them has, and removes at its end
    CACHES = tempfile.TemporaryDirectory(prefix="hf_neural_attention-tests-", ignore_cleanup_errors=True)
    os.environ["HF_DATASETS_CACHE"] = os.path.join(CACHES.name, "datasets")
    os.environ["HF_METRICS_CACHE"] = os.path.join(CACHES.name, "metrics")
    os.environ["HF_MODULES_CACHE"] = os.path.join(CACHES.name, "modules")

import logging
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-deprecations",
        action="store_true",
        help="deprecations are no errors: for old versions, whose libraries call what other libraries have since deprecated",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--allow-deprecations"):
        for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
            config.addinivalue_line("filterwarnings", f"default::{category}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what `torch.empty` and its kin allocate, in Python and in C++, with NaN: uninitialised results show."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


class DeprecationLog(logging.Handler):
    """Transformers announces most deprecations in its log, not as warnings."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_logged_deprecation(pytestconfig: pytest.Config):
    handler = DeprecationLog()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    allowed = pytestconfig.getoption("--allow-deprecations")
    assert allowed or not handler.messages, f"Transformers deprecates what this test did: {handler.messages}"
