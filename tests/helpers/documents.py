"""Finds the code that documents and docstrings show."""

import re
from textwrap import dedent


# Matches whole blocks of code, so that a comment in one is no heading
PIECE = re.compile(r"^#+ (?P<heading>[^\n]+)$|^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"^>>> ?", re.MULTILINE)


def python_blocks(text: str) -> list[tuple[str, str]]:
    """Heading above it, and code, of each block of Python in a Markdown text; without the prompts that it may have."""
    heading, found = "", []
    for piece in PIECE.finditer(text):
        heading = piece["heading"] or heading
        if piece["language"] == "python":
            found.append((heading, PROMPT.sub("", dedent(piece["code"]))))
    return found
