"""The paper's own architecture at sizes of a study: post-norm blocks under embeddings that are multiplied, as its authors do.

Their text models look tokens up in embeddings drawn N(0, 1), and compute `x = x + (sqrt(d) x + positions)`, so an embedding
counts `1 + sqrt(d)` times. Those with Neural Attention compute `x += x + ...`, and it counts `2 + sqrt(d)` times. Positions
are sinusoids, heads are untied. The decoder is Transformers' Marian decoder, which is post-norm; no family has such an encoder
for images, so one is made here of ViT's parts. They are known to the recipes alone, as `paper_decoder` and `paper_encoder`.
"""

import math
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    MarianConfig,
    MarianForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.marian.modeling_marian import MarianDecoderLayer
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer


@strict
class PaperDecoderConfig(MarianConfig):
    """Config of `PaperDecoderForCausalLM`.

    Args:
        embedding_std (`float`): Standard deviation that embeddings are drawn with. Default: 1.0.
        embedding_factor (`float`, *optional*): What they are multiplied by. Default: `1 + sqrt(d_model)`.
        normalise_embeddings (`bool`): Whether a LayerNorm comes before the first layer. Default: False.
        tie_word_embeddings (`bool`): Whether the head has the embeddings' weights. Default: False, as the authors have it.
    """

    model_type = "paper_decoder"

    tie_word_embeddings: bool = False
    embedding_std: float | int = 1.0
    embedding_factor: float | int | None = None
    normalise_embeddings: bool = False


class NormalisedDecoderLayer(MarianDecoderLayer):
    """A layer whose input goes through a LayerNorm."""

    def __init__(self, config: PaperDecoderConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.embedding_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.embedding_layer_norm(hidden_states), *args, **kwargs)


class PaperDecoderForCausalLM(MarianForCausalLM):
    """A Marian decoder without layers for an encoder, with embeddings as the config says."""

    config_class = PaperDecoderConfig

    def __init__(self, config: PaperDecoderConfig):
        super().__init__(config)
        decoder: Any = self.model.decoder
        decoder.embed_scale = factor_of(config.embedding_factor, config.d_model)
        if config.normalise_embeddings:
            decoder.layers[0] = NormalisedDecoderLayer(config, layer_idx=0)
            self.post_init()
        for layer in decoder.layers:  # takes out cross-attention, which would be trained on nothing
            del layer.encoder_attn, layer.encoder_attn_layer_norm
        nn.init.normal_(decoder.embed_tokens.weight, std=config.embedding_std)


@strict
class PaperEncoderConfig(ViTConfig):
    """Config of `PaperEncoderForImageClassification`.

    Args:
        embedding_factor (`float`, *optional*): What patch embeddings are multiplied by. Default: `1 + sqrt(hidden_size)`.
        normalise_embeddings (`bool`): Whether a LayerNorm comes before the first layer. Default: False.
    """

    model_type = "paper_encoder"

    embedding_factor: float | int | None = None
    normalise_embeddings: bool = False


class PaperEmbeddings(ViTEmbeddings):
    """Patches and a class token, multiplied, and sinusoids for positions."""

    def __init__(self, config: PaperEncoderConfig):
        super().__init__(config)
        self.factor = factor_of(config.embedding_factor, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size) if config.normalise_embeddings else nn.Identity()
        self.position_embeddings.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return self.dropout(self.layer_norm(self.factor * tokens + self.position_embeddings))


class PostNormLayer(ViTLayer):
    """ViT's layer with its norms after each sublayer."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layernorm_before(hidden_states + self.dropout(attended))
        return self.layernorm_after(hidden_states + self.dropout(self.mlp(hidden_states)))


class PaperEncoderForImageClassification(ViTForImageClassification):
    """A post-norm ViT. Patches are projected by weights as `nn.Conv2d` draws them; the class token is drawn like these."""

    config_class = PaperEncoderConfig

    def __init__(self, config: PaperEncoderConfig):
        super().__init__(config)
        self.vit.embeddings = PaperEmbeddings(config)
        self.vit.layers = nn.ModuleList(PostNormLayer(config) for _ in range(config.num_hidden_layers))
        self.vit.layernorm = cast(Any, nn.Identity())  # has been done by the last layer
        self.post_init()
        embeddings = self.vit.embeddings
        projection = embeddings.patch_embeddings.projection
        projection.reset_parameters()
        with torch.no_grad():
            embeddings.cls_token.normal_(std=projection.weight[0].numel() ** -0.5)
            embeddings.position_embeddings.copy_(sinusoids(*embeddings.position_embeddings.shape[1:]))


def factor_of(factor: float | None, width: int) -> float:
    return 1.0 + math.sqrt(width) if factor is None else float(factor)


def sinusoids(length: int, width: int) -> torch.Tensor:
    """`[length, width]`, sines and cosines by turns (Vaswani et al. 2017)."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


for config_class, auto_class, model_class in (
    (PaperDecoderConfig, AutoModelForCausalLM, PaperDecoderForCausalLM),
    (PaperEncoderConfig, AutoModelForImageClassification, PaperEncoderForImageClassification),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_class.register(config_class, model_class, exist_ok=True)
