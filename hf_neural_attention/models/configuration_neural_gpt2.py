"""Config of GPT-2 with Neural Attention."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .configuration_neural_attention import NeuralAttentionConfigMixin


@strict
class NeuralGPT2Config(NeuralAttentionConfigMixin, GPT2Config):
    __doc__ = f"""Config of the `NeuralGPT2*` models: `GPT2Config`'s fields, and what follows.

    {NeuralAttentionConfigMixin.__doc__}
    Example:

    ```python
    >>> from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel

    >>> model = NeuralGPT2LMHeadModel(NeuralGPT2Config(n_layer=4, neural_layers=[0, -1], neural_proj_dim=8))
    ```
    """

    model_type = "neural_gpt2"


__all__ = ["NeuralGPT2Config"]
