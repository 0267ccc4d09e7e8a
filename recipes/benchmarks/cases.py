"""What `benchmark_attention.py` times: the inputs of one call of attention, and the ways to compute it."""

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, linear, relu, scaled_dot_product_attention

from benchmarks.flex import attend_by_flex
from hf_neural_attention import NeuralScorer, neural_attention
from hf_neural_attention.models.neural_attention_backends import BACKENDS
from hf_neural_attention.models.neural_attention_masking import causal_pairs
from hf_neural_attention.models.neural_attention_pytorch import Inputs as BackendInputs
from tools.timing_by_turns import Runner


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PHASES = ("forward", "backward", "both", "decode")
MASKS = ("none", "padding", "bool", "float")
SCORERS = ("initial", "paper", "random")
DOT_PRODUCTS = ("eager", "sdpa", "flash")
GPU_PROVIDERS = ("flash", "flex")
PROVIDERS = ("literal", *DOT_PRODUCTS, "flex", *BACKENDS)

# Rounds what the ReLUs see to grids so coarse that float32 sums it without rounding error in any order: otherwise a few of the
# millions of pairs open a ReLU in one provider and not in the other, and gradients differ by that
INPUT_GRID, PROJECTION_GRID, NETWORK_GRID = 1 / 4, 1 / 32, 1 / 16

PADDED_SHARE = 1 / 8  # of the keys, at the end
KEPT_SHARE = 0.7  # of the pairs under a bool mask
MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Case:
    """One call. `decode` is one query against `length` keys; the backends get these projected, as from a `NeuralCache`.

    `shape`: the scorer's hidden layers, as "16x2", or "paper" for `(proj_dim, proj_dim // 2)`.
    `projections`: the attention module as a whole, from hidden states `[B, T, heads * head_dim]` to the same, with its
    projections to queries, keys and values and of the output.
    """

    length: int = 1024
    proj_dim: int = 2
    shape: str = "paper"
    heads: int = 12
    head_dim: int = 64
    batch_size: int = 1
    dtype: str = "float32"
    causal: bool = True
    dropout: float = 0.0
    mask: str = "none"
    phase: str = "forward"
    mode: str = "replace"
    scorer: str = "random"
    projections: bool = False
    device: str = "cpu"

    def __post_init__(self):
        if self.projections and self.phase == "decode":
            raise ValueError("`projections` does not go with the phase `decode`, whose keys come from a cache.")
        if self.shape != "paper" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.shape):
            raise ValueError(f"`shape` is {self.shape!r}; it must be paper, or two sizes like 16x2.")

    @property
    def hidden_dims(self) -> tuple[int, int] | None:
        if self.shape == "paper":
            return None
        first, _, second = self.shape.partition("x")
        return int(first), int(second)

    @property
    def width(self) -> int:
        """Numbers of a pair that the reference holds at once: both projections, or the hidden layers."""
        return max(2 * self.proj_dim, sum(self.hidden_dims or ()))

    @property
    def num_queries(self) -> int:
        return 1 if self.phase == "decode" else self.length

    @property
    def is_causal(self) -> bool:
        return self.causal and self.phase != "decode"  # leaves out decode, whose token is the last and sees all

    @property
    def has_gradients(self) -> bool:
        return self.phase in ("backward", "both")

    @property
    def num_pairs(self) -> int:
        return self.batch_size * self.heads * self.num_queries * self.length

    @property
    def residual_scale(self) -> float | None:
        return self.head_dim**-0.5 if self.mode == "residual" else None


class CallInputs(NamedTuple):
    tensors: dict[str, torch.Tensor]  # query, key, value [B, H, T, D], or hidden [B, T, H D], in_proj [3 H D, H D], out_proj
    grad_output: torch.Tensor  # like the output: [B, H, Tq, D], or [B, T, H D]
    mask: torch.Tensor | None  # [B, 1, 1 or Tq, Tk]
    merged_mask: torch.Tensor | None  # mask and causality in one, which is how SDPA takes both
    scorer: NeuralScorer
    projected_keys: torch.Tensor | None  # decode


def draw_inputs(case: Case, seed: int = 0) -> CallInputs:
    """Normal inputs, the same whatever the scorer, on the grids; the mask leaves each query something."""
    generator = torch.Generator().manual_seed(seed)
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    batch, heads, size, width = case.batch_size, case.heads, case.head_dim, case.heads * case.head_dim

    def draw(*shape: int, grid: float = INPUT_GRID, std: float = 1.0) -> torch.Tensor:
        return round_to(grid, torch.randn(shape, generator=generator) * std).to(device, dtype)

    if case.projections:
        tensors = {"hidden": draw(batch, case.length, width)}
        sizes = {"in_proj": 3 * width, "out_proj": width}
        tensors |= {name: draw(size, width, grid=PROJECTION_GRID, std=width**-0.5) for name, size in sizes.items()}
        grad_output = draw(batch, case.length, width)
    else:
        lengths = {"query": case.num_queries, "key": case.length, "value": case.length}
        tensors = {name: draw(batch, heads, length, size) for name, length in lengths.items()}
        grad_output = draw(batch, heads, case.num_queries, size)
    mask = draw_mask(case, generator)
    merged = merge_masks(mask, case)
    scorer = draw_scorer(case, seed).to(device, dtype)
    projected = None
    if case.phase == "decode" and case.mode == "replace":
        with torch.no_grad():
            projected = scorer.project_keys(tensors["key"])
    for tensor in tensors.values():
        tensor.requires_grad_(case.has_gradients)
    mask = None if mask is None else mask.to(device)
    return CallInputs(tensors, grad_output, mask, merged, scorer, projected)


def round_to(grid: float, tensor: torch.Tensor) -> torch.Tensor:
    return (tensor / grid).round() * grid


def draw_mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    batch, queries, keys = case.batch_size, case.num_queries, case.length
    if case.mask == "none":
        return None
    if case.mask == "padding":
        kept = keys - int(keys * PADDED_SHARE)
        return (torch.arange(keys) < kept).expand(batch, 1, 1, keys)
    if case.mask == "bool":
        attends = torch.rand(batch, 1, queries, keys, generator=generator) < KEPT_SHARE
        return attends | torch.eye(queries, keys, dtype=torch.bool)
    return torch.randn(batch, 1, queries, keys, generator=generator).to(DTYPES[case.dtype])


def merge_masks(mask: torch.Tensor | None, case: Case) -> torch.Tensor | None:
    if mask is None:
        return None
    if case.is_causal:
        causal = causal_pairs(range(case.num_queries), case.length, mask.device)
        mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))
    return mask.to(case.device)


def draw_scorer(case: Case, seed: int) -> NeuralScorer:
    """A living scorer: its scores differ between pairs. `random` is drawn until both of its ReLUs cut and pass.

    All weights are rounded to the grids.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(MOST_DRAWS):
            init = "paper" if case.scorer == "paper" else "mirrored"
            scorer = NeuralScorer(case.head_dim, case.proj_dim, case.hidden_dims, mode=case.mode, init=init)
            if case.scorer == "random":
                randomize(scorer)
            with torch.no_grad():
                for name, parameter in scorer.named_parameters():
                    parameter.copy_(round_to(PROJECTION_GRID if "_proj" in name else NETWORK_GRID, parameter))
            if case.scorer == "initial":
                return scorer
            if is_lively(scorer, both_ways=case.scorer == "random"):
                return scorer
    raise RuntimeError(f"None of {MOST_DRAWS} scorers `{case.scorer}` with proj_dim {case.proj_dim} is alive.")


@torch.no_grad()
def randomize(scorer: NeuralScorer) -> None:
    """Normal weights and biases, of both signs."""
    for name, parameter in scorer.named_parameters():
        fan_in = parameter.shape[-1] if name.endswith("weight") else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)


@torch.no_grad()
def is_lively(scorer: NeuralScorer, both_ways: bool) -> bool:
    """Whether some unit of the second layer is open for some pair; `both_ways`: every layer open for 20 to 80 % of its
    units and pairs."""
    query, key = torch.randn(2, 256, scorer.head_dim)
    hidden = relu(scorer.linear1(torch.cat((scorer.q_proj(query), scorer.k_proj(key)), dim=-1)))
    second = relu(scorer.linear2(hidden))
    shares = [(layer > 0).float().mean().item() for layer in (hidden, second)]
    return all(0.2 < share < 0.8 for share in shares) if both_ways else shares[1] > 0


def literal_scores(query: torch.Tensor, key: torch.Tensor, scorer: NeuralScorer) -> torch.Tensor:
    """Scores as the authors' released code computes them, every pair's concatenation written to memory."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    q = scorer.q_proj(query).unsqueeze(3).repeat(1, 1, 1, num_keys, 1)
    k = scorer.k_proj(key).unsqueeze(2).repeat(1, 1, num_queries, 1, 1)
    hidden = torch.relu(scorer.linear1(torch.cat((q, k), dim=-1)))
    hidden = torch.relu(scorer.linear2(hidden))
    return scorer.linear3(hidden).squeeze(-1)


def attend_step_by_step(
    provider: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: CallInputs, case: Case
) -> torch.Tensor:
    """Scores, mask, softmax, dropout and sum one after the other: `eager`, the dot product, and `literal`."""
    scale = case.head_dim**-0.5 if provider == "eager" else case.residual_scale
    scores = None if scale is None else query @ key.transpose(-1, -2) * scale
    if provider == "literal":
        network = literal_scores(query, key, inputs.scorer)
        scores = network if scores is None else scores + network
    assert scores is not None
    if case.is_causal and provider == "literal":
        # builds it in full size and applies it twice, as the released code does
        later = torch.ones_like(scores).triu_(1).bool()
        scores = scores.masked_fill(later, float("-inf")).masked_fill(later, float("-inf"))
    elif case.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1), float("-inf"))
    mask = inputs.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return dropout(weights, case.dropout) @ value


def attend_heads(
    provider: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: CallInputs, case: Case
) -> torch.Tensor:
    if provider == "flash":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, None, case.dropout, case.is_causal)
    if provider == "sdpa":
        is_causal = case.is_causal and inputs.merged_mask is None
        return scaled_dot_product_attention(query, key, value, inputs.merged_mask, case.dropout, is_causal)
    if provider in ("eager", "literal"):
        return attend_step_by_step(provider, query, key, value, inputs, case)
    projected = inputs.projected_keys
    if provider == "flex":
        key = key if projected is None else projected
        return attend_by_flex(
            query, key, value, inputs.scorer.weights(), case.is_causal, case.residual_scale, projected is not None
        )
    return neural_attention(
        query,
        key if projected is None else projected,
        value,
        inputs.scorer,
        inputs.mask,
        case.dropout,
        case.is_causal,
        backend=provider,
        keys_projected=projected is not None,
    )


def project_inputs(hidden: torch.Tensor, in_proj: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values `[B, H, T, D]` of hidden states `[B, T, H D]`."""
    return linear(hidden, in_proj).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def project_output(output: torch.Tensor, out_proj: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]` -> `[B, T, H D]`."""
    return linear(output.transpose(1, 2).flatten(2), out_proj)


def attend(provider: str, inputs: CallInputs, case: Case) -> torch.Tensor:
    """Runs the call in one of the ways, `PROVIDERS`."""
    tensors = inputs.tensors
    if not case.projections:
        return attend_heads(provider, tensors["query"], tensors["key"], tensors["value"], inputs, case)
    query, key, value = project_inputs(tensors["hidden"], tensors["in_proj"], case.heads)
    return project_output(attend_heads(provider, query, key, value, inputs, case), tensors["out_proj"])


def gradient_targets(provider: str, inputs: CallInputs) -> dict[str, torch.Tensor]:
    """What backward is asked for: the inputs, and the parameters where there are any."""
    parameters = {} if provider in DOT_PRODUCTS else dict(inputs.scorer.named_parameters())
    return inputs.tensors | {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


class Entry(NamedTuple):
    """A case, and the provider that computes it."""

    provider: str
    case: Case

    @classmethod
    def of(cls, provider: str, case: Case) -> "Entry":
        """The same entry for all cases that are one to the provider: dot products have no scorer."""
        if provider in DOT_PRODUCTS:
            case = replace(case, proj_dim=1, shape="paper", scorer="initial", mode="replace")
        return cls(provider, case)


def make_runner(entry: Entry, inputs: CallInputs) -> Runner:
    provider, case = entry
    targets = list(gradient_targets(provider, inputs).values())

    def forward(_: Any) -> torch.Tensor:
        with torch.no_grad():
            return attend(provider, inputs, case)

    def backward(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, targets, inputs.grad_output)

    def both(_: Any) -> tuple[torch.Tensor, ...]:
        return backward(attend(provider, inputs, case))

    if case.phase == "backward":
        return Runner(backward, lambda: attend(provider, inputs, case), device=case.device)
    return Runner(both if case.phase == "both" else forward, device=case.device)


def reason_against(entry: Entry, memory_limit: float) -> str | None:
    """Why the provider cannot or should not run the case here. `memory_limit`: in GiB, for what grows with the pairs."""
    provider, case = entry
    if provider in BACKENDS:
        reason = BACKENDS[provider].reason_against(BackendInputs(case.device, DTYPES[case.dtype], case.head_dim))
        if reason is not None:
            return reason
    if provider in GPU_PROVIDERS and case.device == "cpu":
        return "it runs on GPUs"
    if provider == "flash" and (case.mask != "none" or case.dtype == "float32"):
        return "it takes no mask, and half precision alone"
    if provider == "flex" and (case.mask != "none" or case.dropout > 0):
        return "it has no dropout, and masks were not written for it"
    gibibytes = pair_bytes(entry) / 2**30
    return f"would hold about {gibibytes:.0f} GiB for its pairs" if gibibytes > memory_limit else None


def pair_bytes(entry: Entry) -> int:
    """About how many bytes a provider holds at once for all pairs, to be sure before it is tried."""
    provider, case = entry
    itemsize = DTYPES[case.dtype].itemsize
    if provider in ("literal", "reference"):
        # counts the two repeated projections, their concatenation and the hidden layers; backward adds two gradients
        first, second = case.hidden_dims or (case.proj_dim, 0)
        numbers = 4 * case.proj_dim + first + second + (2 * (case.proj_dim + first) if case.has_gradients else 0) + 3
    elif provider == "eager" or (provider == "sdpa" and case.dropout > 0):
        numbers = 8 if case.has_gradients else 4
    else:
        numbers = 0
    random_bytes = 80 if provider == "reference" and case.dropout > 0 else 0  # counts the bytes of Philox in int64, for a pair
    return case.num_pairs * (numbers * itemsize + random_bytes)
