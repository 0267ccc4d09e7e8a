"""ViT with Neural Attention: stock classes with scorers attached to `config.neural_layers`.

Everything that the stock classes take, return and do holds here too; see their documentation.
"""

from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel, ViTPreTrainedModel
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping

from .configuration_neural_vit import NeuralViTConfig
from .modeling_neural_attention import NeuralHeadMixin, NeuralPreTrainedModelMixin, attach_scorers


class NeuralViTPreTrainedModel(NeuralPreTrainedModelMixin, ViTPreTrainedModel):
    """Base of the `NeuralViT*` models: loading, saving, and the initialisation of weights."""

    config_class = NeuralViTConfig
    config: NeuralViTConfig


class NeuralViTModel(NeuralViTPreTrainedModel, ViTModel):
    """`ViTModel` with Neural Attention.

    Args:
        config (`NeuralViTConfig`): Model configuration.
        add_pooling_layer (`bool`): Whether to add a pooling layer. Default: True.
        use_mask_token (`bool`): Whether to use a mask token for masked image modeling. Default: False.
    """

    def __init__(self, config: NeuralViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=use_mask_token)
        attach_scorers(self, (layer.attention for layer in self.layers))


class NeuralViTHeadModel(NeuralHeadMixin, NeuralViTPreTrainedModel):
    base_model_class = NeuralViTModel
    base_model_arguments = {"add_pooling_layer": False}


class NeuralViTForImageClassification(NeuralViTHeadModel, ViTForImageClassification):
    """`ViTForImageClassification` with Neural Attention. Args: config (`NeuralViTConfig`)."""


class NeuralViTForMaskedImageModeling(NeuralViTHeadModel, ViTForMaskedImageModeling):
    """`ViTForMaskedImageModeling` with Neural Attention. Args: config (`NeuralViTConfig`)."""

    base_model_arguments = {"add_pooling_layer": False, "use_mask_token": True}


# Repeats the rules of Transformers for "ViTModel", since it translates names on disk to live names by class name, for its own
# classes only. Adds "attention." before q, k and v, so that the scorer's q_proj and k_proj stay as they are.
DISK_TO_LIVE_NAMES = {
    r"encoder\.layer\.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
register_checkpoint_conversion_mapping(
    "NeuralViTModel",
    [WeightRenaming(source, target) for source, target in DISK_TO_LIVE_NAMES.items()],
    overwrite=True,
)


__all__ = [
    "NeuralViTForImageClassification",
    "NeuralViTForMaskedImageModeling",
    "NeuralViTModel",
    "NeuralViTPreTrainedModel",
]
