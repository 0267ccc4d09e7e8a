"""Names that differ between the versions of Transformers that the tests run with (`make test-versions`)."""

from transformers import PreTrainedModel


# Names as before 5.23, where it must: model methods, with `_enable` or `_disable` after it, and a field of `TrainingArguments`
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"
)
