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

GPT2: ModelFamily = {
    Arm.DOT: ModelClasses(GPT2Config, GPT2LMHeadModel),
    Arm.DOT_STARTED: ModelClasses(GPT2Config, GPT2LMHeadModel),
    Arm.NEURAL: ModelClasses(NeuralGPT2Config, NeuralGPT2LMHeadModel),
}
VIT: ModelFamily = {
    Arm.DOT: ModelClasses(ViTConfig, ViTForImageClassification),
    Arm.DOT_STARTED: ModelClasses(ViTConfig, ViTForImageClassification),
    Arm.NEURAL: ModelClasses(NeuralViTConfig, NeuralViTForImageClassification),
}
