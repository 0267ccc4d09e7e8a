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
from .neural_attention_operators import Tensors, define_operators
from .neural_attention_reference import ScorerWeights, expand_heads, key_features, query_features, relative_sinks


# Limits the numbers in a block's largest tensor, [heads, h1, queries, keys]: about the size of a core's cache, by measurement
BLOCK_NUMBERS = 1 << 20
MAX_BLOCK_QUERIES = 64


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


class BlockwiseArguments(NamedTuple):
    """Arguments of a call. All float tensors but `attn_mask` have one dtype. The layers that act on pairs come per head, or
    with a leading dimension of 1 for all heads."""

    u: torch.Tensor  # [B, H, Tq, h1]
    w: torch.Tensor  # [B, H, Tk, h1]
    value: torch.Tensor  # [B, H, Tk, Dv]
    weight2: torch.Tensor  # [1 or H, h2, h1]
    bias2: torch.Tensor  # [1 or H, h2]
    weight3: torch.Tensor  # [1 or H, 1, h2]
    query: torch.Tensor | None  # [B, H, Tq, D], scaled; None in replace mode
    key: torch.Tensor | None  # [B, H, Tk, D]
    attn_mask: torch.Tensor | None  # of four dimensions
    dropout_seed: torch.Tensor | None
    sinks: torch.Tensor | None  # [H]
    dropout_p: float
    is_causal: bool
    softcap: float | None

    def blocks(self) -> Iterator[Block]:
        batch, num_heads, num_queries, first = self.u.shape
        num_keys, width = self.w.shape[2], max(first, self.weight2.shape[-2])
        return cut_into_blocks(batch, num_heads, num_queries, num_keys, width, self.is_causal) if num_keys else iter(())

    def layers_of(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layers that act on pairs, of a block's heads."""
        part = as_slice(block.heads) if self.weight2.shape[0] > 1 else slice(None)
        return self.weight2[part], self.bias2[part], self.weight3[part]

    def sinks_of(self, block: Block) -> torch.Tensor | None:
        return None if self.sinks is None else self.sinks[as_slice(block.heads)]

    def dropout_of(self, block: Block) -> torch.Tensor | None:
        """What a block's weights are multiplied with."""
        if self.dropout_seed is None:
            return None
        return dropout_multiplier(
            self.dropout_seed,
            self.dropout_p,
            batch=block.batch,
            heads=block.heads,
            num_heads=self.u.shape[1],
            rows=block.rows,
            num_columns=block.num_keys,
            dtype=self.u.dtype,
        )


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
    capped: torch.Tensor | None  # [B, H, rows, keys]: dot products over the cap they are under, if they are


def score_block(block: Block, arguments: BlockwiseArguments) -> Activations:
    u, w, query, key, softcap = arguments.u, arguments.w, arguments.query, arguments.key, arguments.softcap
    weight2, bias2, weight3 = arguments.layers_of(block)
    capped = None
    rows = block.queries_of(u).transpose(-1, -2).unsqueeze(-1)  # [B, H, h1, rows, 1]
    columns = block.keys_of(w).transpose(-1, -2).unsqueeze(-2).contiguous()  # [B, H, h1, 1, keys]
    hidden1 = (rows + columns).relu_().flatten(-2)
    hidden2 = matmul_heads(weight2, hidden1).add_(bias2.unsqueeze(-1)).relu_()
    scores = matmul_heads(weight3, hidden2).view(*hidden1.shape[:2], len(block.rows), block.num_keys)
    if query is not None and key is not None:
        products = block.queries_of(query) @ block.keys_of(key).transpose(-1, -2)
        if softcap is None:
            scores += products
        else:
            capped = products.div_(softcap).tanh_()
            scores.add_(capped, alpha=softcap)
    causal = causal_pairs(block.rows, block.num_keys, u.device) if arguments.is_causal else None
    mask = None if arguments.attn_mask is None else block.mask_of(arguments.attn_mask)
    return Activations(hidden1, hidden2, mask_scores(scores, mask, causal), capped)


def softmax_keys(scores: torch.Tensor, attn_mask: torch.Tensor | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; rows of -inf only, which no mask but `attn_mask` can leave, become zeros.

    With `sinks`, `[heads]`, the last column of the result is their weights, of one key more than there are scores.
    """
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    probabilities = scores.softmax(dim=-1)
    if attn_mask is None:
        return probabilities
    return probabilities.masked_fill_(scores.amax(dim=-1, keepdim=True) == float("-inf"), 0.0)


def allocate_outputs(arguments: BlockwiseArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Tq, Dv]`, and nothing of the softmax: backward computes blocks again."""
    u, value = arguments.u, arguments.value
    return u.new_empty(*u.shape[:3], value.shape[-1]), u.new_empty(0)


def run_forward(arguments: BlockwiseArguments, output: torch.Tensor, _: torch.Tensor) -> None:
    output.zero_()
    with without_autocast(arguments.u):
        for block in arguments.blocks():
            scores = score_block(block, arguments).scores
            probabilities = softmax_keys(scores, arguments.attn_mask, arguments.sinks_of(block))[..., : block.num_keys]
            dropout = arguments.dropout_of(block)
            if dropout is not None:
                probabilities *= dropout
            block.queries_of(output)[:] = probabilities @ block.keys_of(arguments.value)


def allocate_gradient(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_zeros(tensor.shape)


def run_backward(
    arguments: BlockwiseArguments, grad_output: torch.Tensor, _: torch.Tensor, __: torch.Tensor, gradients: Tensors
) -> None:
    grad_output = grad_output.contiguous()
    grad_mask = None
    if arguments.attn_mask is not None and "attn_mask" in gradients:  # may have fewer digits than the sums
        grad_mask = arguments.u.new_zeros(arguments.attn_mask.shape)
    with without_autocast(arguments.u):
        for block in arguments.blocks():
            weight2, _, weight3 = arguments.layers_of(block)
            hidden1, hidden2, scores, capped = score_block(block, arguments)
            all_weights = softmax_keys(scores, arguments.attn_mask, arguments.sinks_of(block))
            probabilities = all_weights[..., : block.num_keys]
            grad_out = block.queries_of(grad_output)
            grad_scores = grad_out @ block.keys_of(arguments.value).transpose(-1, -2)
            dropped = probabilities
            dropout = arguments.dropout_of(block)
            if dropout is not None:
                dropped = probabilities * dropout
                grad_scores *= dropout
            block.keys_of(gradients["value"]).add_(dropped.transpose(-1, -2) @ grad_out)
            grad_scores *= probabilities
            # sums these very numbers, not `grad_output * output`, so that rounding cancels where a row has one large weight
            sums = grad_scores.sum(dim=-1, keepdim=True)
            grad_scores.addcmul_(probabilities, sums, value=-1.0)
            if "sinks" in gradients:  # has zero for its value, and so for the gradient of its weight
                gradients["sinks"][as_slice(block.heads)] -= (all_weights[..., block.num_keys :] * sums).sum((0, 2, 3))

            if arguments.query is not None and arguments.key is not None:
                grad_products = grad_scores if capped is None else grad_scores * (1.0 - capped.square())
                block.queries_of(gradients["query"]).add_(grad_products @ block.keys_of(arguments.key))
                block.keys_of(gradients["key"]).add_(grad_products.transpose(-1, -2) @ block.queries_of(arguments.query))
            if grad_mask is not None:
                part = block.mask_of(grad_mask)
                part.add_(grad_scores.sum_to_size(part.shape))

            pairs = grad_scores.flatten(-2).unsqueeze(-2)  # [B, H, 1, rows * keys]
            add_per_layer(gradients["weight3"], block, pairs @ hidden2.transpose(-1, -2))
            grad_hidden2 = matmul_heads(weight3.transpose(-1, -2), pairs).mul_(hidden2 > 0)
            add_per_layer(gradients["bias2"], block, grad_hidden2.sum(dim=-1))
            add_per_layer(gradients["weight2"], block, grad_hidden2 @ hidden1.transpose(-1, -2))
            grad_hidden1 = matmul_heads(weight2.transpose(-1, -2), grad_hidden2).mul_(hidden1 > 0)
            grad_hidden1 = grad_hidden1.unflatten(-1, (len(block.rows), block.num_keys))
            block.queries_of(gradients["u"])[:] = grad_hidden1.sum(dim=-1).transpose(-1, -2)
            block.keys_of(gradients["w"]).add_(grad_hidden1.sum(dim=-2).transpose(-1, -2))
    if grad_mask is not None:
        gradients["attn_mask"].copy_(grad_mask)


def add_per_layer(total: torch.Tensor, block: Block, part: torch.Tensor) -> None:
    """Adds a `[B, H, ...]` gradient to that of shared (`[1, ...]`) or per-head (`[H, ...]`) weights."""
    part = part.sum(dim=0)
    if total.shape[0] == 1:
        total.add_(part.sum(dim=0, keepdim=True))
    else:
        total[as_slice(block.heads)].add_(part)


blockwise_forward, blockwise_backward = define_operators(
    "blockwise",
    BlockwiseArguments,
    allocate_outputs=allocate_outputs,
    run_forward=run_forward,
    allocate_gradient=allocate_gradient,
    run_backward=run_backward,
    saves_output=False,
)


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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
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
        weight2, bias2, weight3 = layers if weights.per_head else (layer.unsqueeze(0) for layer in layers)
        scaled_query = full_key = None
        if residual_scale is not None:
            scaled_query = query.to(dtype) * residual_scale
            full_key = expand_heads(key, num_heads).to(dtype)
        arguments = BlockwiseArguments(
            u=u,
            w=expand_heads(w, num_heads),
            value=expand_heads(value, num_heads).to(dtype),
            weight2=weight2,
            bias2=bias2,
            weight3=weight3,
            query=scaled_query,
            key=full_key,
            attn_mask=attn_mask,
            dropout_seed=dropout_seed,
            sinks=relative_sinks(sinks, weights),
            dropout_p=dropout_p,
            is_causal=is_causal,
            softcap=softcap,
        )
        output, _ = blockwise_forward(*arguments)
    return output.to(value.dtype if queries_projected else query.dtype)
