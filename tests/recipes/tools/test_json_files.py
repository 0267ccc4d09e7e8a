"""JSON files are there whole, whatever happens meanwhile."""

import json
from pathlib import Path

import pytest

from tools.json_files import write_json


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_json(file, {"a": 1})

    def fail(self, text, **options):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
