"""These tests compare numbers as those of the models do, with the helpers in their folder."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
