"""JSON files that a killed run leaves whole."""

import json
import platform
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes in one step, so that a killed run leaves the old file or the new one, even if several machines write the same."""
    draft = path.with_name(f"{path.name}.{platform.node()}.draft")
    draft.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    draft.replace(path)
