"""These tests use the helpers of the models' and the patching tests, which are scripts side by side."""

import sys
from pathlib import Path


TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "patching")]
