"""Formulas as GitHub's Markdown writes them, turned into MathML when the site is built: it needs no script to be shown."""

import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


INLINE = r"\$`([^`]+)`\$"
# Comes before code spans, whose priority is 190
PRIORITY = 195


def mathml(latex: str, display: str) -> str:
    """MathML of a formula.

    Args:
        display: "inline" or "block".

    Raises:
        ValueError: if a command is not known here; it would be shown as it is written.
    """
    # renames this one, which latex2mathml knows by its other name
    converted = convert(latex.replace("{aligned}", "{split}"), display=display)
    if "\\" in converted or "&<" in converted:
        raise ValueError(f"latex2mathml does not know all commands of this formula; write it with others: {latex}")
    return converted


def fenced_math(source: str, *args: Any, **kwargs: Any) -> str:
    """Formatter of pymdownx.superfences for blocks of the language `math`."""
    return f'<div class="math">{mathml(source, "block")}</div>'


class InlineMath(InlineProcessor):
    """A formula within a line: $`...`$."""

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[ElementTree.Element | str, int, int]:
        return self.md.htmlStash.store(mathml(match[1], "inline")), match.start(0), match.end(0)


class MathMLExtension(Extension):
    """Python-Markdown extension for formulas within lines."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(InlineMath(INLINE, md), "math", PRIORITY)
