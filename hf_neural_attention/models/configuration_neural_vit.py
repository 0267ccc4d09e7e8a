"""Config of ViT with Neural Attention."""

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_neural_attention import NeuralAttentionConfigMixin


@strict
class NeuralViTConfig(NeuralAttentionConfigMixin, ViTConfig):
    __doc__ = f"""Config of the `NeuralViT*` models: `ViTConfig`'s fields, and what follows.

    {NeuralAttentionConfigMixin.__doc__}
    Example:

    ```python
    >>> from hf_neural_attention import NeuralViTConfig, NeuralViTForImageClassification

    >>> model = NeuralViTForImageClassification(NeuralViTConfig(num_hidden_layers=4, neural_layers=[0, -1], neural_proj_dim=8))
    ```
    """

    model_type = "neural_vit"


__all__ = ["NeuralViTConfig"]
