"""These tests use the helpers of the models' tests, and a recipe, which are scripts side by side."""

import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "models"), str(ROOT / "recipes")]
