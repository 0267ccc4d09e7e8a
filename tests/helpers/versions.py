"""Names that differ between the versions of Transformers that the tests run with (`make test-versions`)."""

from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast


# Names as before 5.23, where it must: model methods, with `_enable` or `_disable` after it, and a field of `TrainingArguments`
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"
)

# Names the cache as models and `generate` take it, and give it back: as before 5.24, where it must be
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# Says whether caches of fixed size can forget tokens, and so serve assisted generation: from 5.24 on
STATIC_CACHES_CROP = hasattr(StaticLayer, "crop")


def named(arguments: dict) -> dict:
    """The same arguments, with a `cache` under the name of this version."""
    return {CACHE if name == "cache" else name: argument for name, argument in arguments.items()}
