"""Tiny random models of Transformers' families, and inputs for them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel


# Draws weights of standard deviation 0.2, so that attention shows in the outputs of such tiny models
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
BART_SIZES = {"layers": 3, "attention_heads": 4, "ffn_dim": 48}
ENCODER = {**TEXT, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
DECODER = {**TEXT, "tie_word_embeddings": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 5}
GPT2 = {**DECODER, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
OPT = {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0}
MODERNBERT = {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4}
DISTILBERT = {**TEXT, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
T5 = {**DECODER, "num_layers": 3, "num_decoder_layers": 3, "d_kv": 8, "d_ff": 48, "dropout_rate": 0.0}
T5["decoder_start_token_id"] = 0
BART = {
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIZES.items()},
    **DECODER,
    "d_model": 32,
    "init_std": 0.2,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def small_model(model_type: str, **fields) -> Any:
    """One without a head, of a family that is not among `FAMILIES`."""
    return AutoModel.from_config(AutoConfig.for_model(model_type, vocab_size=99, **fields))


def latent_model() -> Any:
    """One with latent attention, which caches the numbers that keys and values are made of."""
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "hidden_size": 32, "intermediate_size": 32}
    return small_model("deepseek_v3", num_attention_heads=2, num_key_value_heads=2, **ranks, **sizes)


@dataclass(frozen=True)
class Family:
    model_type: str
    head: str
    fields: dict[str, Any] = field(repr=False)
    stacks: tuple[str, ...]  # of self-attention, "*" being the number of the layer

    @property
    def layers(self) -> list[str]:
        """Names of all three self-attention modules of each stack."""
        return [
            stack.replace("layer.*.Self", "layer.0.Self").replace("*", str(i), 1) for stack in self.stacks for i in range(3)
        ]

    def model(self, implementation: str = "sdpa", **fields) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **{**self.fields, **fields})
        model_class = getattr(transformers, f"AutoModelFor{self.head}")
        return model_class.from_config(config, attn_implementation=implementation).eval()

    def inputs(self, padded: bool = True) -> dict[str, torch.Tensor]:
        """For text two examples, of which the second is shorter, padded on the left."""
        generator = torch.Generator().manual_seed(1)
        if self.head == "ImageClassification":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        ids = torch.randint(3, 98, (2, 9), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if padded:
            inputs["input_ids"][1, :3] = inputs["attention_mask"][1, :3] = 0
        if self.head == "Seq2SeqLM":
            inputs["decoder_input_ids"] = torch.randint(3, 98, (2, 6), generator=generator)
        return inputs

    def seen(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs without those at padding, `[numbers]`."""
        if self.head in ("CausalLM", "MaskedLM"):
            return outputs[self.inputs()["attention_mask"].bool()]
        return outputs

    @property
    def generates(self) -> bool:
        return self.head in ("CausalLM", "Seq2SeqLM")


FAMILIES = {
    family.model_type: family
    for family in (
        Family("gpt2", "CausalLM", GPT2, ("transformer.h.*.attn",)),
        Family("gpt_bigcode", "CausalLM", GPT2, ("transformer.h.*.attn",)),
        Family("llama", "CausalLM", GROUPED, ("model.layers.*.self_attn",)),
        Family("qwen3", "CausalLM", {**GROUPED, "head_dim": 16}, ("model.layers.*.self_attn",)),
        Family("mistral", "CausalLM", {**GROUPED, "sliding_window": 4}, ("model.layers.*.self_attn",)),
        Family("gpt_neox", "CausalLM", DECODER, ("gpt_neox.layers.*.attention",)),
        Family("opt", "CausalLM", OPT, ("model.decoder.layers.*.self_attn",)),
        Family("phi", "CausalLM", {**DECODER, "resid_pdrop": 0.0}, ("model.layers.*.self_attn",)),
        Family("bert", "MaskedLM", ENCODER, ("bert.encoder.layer.*.attention.self",)),
        Family("roberta", "MaskedLM", ENCODER, ("roberta.encoder.layer.*.attention.self",)),
        Family("modernbert", "MaskedLM", MODERNBERT, ("model.layers.*.attn",)),
        Family("distilbert", "MaskedLM", DISTILBERT, ("distilbert.transformer.layer.*.attention",)),
        Family("t5", "Seq2SeqLM", T5, tuple(f"{side}.block.*.layer.0.SelfAttention" for side in ("encoder", "decoder"))),
        Family("bart", "Seq2SeqLM", BART, tuple(f"model.{side}.layers.*.self_attn" for side in ("encoder", "decoder"))),
        Family("vit", "ImageClassification", IMAGE, ("vit.layers.*.attention",)),
        Family("dinov2", "ImageClassification", IMAGE, ("dinov2.encoder.layer.*.attention",)),
    )
}
