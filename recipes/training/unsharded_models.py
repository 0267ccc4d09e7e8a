"""Models that each process builds whole, also where DeepSpeed shares their weights out when training starts."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.integrations import unset_hf_deepspeed_config


def whole(build: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function that builds a model build it whole.

    Under ZeRO-3, `from_pretrained` would share its weights out at once. Both arms start from the same weights, and models are
    patched, calibrated and measured before they are trained, all of which needs them together. `TrainingArguments`, which each
    `Trainer` gets anew, ask for ZeRO-3 again.
    """

    @wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        unset_hf_deepspeed_config()
        return build(*args, **kwargs)

    return built
