"""Neural Attention for Hugging Face Transformers.

Importing this package registers its models with the Auto classes.
"""

__version__ = "0.2.0"

from .diagnostics import explain
from .export import export_to_hub
from .functional import neural_attention
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
from .models.neural_attention_scorer import CompactScorer, NeuralScorer
from .ops import set_backend, use_backend
from .patching import calibrate, compact, from_pretrained, load_patch, patch, patch_status, patched, save_patch, unpatch
from .patching.auto_classes import register_patched_models
from .registration import register_auto_classes
from .starting import start_scores


__all__ = [
    "CompactScorer",
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
    "compact",
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
    "start_scores",
    "unpatch",
    "use_backend",
]

register_auto_classes()
register_patched_models()
