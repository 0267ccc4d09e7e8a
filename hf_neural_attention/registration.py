"""Makes the models known to Transformers' Auto classes."""

from transformers import (
    MODEL_FOR_IMAGE_MAPPING,
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    ViTImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from .models.configuration_neural_gpt2 import NeuralGPT2Config
from .models.configuration_neural_vit import NeuralViTConfig
from .models.modeling_neural_gpt2 import (
    NeuralGPT2DoubleHeadsModel,
    NeuralGPT2ForQuestionAnswering,
    NeuralGPT2ForSequenceClassification,
    NeuralGPT2ForTokenClassification,
    NeuralGPT2LMHeadModel,
    NeuralGPT2Model,
)
from .models.modeling_neural_vit import NeuralViTForImageClassification, NeuralViTForMaskedImageModeling, NeuralViTModel
from .models.neural_attention_lookup import make_findable


# Maps a model type to the stock model type of the family
FAMILIES = {"neural_gpt2": "gpt2", "neural_vit": "vit"}

# Puts our models wherever a stock model of their family stands
MODELS_OF_AUTO_CLASSES = {
    AutoModel: (NeuralGPT2Model, NeuralViTModel),
    AutoModelForCausalLM: (NeuralGPT2LMHeadModel,),
    AutoModelForImageClassification: (NeuralViTForImageClassification,),
    AutoModelForMaskedImageModeling: (NeuralViTForMaskedImageModeling,),
    AutoModelForPreTraining: (NeuralGPT2LMHeadModel,),
    AutoModelForQuestionAnswering: (NeuralGPT2ForQuestionAnswering,),
    AutoModelForSequenceClassification: (NeuralGPT2ForSequenceClassification,),
    AutoModelForTokenClassification: (NeuralGPT2ForTokenClassification,),
}


def register_auto_classes() -> None:
    """Registers configs, models, and the stock families' tokenizer and image processor. Doing it again changes nothing."""
    for model in MODELS_OF_AUTO_CLASSES[AutoModel]:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
    for auto, models in MODELS_OF_AUTO_CLASSES.items():
        for model in models:
            auto.register(model.config_class, model, exist_ok=True)
    make_findable(
        {
            model.__name__: model
            for models in ((NeuralGPT2DoubleHeadsModel,), *MODELS_OF_AUTO_CLASSES.values())
            for model in models
        }
    )
    # registers here, since the table of image models without a head has no Auto class
    MODEL_FOR_IMAGE_MAPPING.register(NeuralViTConfig, NeuralViTModel, exist_ok=True)  # type: ignore[arg-type]
    AutoTokenizer.register(NeuralGPT2Config, TOKENIZER_MAPPING[GPT2Config], exist_ok=True)
    processors: dict[str, type] = {"pil": ViTImageProcessorPil}
    if is_torchvision_available():
        from transformers import ViTImageProcessor

        processors["torchvision"] = ViTImageProcessor
    AutoImageProcessor.register(NeuralViTConfig, image_processor_classes=processors, exist_ok=True)
