"""`calibrate`: fits scorers to the dot-product attention in whose place they are, before any training of the model.

Layer by layer, in the order in which they run: queries and keys are what the layer gets when the layers before it are
calibrated already, as they will be when the model runs. A layer that runs several times in a forward (ALBERT's one layer) is
fitted to all of its calls at once, with dot products in the earlier ones. What is minimised is the KL divergence of the
network's attention rows from the dot product's, over the scorer's weights alone.
"""

import copy
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from tqdm.auto import tqdm

from ..attending import NUMBERS_AT_ONCE, attend, attend_by_dot_products
from ..introspection import Call, call_of, left_as_it_was, moved, neural_layers, observed, once, place_of, unwrap
from ..models.neural_attention_names import forget_names
from ..models.neural_attention_reference import key_features, reference_scores
from .errors import PatchError
from .layers import tokens_of_queries
from .patching import check_unsharded, check_weights_together, check_whole
from .records import check_plain
from .reports import table


ROWS_OF_AN_EVALUATION = 64


class CalibratedLayer(NamedTuple):
    """What calibration did to one layer. Divergences are in nats per attention row, over batches that were not fitted,
    or over the one batch that there is."""

    layer: str
    kl_before: float
    kl_after: float
    kl_uniform: float  # of attention that is the same for all keys: what a scorer without any knowledge has
    seconds: float


class CalibrationReport(tuple[CalibratedLayer, ...]):
    """One `CalibratedLayer` per neural layer, in the order of the model. `str()` makes a table of it."""

    def __str__(self) -> str:
        rows = [(layer.layer, *(f"{number:.4g}" for number in layer[1:])) for layer in self]
        return table([CalibratedLayer._fields, *rows])

    __repr__ = __str__


class LayerReached(Exception):
    """Ends a forward at the layer that was to be seen."""


def calibrate(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    steps: int = 300,
    learning_rate: float = 1e-2,
    max_batches: int = 8,
    progress: bool = True,
) -> CalibrationReport:
    """Fits each scorer of a model with mode `"replace"` (or `"thin"`) to the dot-product attention of its layer, in place.

    Nothing but the scorers' weights changes, and a layer whose divergence would not become smaller keeps what it has.

    Args:
        model (`nn.Module`): A model that `patch(..., mode="replace")` has changed, or one of this package's own classes with
            the weights of a stock checkpoint. Not compiled, wrapped or sharded for training yet; peft may be around it.
        data (iterable of `dict`): Batches of arguments for the model's forward, a `DataLoader` for instance. Every fourth,
            and one if there are two or more, is kept for the report. What their `attention_mask` calls padding does not count.
        steps (`int`): Of the optimiser, for each layer; each takes some queries of one batch. Default: 300.
        learning_rate (`float`): Of AdamW without weight decay, falling to zero along a cosine. Default: 0.01.
        max_batches (`int`): How much of `data` is used. Default: 8.
        progress (`bool`): Show a bar. Default: True.

    Returns:
        `CalibrationReport`: for each layer the divergence before and after; printing it shows a table.

    Raises:
        PatchError: if the model has no neural layer, a layer has mode `"residual"` (it computes the dot product already) or
            is compact (it has no queries and keys), or the batches do not reach a layer. All scorers are what they were then.
        ValueError: if there is no data, it is one batch instead of several in a list or loader, a number is out of range, or
            it is called under `torch.inference_mode()`.
    """
    for name, number in (("steps", steps), ("max_batches", max_batches), ("learning_rate", learning_rate)):
        if not number > 0:
            raise ValueError(f"`{name}` is {number!r}; it must be positive.")
    if torch.is_inference_mode_enabled():
        raise ValueError("`calibrate` trains scorers: call it outside of `torch.inference_mode()`.")
    check_unsharded(model)
    check_weights_together(model, "calibrated")
    base = unwrap(model)
    layers = once({name: module for name, module, _ in neural_layers(base)})
    if not layers:
        raise PatchError(f'This {type(base).__name__} has no neural layer; `patch(model, mode="replace")` first.')
    check_whole(base, "calibrated")
    for name, module in layers.items():
        check_plain(name, module.scorer)
        if module.scorer.q_proj.weight.is_meta:
            raise PatchError(f"The scorer of {name!r} is offloaded; calibrate the model where it is in memory.")
    if residual := [name for name, module in layers.items() if module.scorer.mode == "residual"]:
        raise PatchError(
            f'{", ".join(residual)}: mode "residual" computes the dot product\'s attention already, until it is trained. '
            'Calibration is for mode "replace".'
        )
    if isinstance(data, Mapping):
        raise ValueError("`data` is one batch; expected several: a `DataLoader`, or a list of dicts.")
    batches = [dict(batch) for batch in itertools.islice(data, max_batches)]
    if not batches:
        raise ValueError("`data` has no batches; `calibrate` needs at least one dict of arguments for the model's forward.")
    report = []
    kept = {module: copy.deepcopy(module.scorer.state_dict()) for module in layers.values()}
    with left_as_it_was(base) as device, tqdm(total=len(layers) * steps, desc="calibrating", disable=not progress) as bar:
        batches = moved(batches, device)
        try:
            numbers = numbers_of_calls(base, layers, batches)
            for name, number in numbers.items():
                bar.set_postfix_str(name)
                calls = capture(base, name, layers[name], batches, number)
                report.append(calibrate_layer(name, layers[name], calls, steps, learning_rate, bar))
        except BaseException:
            for module, state in kept.items():
                module.scorer.load_state_dict(state)
            raise
    forget_names(model)
    order = list(layers)
    return CalibrationReport(sorted(report, key=lambda layer: order.index(layer.layer)))


@torch.no_grad()
def numbers_of_calls(model: nn.Module, layers: dict[str, Any], batches: list[dict[str, Any]]) -> dict[str, int]:
    """How often each layer calls its attention function in a forward at most, in the order of their first calls."""
    names, most = {module: name for name, module in layers.items()}, dict[str, int]()

    def count(module: Any, *args: Any, **kwargs: Any) -> Any:
        counts[names[module]] += 1
        return attend(module, *args, **kwargs)

    with observed(layers.values(), count):
        for batch in batches:
            counts = Counter[str]()
            model(**batch)
            if missed := next((name for name in layers if not counts[name]), None):
                raise PatchError(f"`data` does not reach {missed!r}: a forward ended without calling its attention.")
            most = {name: max(number, most.get(name, 0)) for name, number in counts.items()}
    return most


@torch.no_grad()
def capture(model: nn.Module, name: str, module: Any, batches: list[dict[str, Any]], number: int) -> list[list[Call]]:
    """The calls of one layer's attention function in each batch, without padding; the forward ends at the last of `number`."""
    calls: list[Call] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        calls.append(call_of(*args, **kwargs))
        if len(calls) == number:
            raise LayerReached
        return attend_by_dot_products(*args, **kwargs)

    captured = []
    with observed([module], keep):
        for batch in batches:
            with suppress(LayerReached):
                model(**batch)
            tokens = [tokens_of_queries(model, name, module, batch, call) for call in calls]
            captured.append([call.without_padding(each) for call, each in zip(calls, tokens, strict=True)])
            calls.clear()
    return captured


def in_turns(batches: list[list[Call]]) -> list[Call]:
    """The calls of some batches, one of each batch after the other, so that few steps see something of every batch."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(batch), generator=generator).tolist() for batch in batches]
    mixed = [[batch[place] for place in order] for batch, order in zip(batches, orders, strict=True)]
    return [call for turn in itertools.zip_longest(*mixed) for call in turn if call is not None]


def calibrate_layer(
    name: str, module: Any, calls: list[list[Call]], steps: int, learning_rate: float, bar: tqdm
) -> CalibratedLayer:
    started = time.perf_counter()
    kept = range(3, len(calls), 4) or range(1, len(calls))[-1:]
    fitted = in_turns([batch for index, batch in enumerate(calls) if index not in kept])
    held_out = [call for index in kept for call in calls[index]] or fitted
    # fits in float32 whatever the model's dtype is, since steps this small would be lost in bfloat16
    scorer = copy.deepcopy(module.scorer).float().requires_grad_()
    if scorer.linear3 is not None:
        # fits it only where it counts, beside sinks
        scorer.linear3.bias.requires_grad_(any(call.sinks is not None for call in fitted))
    before = mean_divergence(scorer, held_out)
    fit(scorer, fitted, steps, learning_rate, bar)
    # measures what the model will have, in its own dtype
    after = mean_divergence(copy.deepcopy(scorer).to(place_of(module.scorer)[1]).float(), held_out)
    if after < before:
        module.scorer.load_state_dict(scorer.state_dict())
    uniform = mean_divergence(None, held_out)
    return CalibratedLayer(name, before, min(before, after), uniform, time.perf_counter() - started)


@torch.enable_grad()
def fit(scorer: Any, calls: list[Call], steps: int, learning_rate: float, bar: tqdm) -> None:
    """Minimises the divergence over random queries of the calls in turn."""
    # imports here, since this brings in peft, if it is installed: seconds that not every user should wait
    from transformers import get_cosine_schedule_with_warmup

    parameters = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        call = calls[step % len(calls)]
        rows = torch.randperm(call.query.shape[2], generator=generator)[: rows_at_once(scorer, call)].to(call.query.device)
        optimizer.zero_grad()
        total, count = divergence(scorer, call, rows)
        (total / max(1, count)).backward()
        optimizer.step()
        schedule.step()
        bar.update()


def rows_at_once(scorer: Any, call: Call) -> int:
    """How many queries of a call are looked at together, so that memory stays bounded."""
    batch, heads = call.query.shape[:2]
    numbers = 1 if scorer is None else scorer.hidden_dims[0]
    return max(1, NUMBERS_AT_ONCE // (batch * heads * call.key.shape[2] * numbers))


@torch.no_grad()
def mean_divergence(scorer: Any, calls: list[Call]) -> float:
    """Over queries spread evenly."""
    means = []
    for call in calls:
        count = min(ROWS_OF_AN_EVALUATION, call.query.shape[2])
        rows = torch.linspace(0, call.query.shape[2] - 1, count, device=call.query.device).round().long()
        parts = [divergence(scorer, call, part) for part in rows.split(rows_at_once(scorer, call))]
        means.append(sum(total.item() for total, _ in parts) / max(1, sum(count for _, count in parts)))
    return sum(means) / len(means)


def divergence(scorer: Any, call: Call, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """KL(dot product || network), summed over the chosen queries of all heads and examples that may see any key, and how many
    these are.

    Args:
        scorer: a `NeuralScorer`, or None for attention that is the same for all keys.
        rows: `[rows]`, indices of queries.
    """
    target = call.masked_rows(call.dot_products(rows), rows)
    if scorer is None:
        # keeps what the mask adds, biases of positions included, since it is no part of the scores
        scores = call.masked_rows(torch.zeros_like(target), rows)
    else:
        weights = scorer.weights()
        keys = key_features(call.key, weights)  # projects once per key, not once per pair
        query = call.query[:, :, rows]
        scores = call.masked_rows(reference_scores(query, keys, weights, keys_projected=True), rows)
    seen = (target > float("-inf")).any(-1)
    if call.sinks is not None:
        column = call.sinks.view(1, -1, 1, 1).expand(*target.shape[:-1], 1)
        target, scores = torch.cat((target, column), dim=-1), torch.cat((scores, column), dim=-1)
    # clamps to a finite number, since 0 * -inf is NaN; it is low enough to be zero after the softmax
    lowest = torch.finfo(target.dtype).min / 2
    target, scores = (log_softmax(each.clamp_min(lowest), dim=-1)[seen].clamp_min(-1e4) for each in (target, scores))
    return kl_div(scores, target, reduction="sum", log_target=True), len(target)
