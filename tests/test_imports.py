"""Modules of the package do not import each other in a circle."""

import ast
from pathlib import Path

import hf_neural_attention


PACKAGE = Path(hf_neural_attention.__file__).parent


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, whether at once, later or for type checkers only."""
    here = ["hf_neural_attention", *path.relative_to(PACKAGE).with_suffix("").parts]
    package = here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_import_goes_round_in_a_circle():
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    # leaves out the package itself, which imports them all and is looked up by name where its public names are wanted
    edges = {name: (imports_of(path) & names.keys()) - {"hf_neural_attention"} for name, path in names.items()}
    left = dict(edges)
    while ends := [name for name, used in left.items() if not used & left.keys()]:
        for name in ends:
            del left[name]
    assert not left, f"these import each other, or are imported by such: {sorted(left)}"
    assert "hf_neural_attention.ops" in edges["hf_neural_attention.models.neural_attention_backends"], "the search works"
