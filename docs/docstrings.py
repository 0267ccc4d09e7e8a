"""Extension of Griffe: reads this package's docstrings as people read them in the source.

- An entry for several arguments (`repo_id, token: for the upload.`) counts for each of them.
- Types stand without the marks of Markdown, which the pages show as they are.
- The fields of a named tuple are documented by the comments behind them.
"""

import re
from typing import Any

from griffe import Class, Extension, Object


# Takes along the lines that go on, which are further in
SEVERAL = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<rest>(?: \(.*?\))?: .*(?:\n(?P=indent) +.*)*)$", re.MULTILINE
)
TYPE = re.compile(r"^ +\w+ \(.*?\): ", re.MULTILINE)
RETURNED_TYPE = re.compile(r"(?<=^Returns:\n)    `[^:\n]*(?=: )", re.MULTILINE)
COMMENT = re.compile(r"#\s*(.+)$")
# Stands in for the text that a field needs to be listed
NOTHING = "&#8203;"


def one_by_one(entry: re.Match[str]) -> str:
    return "\n".join(f"{entry['indent']}{name}{entry['rest']}" for name in entry["names"].split(", "))


def without_marks(found: re.Match[str]) -> str:
    return re.sub(r"[`*]", "", found[0])


def fields_of(named_tuple: Class) -> str:
    """The section of a docstring that Griffe reads, of all fields."""
    lines = ["", "", "Attributes:"]
    for name, field in named_tuple.attributes.items():
        comment = COMMENT.search(field.source)
        lines.append(f"    {name}: {comment[1] if comment else NOTHING}")
    return "\n".join(lines)


class Docstrings(Extension):
    """Is loaded by mkdocs.yml."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = SEVERAL.sub(one_by_one, obj.docstring.value)
            obj.docstring.value = RETURNED_TYPE.sub(without_marks, TYPE.sub(without_marks, text))

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        if "NamedTuple" in map(str, cls.bases) and cls.docstring is not None:
            cls.docstring.value += fields_of(cls)
