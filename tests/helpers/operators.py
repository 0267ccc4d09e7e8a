"""The operators of a backend, and what torch asks of operators."""

from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.numerics import Attend, Tensors, run_with_gradients


class Recorder:
    """Takes the place of an operator and keeps what it was called with."""

    def __init__(self, operator: Any):
        self.operator, self.arguments = operator, ()

    def __call__(self, *arguments):
        self.arguments = arguments
        return self.operator(*arguments)


def check_operators(module: ModuleType, name: str, attend: Attend, tensors: Tensors, scorer, dtype, **options) -> None:
    """`torch.library.opcheck` of the operators `{name}_forward` and `{name}_backward` of a module, as `attend` calls them."""
    forward, backward = getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
    recorder = Recorder(forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, f"{name}_forward", recorder)
        run_with_gradients(attend, tensors, scorer, dtype, **options)
    plain = [argument.detach() if isinstance(argument, torch.Tensor) else argument for argument in recorder.arguments]
    wants_grad = [getattr(argument, "requires_grad", False) for argument in recorder.arguments]
    assert any(wants_grad)

    output, statistics = forward(*plain)
    mask_needs_grad = "attn_mask" in tensors and tensors["attn_mask"].is_floating_point()
    torch.library.opcheck(backward, (torch.randn_like(output), output, statistics, mask_needs_grad, *plain))
    leaves = [
        argument.detach().requires_grad_() if wanted else argument for argument, wanted in zip(plain, wants_grad, strict=True)
    ]
    torch.library.opcheck(forward, tuple(leaves))
