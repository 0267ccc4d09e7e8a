"""ViT with Neural Attention: stock classes with scorers attached to `config.neural_layers`, or, with `config.neural_compact`,
with compact attention in these layers.

Everything that the stock classes take, return and do holds here too; see their documentation.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel, ViTPreTrainedModel, initialization
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.models.vit.modeling_vit import ViTAttention

from .configuration_neural_vit import NeuralViTConfig
from .modeling_neural_attention import NeuralHeadMixin, NeuralPreTrainedModelMixin, attach_scorers
from .neural_attention_compact import CompactAttentionMixin


class CompactViTAttention(CompactAttentionMixin, ViTAttention):
    """Self-attention of ViT whose `q_proj` and `k_proj` make `u` and `w`: `d_model -> H * h1`."""

    def __init__(self, config: NeuralViTConfig, layer_idx: int | None = None, **scorer_arguments):
        super().__init__(config)
        self.make_compact(config, num_heads=self.num_attention_heads, **scorer_arguments)
        self.q_proj = nn.Linear(config.hidden_size, self.projection_size)
        self.k_proj = nn.Linear(config.hidden_size, self.projection_size)

    def write_first_layer(self, query_weight, query_bias, key_weight, key_bias):
        for parameter, drawn in (
            (self.q_proj.weight, query_weight),
            (self.q_proj.bias, query_bias),
            (self.k_proj.weight, key_weight),
            (self.k_proj.bias, key_bias),
        ):
            initialization.copy_(parameter, drawn)

    def take_stock(self, stock: ViTAttention) -> tuple:
        self.v_proj, self.o_proj = stock.v_proj, stock.o_proj
        return tuple((layer.weight.detach(), layer.bias) for layer in (stock.q_proj, stock.k_proj))

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the stock module's."""
        u, w = (self.split_heads(layer(hidden_states), self.scorer.hidden_dims[0]) for layer in (self.q_proj, self.k_proj))
        value = self.split_heads(self.v_proj(hidden_states), self.head_dim)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = self.attend(u, w, value, attention_mask, dropout=dropout, **kwargs)
        return self.o_proj(output), weights


class NeuralViTPreTrainedModel(NeuralPreTrainedModelMixin, ViTPreTrainedModel):
    """Base of the `NeuralViT*` models: loading, saving, and the initialisation of weights."""

    config_class = NeuralViTConfig
    compact_attention_class = CompactViTAttention
    config: NeuralViTConfig

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; also of a checkpoint's names, which are those of old versions: `Trainer` hands them
        over as they are on disk when it resumes, or loads the best model at the end."""
        renamed = {live_name(name): tensor for name, tensor in state_dict.items()}
        if renamed.keys() != state_dict.keys():  # keeps what else an own one says (`_metadata`)
            state_dict = renamed
        return super().load_state_dict(state_dict, *args, **kwargs)


class NeuralViTModel(NeuralViTPreTrainedModel, ViTModel):
    """`ViTModel` with Neural Attention.

    Args:
        config (`NeuralViTConfig`): Model configuration.
        add_pooling_layer (`bool`): Whether to add a pooling layer. Default: True.
        use_mask_token (`bool`): Whether to use a mask token for masked image modeling. Default: False.
    """

    def __init__(self, config: NeuralViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=use_mask_token)
        attach_scorers(self, [f"layers.{index}.attention" for index in range(len(self.layers))])


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


def live_name(name: str) -> str:
    """Of a parameter, by its name on disk."""
    for source, target in DISK_TO_LIVE_NAMES.items():
        name = re.sub(source, target, name)
    return name


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
