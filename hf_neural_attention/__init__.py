"""Neural Attention for Hugging Face Transformers.

Importing this package registers its models with the Auto classes. Neither torch nor any model is imported before it is
used, so it costs next to nothing beside `import transformers`.
"""

import importlib
from typing import TYPE_CHECKING

from .registration import register_auto_classes


__version__ = "0.2.0"

# public name -> module that defines it, imported on first use
PUBLIC_NAMES = {
    "NeuralCache": "models.neural_attention_cache",
    "NeuralGPT2Config": "models.configuration_neural_gpt2",
    "NeuralGPT2DoubleHeadsModel": "models.modeling_neural_gpt2",
    "NeuralGPT2ForQuestionAnswering": "models.modeling_neural_gpt2",
    "NeuralGPT2ForSequenceClassification": "models.modeling_neural_gpt2",
    "NeuralGPT2ForTokenClassification": "models.modeling_neural_gpt2",
    "NeuralGPT2LMHeadModel": "models.modeling_neural_gpt2",
    "NeuralGPT2Model": "models.modeling_neural_gpt2",
    "NeuralGPT2PreTrainedModel": "models.modeling_neural_gpt2",
    "NeuralScorer": "models.neural_attention_scorer",
    "NeuralViTConfig": "models.configuration_neural_vit",
    "NeuralViTForImageClassification": "models.modeling_neural_vit",
    "NeuralViTForMaskedImageModeling": "models.modeling_neural_vit",
    "NeuralViTModel": "models.modeling_neural_vit",
    "NeuralViTPreTrainedModel": "models.modeling_neural_vit",
    "calibrate": "patching",
    "explain": "diagnostics",
    "export_to_hub": "export",
    "from_pretrained": "patching",
    "load_patch": "patching",
    "neural_attention": "ops",
    "patch": "patching",
    "patch_status": "patching",
    "patched": "patching",
    "save_patch": "patching",
    "set_backend": "ops",
    "unpatch": "patching",
    "use_backend": "ops",
}

__all__ = [
    "NeuralCache",
    "NeuralGPT2Config",
    "NeuralGPT2DoubleHeadsModel",
    "NeuralGPT2ForQuestionAnswering",
    "NeuralGPT2ForSequenceClassification",
    "NeuralGPT2ForTokenClassification",
    "NeuralGPT2LMHeadModel",
    "NeuralGPT2Model",
    "NeuralGPT2PreTrainedModel",
    "NeuralScorer",
    "NeuralViTConfig",
    "NeuralViTForImageClassification",
    "NeuralViTForMaskedImageModeling",
    "NeuralViTModel",
    "NeuralViTPreTrainedModel",
    "__version__",
    "calibrate",
    "explain",
    "export_to_hub",
    "from_pretrained",
    "load_patch",
    "neural_attention",
    "patch",
    "patch_status",
    "patched",
    "save_patch",
    "set_backend",
    "unpatch",
    "use_backend",
]

if TYPE_CHECKING:
    from .diagnostics import explain
    from .export import export_to_hub
    from .models.configuration_neural_gpt2 import NeuralGPT2Config
    from .models.configuration_neural_vit import NeuralViTConfig
    from .models.modeling_neural_gpt2 import (
        NeuralGPT2DoubleHeadsModel,
        NeuralGPT2ForQuestionAnswering,
        NeuralGPT2ForSequenceClassification,
        NeuralGPT2ForTokenClassification,
        NeuralGPT2LMHeadModel,
        NeuralGPT2Model,
        NeuralGPT2PreTrainedModel,
    )
    from .models.modeling_neural_vit import (
        NeuralViTForImageClassification,
        NeuralViTForMaskedImageModeling,
        NeuralViTModel,
        NeuralViTPreTrainedModel,
    )
    from .models.neural_attention_cache import NeuralCache
    from .models.neural_attention_scorer import NeuralScorer
    from .ops import neural_attention, set_backend, use_backend
    from .patching import calibrate, from_pretrained, load_patch, patch, patch_status, patched, save_patch, unpatch


def __getattr__(name: str):
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{PUBLIC_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
