"""The arms of a comparison: models that differ in their attention alone, or in how its scores start."""

from enum import StrEnum


class Arm(StrEnum):
    """An arm, whose value names it on the command line, in folders and in records. Others are compared with the first.

    Which model class and config it has, its family says (`model_families.py`): GPT-2, ViT, or any other.
    """

    label: str  # in tables and pictures
    noun: str  # in sentences
    kind: str  # in the title of a card
    color: str  # in pictures, one of matplotlib's

    DOT = "dot", "dot product", "the dot product", "the dot-product baseline", "tab:gray"
    DOT_STARTED = (
        "dot_started",
        "dot product, spread 1",
        "the dot product whose scores start with a spread of one",
        "a dot-product baseline whose scores start with a spread of one",
        "tab:orange",
    )
    NEURAL = "neural", "neural attention", "Neural Attention", "a model with Neural Attention", "tab:blue"

    # gives defaults for type checkers alone, which take looking an arm up for making one
    def __new__(cls, value: str, label: str = "", noun: str = "", kind: str = "", color: str = "") -> "Arm":
        arm = str.__new__(cls, value)
        arm._value_ = value
        arm.label, arm.noun, arm.kind, arm.color = label, noun, kind, color
        return arm

    @property
    def score_spread(self) -> float | None:
        """What the standard deviation of its attention scores within rows starts as; None leaves it to the initialisation."""
        return 1.0 if self is Arm.DOT_STARTED else None

    @property
    def is_neural(self) -> bool:
        """Whether scorers take the place of its dot products."""
        return self is Arm.NEURAL
