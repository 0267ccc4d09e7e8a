"""The arms of a comparison, by the names that files and command lines have for them."""

import json

import pytest

from training.arms import Arm
from training.neural_arguments import NeuralArguments


def test_an_arm_is_its_name_wherever_names_are_kept():
    assert [f"{arm}" for arm in Arm] == ["dot", "dot_started", "neural"] and Arm("neural") is Arm.NEURAL
    assert json.loads(json.dumps({Arm.DOT: Arm.NEURAL})) == {"dot": "neural"} == {Arm.DOT: Arm.NEURAL}
    assert [arm.is_neural for arm in Arm] == [False, False, True]
    assert [arm.score_spread for arm in Arm] == [None, 1.0, None]
    assert len({word for arm in Arm for word in (arm.label, arm.noun, arm.kind, arm.color)}) == 12


@pytest.mark.parametrize(
    ("attention", "arms"),
    (
        ("both", (Arm.DOT, Arm.NEURAL)),
        ("all", (Arm.DOT, Arm.DOT_STARTED, Arm.NEURAL)),
        ("dot", (Arm.DOT,)),
        ("dot_started", (Arm.DOT_STARTED,)),
        ("neural", (Arm.NEURAL,)),
    ),
)
def test_what_the_command_line_asks_for(attention, arms):
    assert NeuralArguments(attention=attention).arms == arms
