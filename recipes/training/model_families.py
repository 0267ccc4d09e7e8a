"""The model families that recipes train from scratch: the classes of each arm."""

from typing import Any, NamedTuple

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_neural_attention import (
    NeuralGPT2Config,
    NeuralGPT2LMHeadModel,
    NeuralViTConfig,
    NeuralViTForImageClassification,
)
from training.arms import Arm


class ModelClasses(NamedTuple):
    config: Any  # a class: its fields are its own
    model: type[PreTrainedModel]


ModelFamily = dict[Arm, ModelClasses]


def family(stock: ModelClasses, neural: ModelClasses) -> ModelFamily:
    return {arm: neural if arm.is_neural else stock for arm in Arm}


GPT2 = family(ModelClasses(GPT2Config, GPT2LMHeadModel), ModelClasses(NeuralGPT2Config, NeuralGPT2LMHeadModel))
VIT = family(
    ModelClasses(ViTConfig, ViTForImageClassification), ModelClasses(NeuralViTConfig, NeuralViTForImageClassification)
)
