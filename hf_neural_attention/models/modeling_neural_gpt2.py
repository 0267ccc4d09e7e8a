"""GPT-2 with Neural Attention: stock classes with scorers attached to `config.neural_layers`.

Everything that the stock classes take, return and do holds here too; see their documentation. Cross-attention keeps the
dot product.
"""

from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_neural_gpt2 import NeuralGPT2Config
from .modeling_neural_attention import NeuralHeadMixin, NeuralPreTrainedModelMixin, attach_scorers


class NeuralGPT2PreTrainedModel(NeuralPreTrainedModelMixin, GPT2PreTrainedModel):
    """Base of the `NeuralGPT2*` models: loading, saving, and the initialisation of weights."""

    config_class = NeuralGPT2Config
    config: NeuralGPT2Config


class NeuralGPT2Model(NeuralGPT2PreTrainedModel, GPT2Model):
    """`GPT2Model` with Neural Attention. Args: config (`NeuralGPT2Config`)."""

    def __init__(self, config: NeuralGPT2Config):
        super().__init__(config)
        attach_scorers(self, (block.attn for block in self.h))


class NeuralGPT2HeadModel(NeuralHeadMixin, NeuralGPT2PreTrainedModel):
    base_model_class = NeuralGPT2Model


class NeuralGPT2LMHeadModel(NeuralGPT2HeadModel, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with Neural Attention. Args: config (`NeuralGPT2Config`)."""

    def __init__(self, config: NeuralGPT2Config):
        super().__init__(config)
        # Sets what stock GPT-2 ends up with too, but after a warning that no compiled graph can hold. Sets no `loss_type`,
        # which would do as well, since by it Trainer counts tokens otherwise than for stock GPT-2.
        self.loss_function = ForCausalLMLoss


class NeuralGPT2DoubleHeadsModel(NeuralGPT2HeadModel, GPT2DoubleHeadsModel):
    """`GPT2DoubleHeadsModel` with Neural Attention. Args: config (`NeuralGPT2Config`)."""


class NeuralGPT2ForSequenceClassification(NeuralGPT2HeadModel, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` with Neural Attention. Args: config (`NeuralGPT2Config`)."""


class NeuralGPT2ForTokenClassification(NeuralGPT2HeadModel, GPT2ForTokenClassification):
    """`GPT2ForTokenClassification` with Neural Attention. Args: config (`NeuralGPT2Config`)."""


class NeuralGPT2ForQuestionAnswering(NeuralGPT2HeadModel, GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering` with Neural Attention. Args: config (`NeuralGPT2Config`)."""


# Names the class where `Trainer` looks up whether to shift labels that it smooths, and where serving looks up what a model is
# for, since neither sees what is registered with the Auto classes
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NeuralGPT2Config.model_type] = NeuralGPT2LMHeadModel.__name__


__all__ = [
    "NeuralGPT2DoubleHeadsModel",
    "NeuralGPT2ForQuestionAnswering",
    "NeuralGPT2ForSequenceClassification",
    "NeuralGPT2ForTokenClassification",
    "NeuralGPT2LMHeadModel",
    "NeuralGPT2Model",
    "NeuralGPT2PreTrainedModel",
]
