"""Command lines of the recipes: flags, or one JSON or YAML file, which flags after it override."""

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(*types: Any, words: list[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Parses `words` (default: `sys.argv`) into one instance of each dataclass.

    The first word may be a JSON or YAML file of `name: value`; what follows it are flags, which win.

    Raises:
        SystemExit: with what is wrong, if the file is missing or malformed, or an argument does not exist or is not valid.
    """
    # takes no abbreviations, of which a secret's would not be known for one when the command is written down
    parser = HfArgumentParser(list(types), description=description, allow_abbrev=False)
    try:
        return parser.parse_args_into_dataclasses(flags_of(words), look_for_args_file=False)
    except ValueError as error:  # comes also from `TrainingArguments` whose values do not fit together
        raise SystemExit(f"{error} (--help lists all arguments)") from None


def unknown_words(types: tuple[Any, ...], words: list[str]) -> list[str]:
    """What `parse_arguments` would not know of these words. A value that is none exits at once, as there."""
    return HfArgumentParser(list(types), allow_abbrev=False).parse_known_args(flags_of(words))[1]


def value_of_flag(name: str) -> str | None:
    """The value of one flag, for recipes whose other flags depend on it."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(flags_of(None))[0], name)


def flags_of(words: list[str] | None) -> list[str]:
    """`words`, or those of `sys.argv`, a configuration file replaced by its flags."""
    arguments = sys.argv[1:] if words is None else words
    if arguments and Path(arguments[0]).suffix in (".json", ".yaml", ".yml"):
        return flags_of_file(Path(arguments[0])) + arguments[1:]
    return arguments


def flags_of_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"Cannot read the configuration {path}: {error.strerror}.") from None
    try:
        content = yaml.safe_load(text)  # reads JSON too, which is YAML
    except yaml.YAMLError as error:
        raise SystemExit(f"The configuration {path} is not valid: {error}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"The configuration {path} must hold `name: value` pairs; it holds a {type(content).__name__}.")
    return as_flags(content)


def as_flags(content: dict[str, Any]) -> list[str]:
    """The command line's words for `name: value` pairs."""
    flags: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        values = values or ["none"]  # stands for an empty list of layers
        flags += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return flags


def at_least(name: str, value: float | None, least: float, why: str = "") -> None:
    """Raises a ValueError if the argument of that name is given and smaller. For `__post_init__` of a dataclass, whose errors
    `parse_arguments` shows."""
    if value is not None and not value >= least:
        raise ValueError(f"--{name} is {value}; expected at least {least}{f', since {why}' if why else ''}.")


def make_folder_of(flag: str, beginning: str | Path) -> None:
    """Makes the folder of files whose names begin like this, before anything is measured that they shall hold.

    Raises:
        SystemExit: naming the flag, if that cannot be.
    """
    folder = Path(beginning).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{flag} {beginning} cannot be written to: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise SystemExit(f"{flag} {beginning} cannot be written to: permission denied in {folder}.")
