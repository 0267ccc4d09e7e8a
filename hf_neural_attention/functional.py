"""The operation, shaped like `torch.nn.functional.scaled_dot_product_attention`."""

import torch

from .models.neural_attention_functional import scorer_attention
from .models.neural_attention_scorer import CompactScorer, NeuralScorer, check_parts


def neural_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scorer: NeuralScorer | CompactScorer,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    backend: str | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    keys_projected: bool = False,
    queries_projected: bool = False,
) -> torch.Tensor:
    """Attention whose scores come from `scorer`; otherwise as `torch.nn.functional.scaled_dot_product_attention`.

    Neural Attention (DiGiugno and Mahmood, arXiv 2502.17206, section 3).

    Args:
        query (`torch.Tensor` of shape `(B, H, Tq, D)`): Queries, floating point.
        key (`torch.Tensor` of shape `(B, Hkv, Tk, D)`): Keys. `Hkv` divides `H`: each key and value head serves `H / Hkv`
            neighbouring query heads (grouped-query attention).
        value (`torch.Tensor` of shape `(B, Hkv, Tk, Dv)`): Values.
        scorer (`NeuralScorer` or `CompactScorer`): Made for `head_dim=D`, and for `num_heads=H` if it has weights per head.
            Its weights are used, and it is not called: hooks around its forward do not run.
        attn_mask (`torch.Tensor`, *optional*): Broadcastable to `(B, H, Tq, Tk)`. Bool: True attends. Float: added to the
            scores, and differentiable. Unlike there, it may come together with `is_causal`; both then hold. Queries with
            nothing to attend to get zeros, and zero gradients.
        dropout_p (`float`): Probability of dropping an attention weight, to the nearest 1/65536, always applied (pass 0.0
            in evaluation). Default: 0.0. The same seed of torch drops the same pairs on every backend.
        is_causal (`bool`): Query `i` attends to keys `j <= i` only, counted from the first query and key also where `Tq`
            and `Tk` differ (upper-left alignment, as there). Default: False.
        scale (`float`, *optional*): Factor of the dot product in `mode="residual"`. Default: `1 / sqrt(D)`. The scores of
            the network are never scaled, so `mode="replace"` takes no notice of it, nor does `"thin"`, whose factor is
            `1 / sqrt(proj_dim)`.
        backend (`str`, *optional*): `"native"` (fused, CPU), `"triton"` (fused, GPU), `"blockwise"` (PyTorch operators,
            linear memory), `"reference"` (literal; memory `B * H * Tq * Tk * proj_dim`), or `"auto"`, the first of these that
            can take the inputs. A scorer of mode `"thin"` takes notice of `"reference"` alone: otherwise it runs through
            `scaled_dot_product_attention`, or with dropout through the reference. Default: what `use_backend`, `set_backend`
            or `HF_NEURAL_ATTENTION_BACKEND` says, else `"auto"`.
        sinks (`torch.Tensor` of shape `(H,)`, *optional*): Attention sinks: the logit of one more key per query head, which
            takes its share of the softmax and has no value (Xiao et al., arXiv 2309.17453; learnt, as in gpt-oss).
            Differentiable.
        softcap (`float`, *optional*): In `mode="residual"`, the scaled dot product becomes `softcap * tanh(it / softcap)`
            before the network's score is added (Gemma 2, arXiv 2408.00118, section 2.3). The other modes take no notice of
            it, since the scores that it bounds are not there.
        keys_projected (`bool`): `key` is what `scorer.project_keys(key)` returned: `[B, Hkv, Tk, h1]` (`H` heads with weights
            per head), with `h1 = scorer.hidden_dims[0]`. Not in `mode="residual"`. Default: False.
        queries_projected (`bool`): `query` is what `scorer.project_queries(query)` returned: `[B, H, Tq, h1]`. Not in
            `mode="residual"`. Default: False. A `CompactScorer` always gets both projected.

    Returns:
        `torch.Tensor` of shape `(B, H, Tq, Dv)`, in the query's dtype (the value's, if queries come projected). All but the
        reference compute in float32 at least; `"triton"` multiplies numbers of 16 bits as they are (ops/README.md).

    Raises:
        ValueError: if shapes, dtypes or the probability do not fit, naming the argument, or if the backend that was asked for
            cannot run here, with the reason.
    """
    check_parts(scorer, query, key)
    return scorer_attention(
        query,
        key,
        value,
        scorer.weights(),
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        mode=scorer.mode,
        backend=backend,
        sinks=sinks,
        softcap=softcap,
        keys_projected=keys_projected,
        queries_projected=queries_projected,
    )[0]
