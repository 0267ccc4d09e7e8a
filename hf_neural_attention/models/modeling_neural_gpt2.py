"""GPT-2 with Neural Attention: stock classes with scorers attached to `config.neural_layers`, or, with
`config.neural_compact`, with compact attention in these layers.

Everything that the stock classes take, return and do holds here too; see their documentation. Cross-attention keeps the
dot product.
"""

import torch
from transformers import (
    Cache,
    EncoderDecoderCache,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    initialization,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from .configuration_neural_gpt2 import NeuralGPT2Config
from .modeling_neural_attention import NeuralHeadMixin, NeuralPreTrainedModelMixin, attach_scorers
from .neural_attention_compact import CompactAttentionMixin
from .neural_attention_initialization import is_loaded


class CompactGPT2Attention(CompactAttentionMixin, GPT2Attention):
    """Self-attention of GPT-2 whose `c_attn` makes `u`, `w` and values: `d_model -> 2 * H * h1 + d_model`."""

    def __init__(self, config: NeuralGPT2Config, layer_idx: int, **scorer_arguments):
        super().__init__(config, layer_idx=layer_idx)
        self.make_compact(config, num_heads=self.num_heads, **scorer_arguments)
        self.c_attn = Conv1D(2 * self.projection_size + self.embed_dim, self.embed_dim)

    def write_first_layer(self, query_weight, query_bias, key_weight, key_bias):
        for parameter, parts in (
            (self.c_attn.weight, (query_weight.T, key_weight.T)),
            (self.c_attn.bias, (query_bias, key_bias)),
        ):
            if is_loaded(parameter):  # may be apart as well, under ZeRO-3
                continue
            values = parameter[..., 2 * self.projection_size :]
            initialization.copy_(parameter, torch.cat((*(part.to(values) for part in parts), values), dim=-1))

    def take_stock(self, stock: GPT2Attention) -> tuple:
        self.c_proj, self.attn_dropout, self.resid_dropout = stock.c_proj, stock.attn_dropout, stock.resid_dropout
        weight, bias, size = stock.c_attn.weight.detach(), stock.c_attn.bias.detach(), self.embed_dim
        with torch.no_grad():
            self.c_attn.weight[:, 2 * self.projection_size :] = weight[:, 2 * size :]
            self.c_attn.bias[2 * self.projection_size :] = bias[2 * size :]
        return tuple((weight[:, part].T, bias[part]) for part in (slice(size), slice(size, 2 * size)))

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the stock module's, of self-attention; caches get `w` for keys. Transformers before 5.24 names the cache
        `past_key_values`, and then `cache` is one of pages, which the attention function updates."""
        pages = None
        if cache is not None and not isinstance(cache, Cache):
            pages, cache = cache, None
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        sizes = self.projection_size, self.projection_size, self.embed_dim
        u, w, value = self.c_attn(hidden_states).split(sizes, dim=-1)
        u, w = (self.split_heads(states, self.scorer.hidden_dims[0]) for states in (u, w))
        value = self.split_heads(value, self.head_dim)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            w, value = self.update_cache(cache, w, value)
        dropout = self.attn_dropout.p if self.training else 0.0
        output, weights = self.attend(u, w, value, attention_mask, dropout=dropout, cache=pages, **kwargs)
        return self.resid_dropout(self.c_proj(output)), weights


class NeuralGPT2PreTrainedModel(NeuralPreTrainedModelMixin, GPT2PreTrainedModel):
    """Base of the `NeuralGPT2*` models: loading, saving, and the initialisation of weights."""

    config_class = NeuralGPT2Config
    compact_attention_class = CompactGPT2Attention
    config: NeuralGPT2Config


class NeuralGPT2Model(NeuralGPT2PreTrainedModel, GPT2Model):
    """`GPT2Model` with Neural Attention. Args: config (`NeuralGPT2Config`)."""

    def __init__(self, config: NeuralGPT2Config):
        super().__init__(config)
        attach_scorers(self, [f"h.{index}.attn" for index in range(len(self.h))])


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
