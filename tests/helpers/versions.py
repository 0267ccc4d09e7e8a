"""Names that differ between the versions of Transformers that the tests run with (`make test-versions`)."""

from transformers import PreTrainedModel


# Before 5.23: methods of models, with `_enable` or `_disable` after it, and a field of `TrainingArguments`
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"
)
