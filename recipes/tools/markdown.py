"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_heading(names: Sequence[str]) -> str:
    """The names of the columns, and the line below them."""
    return f"{table_row(names)}\n{table_row(['---'] * len(names))}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([table_heading(header), *map(table_row, rows)])
