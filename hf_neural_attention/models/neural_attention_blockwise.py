"""The operation in blocks of queries, in plain PyTorch: any device, memory linear in the sequence length.

The first layer of the scorer acts on a concatenation, so it splits into a sum, `linear1([q'; k']) = u_i + w_j`
(`first_layer_of_query`, `key_features`), and a pair costs only `relu(u_i + w_j)`, two small layers and the softmax. Blocks
are recomputed in backward. Computes in float32 (float64 for float64 inputs), whatever the dtype of the inputs, and under
autocast too.

Both passes are `torch.library` operators, so that `torch.compile` sees one node each instead of an unrolled loop.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from .neural_attention_masking import causal_pairs, dropout_multiplier, mask_scores
from .neural_attention_reference import ScorerWeights, expand_heads, key_features, query_features


# Numbers in the largest tensor of a block, [heads, h1, queries, keys]: about the size of a core's cache, by measurement
BLOCK_NUMBERS = 1 << 20
MAX_BLOCK_QUERIES = 64

# Gives each copy of this file, from several models on the Hub, its own operators, as one name would void the first's
NAMESPACE = "hf_neural_attention" if __name__.startswith("hf_neural_attention.") else __name__.replace(".", "_")


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    if tensor.device.type == "meta" or not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()  # does nothing on the meta device, which autocast does not know
    return torch.autocast(device_type=tensor.device.type, enabled=False)


class Block(NamedTuple):
    """Which examples, heads, queries and keys (the first `num_keys`) are computed together."""

    batch: range
    heads: range
    rows: range
    num_keys: int

    def queries_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Part of a `[B, H, Tq, ...]` tensor."""
        return tensor[as_slice(self.batch), as_slice(self.heads), as_slice(self.rows)]

    def keys_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Part of a `[B, H, Tk, ...]` tensor."""
        return tensor[as_slice(self.batch), as_slice(self.heads), : self.num_keys]

    def mask_of(self, mask: torch.Tensor) -> torch.Tensor:
        """Part of a 4-dimensional mask, of which any dimension may be 1 (broadcast)."""
        wanted = (as_slice(self.batch), as_slice(self.heads), as_slice(self.rows), slice(self.num_keys))
        return mask[tuple(part if size > 1 else slice(None) for part, size in zip(wanted, mask.shape, strict=True))]


def as_slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def cut_into_blocks(
    batch: int, num_heads: int, num_queries: int, num_keys: int, width: int, is_causal: bool
) -> Iterator[Block]:
    """Blocks of at most `BLOCK_NUMBERS` numbers of `width` per pair, unless one query alone has more."""
    pairs = max(BLOCK_NUMBERS // width, 1)
    rows = max(1, min(num_queries, MAX_BLOCK_QUERIES, pairs // max(num_keys, 1)))
    heads = max(1, min(num_heads, pairs // max(rows * num_keys, 1)))
    # takes several examples at a time only with all their heads
    examples = max(1, min(batch, pairs // max(rows * num_keys * num_heads, 1))) if heads == num_heads else 1
    for b in range(0, batch, examples):
        for h in range(0, num_heads, heads):
            for i in range(0, num_queries, rows):
                last = min(i + rows, num_queries)
                yield Block(
                    range(b, min(b + examples, batch)),
                    range(h, min(h + heads, num_heads)),
                    range(i, last),
                    min(num_keys, last) if is_causal else num_keys,
                )


class PairLayers(NamedTuple):
    """The layers that act on pairs, per head or with a leading dimension of 1 for all heads."""

    weight2: torch.Tensor  # [1 or H, h2, h1]
    bias2: torch.Tensor  # [1 or H, h2]
    weight3: torch.Tensor  # [1 or H, 1, h2]

    def heads_of(self, block: Block) -> "PairLayers":
        return self if self.weight2.shape[0] == 1 else PairLayers(*(layer[as_slice(block.heads)] for layer in self))


def matmul_heads(matrix: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """`[1 or H, out, in]` times `[B, H, in, pairs]` -> `[B, H, out, pairs]`."""
    batch, heads = pairs.shape[:2]
    matrix = matrix.expand(batch, heads, -1, -1).reshape(batch * heads, *matrix.shape[-2:])
    return torch.bmm(matrix, pairs.flatten(0, 1)).unflatten(0, (batch, heads))


class Activations(NamedTuple):
    """One block's forward pass, as backward needs it."""

    hidden1: torch.Tensor  # [B, H, h1, rows * keys]
    hidden2: torch.Tensor  # [B, H, h2, rows * keys]
    scores: torch.Tensor  # [B, H, rows, keys], masked


def score_block(
    block: Block,
    u: torch.Tensor,
    w: torch.Tensor,
    layers: PairLayers,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
) -> Activations:
    """Scores of a block. `u` is `[B, H, Tq, h1]`, `w` `[B, H, Tk, h1]`; `query` is scaled, or None in replace mode."""
    layers = layers.heads_of(block)
    rows = block.queries_of(u).transpose(-1, -2).unsqueeze(-1)  # [B, H, h1, rows, 1]
    columns = block.keys_of(w).transpose(-1, -2).unsqueeze(-2).contiguous()  # [B, H, h1, 1, keys]
    hidden1 = (rows + columns).relu_().flatten(-2)
    hidden2 = matmul_heads(layers.weight2, hidden1).add_(layers.bias2.unsqueeze(-1)).relu_()
    scores = matmul_heads(layers.weight3, hidden2).view(*hidden1.shape[:2], len(block.rows), block.num_keys)
    if query is not None and key is not None:
        scores += block.queries_of(query) @ block.keys_of(key).transpose(-1, -2)
    causal = causal_pairs(block.rows, block.num_keys, u.device) if is_causal else None
    mask = None if attn_mask is None else block.mask_of(attn_mask)
    return Activations(hidden1, hidden2, mask_scores(scores, mask, causal))


def softmax_keys(scores: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; rows of -inf only, which no mask but `attn_mask` can leave, become zeros."""
    probabilities = scores.softmax(dim=-1)
    if attn_mask is None:
        return probabilities
    return probabilities.masked_fill_(scores.amax(dim=-1, keepdim=True) == float("-inf"), 0.0)


def block_dropout(
    block: Block, seed: torch.Tensor | None, dropout_p: float, num_heads: int, dtype: torch.dtype
) -> torch.Tensor | None:
    if seed is None:
        return None
    return dropout_multiplier(
        seed,
        dropout_p,
        batch=block.batch,
        heads=block.heads,
        num_heads=num_heads,
        rows=block.rows,
        num_columns=block.num_keys,
        dtype=dtype,
    )


@torch.library.custom_op(f"{NAMESPACE}::blockwise_forward", mutates_args=())
def blockwise_forward(
    u: torch.Tensor,
    w: torch.Tensor,
    value: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> torch.Tensor:
    """Output `[B, H, Tq, Dv]`.

    All float tensors but `attn_mask` have one dtype and `H` heads; `query` is scaled. `attn_mask` has four dimensions.
    """
    batch, num_heads, num_queries, width = u.shape
    num_keys = w.shape[2]
    output = u.new_zeros(batch, num_heads, num_queries, value.shape[-1])
    layers = PairLayers(weight2, bias2, weight3)
    if num_keys == 0:
        return output
    with without_autocast(u):
        for block in cut_into_blocks(batch, num_heads, num_queries, num_keys, width, is_causal):
            scores = score_block(block, u, w, layers, query, key, attn_mask, is_causal).scores
            probabilities = softmax_keys(scores, attn_mask)
            dropout = block_dropout(block, dropout_seed, dropout_p, num_heads, u.dtype)
            if dropout is not None:
                probabilities *= dropout
            block.queries_of(output)[:] = probabilities @ block.keys_of(value)
    return output


@blockwise_forward.register_fake
def _(u, w, value, weight2, bias2, weight3, query, key, attn_mask, dropout_seed, dropout_p, is_causal):
    return u.new_empty(*u.shape[:3], value.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::blockwise_backward", mutates_args=())
def blockwise_backward(
    grad_output: torch.Tensor,
    u: torch.Tensor,
    w: torch.Tensor,
    value: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    weight3: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    dropout_seed: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    mask_needs_grad: bool,
) -> list[torch.Tensor]:
    """Gradients of u, w, value, weight2, bias2, weight3, query, key and attn_mask; empty tensors for those not asked."""
    gradients = allocate_gradients(u, w, value, weight2, bias2, weight3, query, key, attn_mask, mask_needs_grad)
    grad_u, grad_w, grad_value, grad_weight2, grad_bias2, grad_weight3, grad_query, grad_key, grad_mask = gradients
    batch, num_heads, num_queries, width = u.shape
    num_keys = w.shape[2]
    all_layers = PairLayers(weight2, bias2, weight3)
    if num_keys == 0:
        return gradients
    with without_autocast(u):
        for block in cut_into_blocks(batch, num_heads, num_queries, num_keys, width, is_causal):
            layers = all_layers.heads_of(block)
            hidden1, hidden2, scores = score_block(block, u, w, all_layers, query, key, attn_mask, is_causal)
            probabilities = softmax_keys(scores, attn_mask)
            grad_out = block.queries_of(grad_output)
            grad_scores = grad_out @ block.keys_of(value).transpose(-1, -2)
            dropped = probabilities
            dropout = block_dropout(block, dropout_seed, dropout_p, num_heads, u.dtype)
            if dropout is not None:
                dropped = probabilities * dropout
                grad_scores *= dropout
            block.keys_of(grad_value).add_(dropped.transpose(-1, -2) @ grad_out)
            grad_scores *= probabilities
            # sums these very numbers, not `grad_output * output`, so that rounding cancels where a row has one large weight
            grad_scores.addcmul_(probabilities, grad_scores.sum(dim=-1, keepdim=True), value=-1.0)

            if query is not None and key is not None:
                block.queries_of(grad_query).add_(grad_scores @ block.keys_of(key))
                block.keys_of(grad_key).add_(grad_scores.transpose(-1, -2) @ block.queries_of(query))
            if mask_needs_grad:
                part = block.mask_of(grad_mask)
                part.add_(grad_scores.sum_to_size(part.shape))

            pairs = grad_scores.flatten(-2).unsqueeze(-2)  # [B, H, 1, rows * keys]
            add_per_layer(grad_weight3, block, pairs @ hidden2.transpose(-1, -2))
            grad_hidden2 = matmul_heads(layers.weight3.transpose(-1, -2), pairs).mul_(hidden2 > 0)
            add_per_layer(grad_bias2, block, grad_hidden2.sum(dim=-1))
            add_per_layer(grad_weight2, block, grad_hidden2 @ hidden1.transpose(-1, -2))
            grad_hidden1 = matmul_heads(layers.weight2.transpose(-1, -2), grad_hidden2).mul_(hidden1 > 0)
            grad_hidden1 = grad_hidden1.unflatten(-1, (len(block.rows), block.num_keys))
            block.queries_of(grad_u)[:] = grad_hidden1.sum(dim=-1).transpose(-1, -2)
            block.keys_of(grad_w).add_(grad_hidden1.sum(dim=-2).transpose(-1, -2))
    return gradients


@blockwise_backward.register_fake
def _(
    grad_output,
    u,
    w,
    value,
    weight2,
    bias2,
    weight3,
    query,
    key,
    attn_mask,
    dropout_seed,
    dropout_p,
    is_causal,
    mask_needs_grad,
):
    return allocate_gradients(u, w, value, weight2, bias2, weight3, query, key, attn_mask, mask_needs_grad)


def allocate_gradients(u, w, value, weight2, bias2, weight3, query, key, attn_mask, mask_needs_grad):
    wanted = [u, w, value, weight2, bias2, weight3, query, key, attn_mask if mask_needs_grad else None]
    return [u.new_zeros(0 if tensor is None else tensor.shape) for tensor in wanted]


def add_per_layer(total: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    """Adds a `[B, H, ...]` gradient to that of shared (`[1, ...]`) or per-head (`[H, ...]`) weights."""
    part = part.sum(dim=0)
    if total.shape[0] == 1:
        total.add_(part.sum(dim=0, keepdim=True))
    else:
        total[as_slice(block.heads)].add_(part)


def setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, grad_output):
    tensors = ctx.saved_tensors
    attn_mask = tensors[8]
    mask_needs_grad = attn_mask is not None and ctx.needs_input_grad[8]
    gradients = blockwise_backward(grad_output.contiguous(), *tensors, ctx.dropout_p, ctx.is_causal, mask_needs_grad)
    present = [tensor is not None for tensor in tensors[:8]] + [mask_needs_grad]
    inputs = [gradient if asked else None for gradient, asked in zip(gradients, present, strict=True)]
    if mask_needs_grad:
        inputs[8] = gradients[8].to(attn_mask.dtype)
    return (*inputs, None, None, None)


blockwise_forward.register_autograd(backward, setup_context=setup_context)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: ScorerWeights,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    is_causal: bool = False,
    residual_scale: float | None = None,
    keys_projected: bool = False,
    queries_projected: bool = False,
) -> torch.Tensor:
    """Neural Attention in blocks. Arguments are checked and described by `neural_attention`.

    Differentiable once (its backward is not differentiable; the reference's is).

    Returns:
        Output `[B, H, Tq, Dv]` in the query's dtype (the value's, if queries come projected).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads = query.shape[1]
    with without_autocast(query):
        weights = weights.to(dtype)
        u = query_features(query, weights, queries_projected)
        if weights.per_head and not keys_projected:
            key = expand_heads(key, num_heads)
        w = key_features(key, weights, keys_projected)
        layers = weights.weight2, weights.bias2, weights.weight3
        scaled_query = full_key = None
        if residual_scale is not None:
            scaled_query = query.to(dtype) * residual_scale
            full_key = expand_heads(key, num_heads).to(dtype)
        output = blockwise_forward(
            u,
            expand_heads(w, num_heads),
            expand_heads(value, num_heads).to(dtype),
            *(layers if weights.per_head else (layer.unsqueeze(0) for layer in layers)),
            scaled_query,
            full_key,
            attn_mask,
            dropout_seed,
            dropout_p,
            is_causal,
        )
    return output.to(value.dtype if queries_projected else query.dtype)
