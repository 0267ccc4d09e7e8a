"""The arms of a comparison: models that differ in their attention alone."""

from enum import StrEnum


class Arm(StrEnum):
    """An arm, whose value names it on the command line, in folders and in records. Others are compared with the first."""

    label: str  # in tables and pictures
    kind: str  # in the title of a card
    color: str  # in pictures, one of matplotlib's

    DOT = "dot", "dot product", "the dot-product baseline", "tab:gray"
    NEURAL = "neural", "neural attention", "a model with Neural Attention", "tab:blue"

    # gives defaults for type checkers alone, which take looking an arm up for making one
    def __new__(cls, value: str, label: str = "", kind: str = "", color: str = "") -> "Arm":
        arm = str.__new__(cls, value)
        arm._value_ = value
        arm.label, arm.kind, arm.color = label, kind, color
        return arm

    @property
    def is_neural(self) -> bool:
        """Whether scorers take the place of its dot products."""
        return self is Arm.NEURAL
