"""Whether what is timed computes the right thing: against the formula in float64, on the inputs that are timed."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import (
    DOT_PRODUCTS,
    DTYPES,
    CallInputs,
    Case,
    Entry,
    attend,
    draw_inputs,
    gradient_targets,
    project_inputs,
    project_output,
)
from hf_neural_attention.models.neural_attention_masking import (
    causal_pairs,
    draw_dropout_seed,
    dropout_multiplier,
    mask_scores,
)
from hf_neural_attention.models.neural_attention_reference import reference_scores, softmax_or_zero


DROPOUT_SEED = 7

# Bound the numbers, `pairs * width`, that the reference works through: in all (with more, it checks only a part of the
# queries) and in one block (to bound its memory)
CHECKED_NUMBERS = 1 << 27
BLOCK_NUMBERS = 1 << 24
ROWS_TOGETHER = 16

# Names the results and gradients of one token each; the others are of weights, and sums over all pairs
PER_TOKEN = ("output", "query", "key", "value", "hidden")

Results = dict[str, torch.Tensor]


class Check(NamedTuple):
    """How a check went: on what it passed, or why it did not."""

    passed: bool
    message: str


def errors(results: Results, exact: Results) -> dict[str, float]:
    return {name: (results[name].double() - exact[name]).abs().max().item() for name in exact}


def check_by_rule(ours: Results, same: Results, exact: Results, dtype: torch.dtype, terms: dict[str, int], note: str) -> Check:
    """The largest error of each result, against twice that of the reference in the same dtype (`same`) and its roundings.

    As the package's tests do, but for the roundings: millions of numbers are summed here, in whatever order. A sum of n
    numbers is off by about sqrt(n) roundings (Higham and Mary 2019, "A new approach to probabilistic rounding error
    analysis"), in float32 on all providers; then comes one to `dtype`.

    Args:
        terms: how many numbers are summed for each result.
        note: on what, for the report.
    """
    ours_errors, same_errors = errors(ours, exact), errors(same, exact)
    for name, error in ours_errors.items():
        roundings = torch.finfo(dtype).eps + math.sqrt(terms[name]) * torch.finfo(torch.float32).eps
        # looks at the weight too, since the terms of a bias are those of its weight, and may cancel out
        largest = max(exact[place].abs().max().item() for place in (name, name.replace(".bias", ".weight")))
        allowed = 2 * same_errors[name] + roundings * largest
        if not error <= allowed:  # refuses NaN too
            return Check(False, f"does not match the reference (error of {name} {error:.3g}, allowed {allowed:.3g}; {note})")
    return Check(True, note)


def checked_rows(case: Case) -> list[range]:
    """Which queries are checked: all, or as many as a check may cost, in groups from the first to the last."""
    queries = case.num_queries
    affordable = CHECKED_NUMBERS // max(1, case.num_pairs // queries * case.width)
    if affordable >= queries:
        return [range(queries)]
    groups = max(2, affordable // ROWS_TOGETHER)
    starts = torch.linspace(0, queries - ROWS_TOGETHER, groups).long().tolist()
    return [range(start, start + ROWS_TOGETHER) for start in starts]


def pick_rows(tensor: torch.Tensor, rows: list[range]) -> torch.Tensor:
    """Of `[..., T, size]`."""
    places = [place for group in rows for place in group]
    return tensor.index_select(-2, torch.tensor(places, device=tensor.device))


def blocks_of(rows: list[range], most: int) -> Iterator[range]:
    for group in rows:
        for start in range(group.start, group.stop, most):
            yield range(start, min(start + most, group.stop))


def reference_results(provider: str, case: Case, inputs: CallInputs, dtype: torch.dtype) -> Results:
    """The formula pair by pair in `dtype`, block by block: outputs of the checked queries, and gradients.

    Gradients are those of a `grad_output` that is zero for the other queries. They are summed over blocks in float64, so that
    it does not count how many blocks there are. For a dot product the formula is that one's.
    """
    rows = checked_rows(case)
    scorer = copy.deepcopy(inputs.scorer).double()
    tensors = {name: tensor.detach().double() for name, tensor in inputs.tensors.items()}
    exact = inputs._replace(tensors=tensors, scorer=scorer)
    for tensor in tensors.values():
        tensor.requires_grad_(case.has_gradients)
    if case.projections:
        heads = project_inputs(tensors["hidden"].to(dtype), tensors["in_proj"].to(dtype), case.heads)
    else:
        heads = tuple(tensors[name] for name in ("query", "key", "value"))
    query, key, value = (tensor.double() for tensor in heads)
    seed = dropout_seed(case)
    blocks = list(blocks_of(rows, max(1, BLOCK_NUMBERS // (case.heads * case.length * case.width))))

    def attend_block(example: int, block: range, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One example's queries `[1, H, rows, D]`, keys and values; weights and inputs are rounded to `dtype` here."""
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if provider in DOT_PRODUCTS:
            scores = (query * case.head_dim**-0.5) @ key.transpose(-1, -2)
        else:
            scores = reference_scores(query, key, scorer.weights().to(dtype), residual_scale=case.residual_scale)
        scores = scores.to(torch.promote_types(dtype, torch.float32))
        mask = inputs.mask
        if mask is not None:
            mask = mask.expand(-1, -1, case.num_queries, -1)[example : example + 1, :, block.start : block.stop]
        causal = causal_pairs(block, case.length, query.device) if case.is_causal else None
        weights = softmax_or_zero(mask_scores(scores, mask, causal)).to(dtype)
        if seed is not None:
            weights = weights * dropout_multiplier(
                seed,
                case.dropout,
                batch=range(example, example + 1),
                heads=range(case.heads),
                num_heads=case.heads,
                rows=block,
                num_columns=case.length,
                dtype=dtype,
            )
        return weights @ value

    def attend_example(example: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = query[None].split([len(block) for block in blocks], dim=2)
        # computes again for backward, so that only a block's pairs are held
        outputs = [
            checkpoint(attend_block, example, block, part, key[None], value[None], use_reentrant=False)
            for block, part in zip(blocks, parts, strict=True)
        ]
        return torch.cat(outputs, dim=2)

    with torch.set_grad_enabled(case.has_gradients):
        examples = enumerate(zip(pick_rows(query, rows).unbind(), key.unbind(), value.unbind(), strict=True))
        output = torch.cat([attend_example(example, *parts) for example, parts in examples])
        if case.projections:
            output = project_output(output, tensors["out_proj"].to(dtype))
    results = {"output": output.detach()}
    if case.has_gradients:
        targets = gradient_targets(provider, exact)
        direction = pick_rows(inputs.grad_output, rows).to(dtype)
        results |= dict(zip(targets, torch.autograd.grad(output, list(targets.values()), direction), strict=True))
    return results


def dropout_seed(case: Case) -> torch.Tensor | None:
    """What the next call draws after `torch.manual_seed(DROPOUT_SEED)`."""
    torch.manual_seed(DROPOUT_SEED)
    return draw_dropout_seed(case.dropout, torch.device(case.device))


def provider_results(provider: str, case: Case, inputs: CallInputs) -> Results:
    """Output of the checked queries, and gradients, as the provider computes them on the whole inputs."""
    rows = checked_rows(case)
    torch.manual_seed(DROPOUT_SEED)
    with torch.set_grad_enabled(case.has_gradients):
        output = attend(provider, inputs, case)
    results = {"output": pick_rows(output.detach(), rows)}
    if case.has_gradients:
        direction = torch.zeros_like(inputs.grad_output)
        for group in rows:
            direction[..., group.start : group.stop, :] = inputs.grad_output[..., group.start : group.stop, :]
        targets = gradient_targets(provider, inputs)
        results |= dict(zip(targets, torch.autograd.grad(output, list(targets.values()), direction), strict=True))
    return results


class Checker:
    """Checks entries on the very inputs that are timed, each once; providers of one case share its references."""

    def __init__(self):
        self.checks: dict[Entry, Check] = {}
        self.references: dict[tuple[Case, bool], tuple[Results, Results]] = {}

    def check(self, entry: Entry) -> Check:
        provider, case = entry
        if case.phase == "backward":
            case = replace(case, phase="both")  # shares the check, since the results are the same
        place = Entry(provider, case)
        if place not in self.checks:
            self.checks[place] = self.run_check(provider, case)
        return self.checks[place]

    def run_check(self, provider: str, case: Case) -> Check:
        queries = sum(map(len, checked_rows(case)))
        note = "all queries" if queries == case.num_queries else f"{queries:,} of {case.num_queries:,} queries"
        if case.dropout > 0 and provider in (*DOT_PRODUCTS, "literal"):
            case, note = replace(case, dropout=0.0), f"{note}, without dropout, whose random numbers are torch's own"
        inputs, dtype = draw_inputs(case), DTYPES[case.dtype]
        place = (case, provider in DOT_PRODUCTS)
        if place not in self.references:
            same, exact = (reference_results(provider, case, inputs, kind) for kind in (dtype, torch.float64))
            self.references[place] = same, exact
        same, exact = self.references[place]
        pairs = case.num_pairs // case.num_queries * queries
        terms = {name: case.length if name in PER_TOKEN else pairs for name in exact}
        return check_by_rule(provider_results(provider, case, inputs), same, exact, dtype, terms, note)

    def forget_references(self) -> None:
        self.references.clear()
