"""Study files: what `study.py` reads, and how it names what it writes."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


HERE = Path(__file__).parent
TIMING = "timing.json"
SAME_TIME = "same_time_as"


@dataclass
class Study:
    """A study file."""

    name: str
    recipe: str
    config: str
    dataset: str
    seeds: list[int]
    baseline: str
    metric: str
    choose_by: str
    arms: dict[str, dict[str, Any]]
    flags: dict[str, Any]
    also: list[str] = field(default_factory=list)
    lower_is_better: bool = True

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Raises SystemExit if the file is not there, or lacks or has what a study has not."""
        try:
            content = yaml.safe_load(path.read_text())
            study = cls(**{"name": path.stem, "flags": {}, **content})
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise SystemExit(f"{path} is no study: {error}") from None
        if study.baseline not in study.arms:
            raise SystemExit(f"{path}: the baseline {study.baseline!r} is none of the arms, {', '.join(study.arms)}.")
        for arm, settings in study.arms.items():
            other = settings.get(SAME_TIME)
            if other is not None and (other not in study.arms or "max_steps" not in study.flags):
                raise SystemExit(
                    f"{path}: {arm!r} is to take the same time as {other!r}, which must be an arm; and `flags` must have "
                    "`max_steps`, whose number is scaled."
                )
        return study

    def runs(self) -> list[tuple[str, int]]:
        """Seed by seed, so that a study that is stopped early has whole pairs."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def words(self, arm: str, steps: int | None = None) -> list[str]:
        """The recipe's command line for an arm, but for the seed and the folder."""
        settings = {name: value for name, value in {**self.flags, **self.arms[arm]}.items() if name != SAME_TIME}
        if steps is not None:
            settings["max_steps"] = steps
        flags = [word for name, value in settings.items() for word in flag(name, value)]
        return [str(HERE / self.config), *flags]


def flag(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def file_name(arm: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', arm).strip('-')}-{seed}.json"
