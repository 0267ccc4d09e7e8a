"""`start_scores`: sets how far attention scores spread in a model that is to be trained."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Cache

from ..attending import attend
from ..introspection import Call, call_of, left_as_it_was, looked_at, moved, observed, unwrap
from ..patching.layers import Layers, attention_modules, choose_layers, listed, tokens_of_queries
from ..patching.patching import check_unsharded, check_weights_together
from ..patching.probing import probe
from ..patching.reports import table
from ..patching.tracing import run_until_reached
from ..scores import statistics_of_layer
from .closed_form import ASK, spread_in_closed_form
from .sources import Source, Sources, is_norm, merged, offset_of_gain, rms


# Allows the measured spread to be this far from the one that was asked for, relative to it
TOLERANCE = 0.02


class StartedLayer(NamedTuple):
    """What `start_scores` did to one attention layer."""

    layer: str
    scorer: str  # "dot product", or the mode of its scorer
    changed: str  # names of the layers in it whose weights (and biases) were multiplied
    factor: float  # by this
    before: float  # spread of its scores
    after: float


class ScoreStart(tuple[StartedLayer, ...]):
    """One `StartedLayer` per attention layer that the run reached, in the order of the model. `str()` makes a table of it."""

    measured: bool  # on inputs; otherwise in closed form
    unreached: tuple[str, ...] = ()  # names of attention layers that the run did not reach, and that are as they were

    def __str__(self) -> str:
        rows = [(*each[:3], *(f"{number:.4g}" for number in each[3:])) for each in self]
        how = "measured" if self.measured else "in closed form"
        left = f"; not reached, and left as they were: {listed(self.unreached)}" if self.unreached else ""
        return f"{table([StartedLayer._fields, *rows])}\n{how}{left}"

    __repr__ = __str__


@dataclass
class Plan:
    """What is to be scaled in one layer, and how far its scores spread."""

    scorer: str
    sources: list[Source]  # empty if the scorer itself is scaled
    degree: int  # of the scores, in all that is scaled
    spread: float
    cap: float | None  # of its dot products
    later: list[float] = field(default_factory=list)  # spreads of further runs in the same forward

    @property
    def goes_to_zero(self) -> bool:
        """Whether the scores are zero for ever once they are: gradients of queries need keys, and the other way round."""
        return (
            self.scorer == "dot product" and self.degree == 2 and not any(offset_of_gain(each.layer) for each in self.sources)
        )

    def factor(self, wanted: float) -> float:
        return (wanted / self.spread) ** (1 / self.degree)


def start_scores(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    spread: float = 1.0,
    *,
    layers: Layers | None = None,
    allow_trained: bool = False,
) -> ScoreStart:
    """Scales weights of a new model, in place, so that the scores of each attention layer start with a given spread.

    Stock initialisations make query and key weights of one small size, whatever the width of the model: scores start near zero
    there, and attention uniform. Models with embeddings that are not normalised start with scores so large that attention is
    saturated. The spread is the standard deviation of scores within rows (a row: a query of one head and example), after the
    model's own scaling (`1 / sqrt(head_dim)` in most) and soft cap, before masks and biases of positions, over the keys that
    the row may see; pooled over all rows of the layer (root of the mean variance, each row counted by its degrees of freedom),
    as `analysis.score_statistics` has it. A layer that runs several times in one forward is refused if its runs would differ
    on `inputs` (ALBERT's), since no factor is right for all of them.

    What is multiplied: the weights and biases that make queries and keys (gains of the norms that come after them, if there
    are such), both by the same factor: by its square root in layers of the dot product, thin or not, whose scores grow with
    both. Fused projections keep their values. A layer whose queries or keys make values as well has the other one scaled
    alone. Frozen weights are multiplied like others. Scorers with biases (`init="paper"`) are scaled themselves: the last
    layer, or both of mode `"thin"`. Nothing is drawn anew.

    Args:
        model (`nn.Module`): A new model: stock, patched, or of this package's own classes, compact or not, whose attention
            modules fetch their function from Transformers' `AttentionInterface`.
        inputs (`dict`, *optional*): A batch for the model's forward. The spread is then measured on it, layer by layer, each
            with the layers before it started already. Without it, the spread comes in closed form for hidden states as a norm
            hands them on, independent from token to token; those of real data have something in common, so they measure less
            (about 0.7 of it in a small ViT). A layer whose input no norm makes needs `inputs`.
        spread (`float`): Default: 1.0, that of the dot product of unit-normal queries and keys. Zero is for controls, and for
            dot products alone: query and key weights of zero get no gradient from each other, so attention is uniform and
            stays so, however long the model is trained. For a start that is almost uniform and learns, take 0.01.
        layers (*optional*): Which attention layers, as `patch` takes them: indices, names, a predicate, or `"all"` that attend
            to their own tokens. Default: every attention layer that the run reaches, cross-attention included.
        allow_trained (`bool`): Change a model also if it seems trained. A model seems trained if gains or biases of one of its
            norms differ: they start equal, and training changes them at once, but for gains in pure bfloat16, which may stay
            equal. Where no norm has any, a model seems trained that was loaded by a name. Default: False.

    Returns:
        `ScoreStart`: for each attention layer what was multiplied and the spread before and after, and in `unreached` the
        names of those that the run did not reach; printing it shows a table.

    Raises:
        ValueError: if `spread` is negative or not finite, or `inputs` is no dict; under `torch.inference_mode()`; if a cache
            in `inputs` is not empty, or peft adds virtual tokens; if `layers` chooses none, or one that is not there
            (PatchError) or names one that the run does not reach; if the model seems trained; or if a layer's spread cannot be
            set, with the reason. The model is then what it was.
    """
    if not is_spread(spread):
        raise ValueError(f"`spread` is {spread!r}; it must be a finite number of at least zero.")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ValueError(
            f"`inputs` is a {type(inputs).__name__}; expected a dict of what the model's forward takes: "
            "{'input_ids': ...}, say."
        )
    if is_prompted(model):
        raise ValueError(
            "This model has virtual tokens of peft's, which this would leave out. Start the model that `get_peft_model` gets."
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("`start_scores` takes derivatives: call it outside of `torch.inference_mode()`.")
    if any(isinstance(given, Cache) and given.get_seq_length() for given in (inputs or {}).values()):
        raise ValueError("A cache among the `inputs` holds keys already, which no longer grow. Leave it out.")
    base = unwrap(model)
    check_unsharded(model, "Start")
    check_weights_together(model, "started")
    modules = attention_modules(base)
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(f"This {type(base).__name__} has weights without numbers (on the meta device, or offloaded).")
    if not allow_trained and (sign := sign_of_training(base)) is not None:
        raise ValueError(
            f"This {type(base).__name__} seems to be trained: {sign}. Other scores would undo what it has learned. To change "
            "it all the same, say `allow_trained=True`; to fit new scorers to a checkpoint, use `calibrate`."
        )
    layers = list(layers) if isinstance(layers, Iterator) else layers
    named = {each for each in layers if isinstance(each, str)} if isinstance(layers, list | tuple | set) else set()
    if layers is not None:
        calls, reasons = probe(base, modules, inputs)
        modules = {name: modules[name] for name in choose_layers(layers, modules, calls, reasons, "inputs")}
    with restored_after_errors(base):
        before, factors = survey(base, modules, inputs, spread)
        unreached = [name for name in modules if name not in before]
        if missing := [name for name in unreached if name in named]:
            raise ValueError(f"No run of the model reached {listed(missing)}, which `layers` names. Give `inputs` that do.")
        # takes zero as it is, since weights of zero show no more what they make
        again = survey(base, modules, inputs, None)[0] if spread else {}
        after = {name: plan.spread for name, plan in again.items()}
        wrong = [name for name in before if spread and not abs(after[name] / spread - 1) < TOLERANCE]
        if wrong:
            if caps := [cap for name in wrong if (cap := before[name].cap) is not None]:
                raise ValueError(
                    f"The scores of {listed(wrong)} cannot spread by {spread}: dot products are capped at {min(caps)} there, "
                    f"and spread by {min(after[name] for name in wrong):.3g} instead. Ask for a smaller spread."
                )
            raise ValueError(f"The scores of {listed(wrong)} do not grow as expected with the weights that make them.")
        for name, plan in again.items():
            if not all(abs(each / spread - 1) < TOLERANCE for each in plan.later):
                spreads = [plan.spread, *plan.later]
                raise ValueError(
                    f"The scores of {name!r} cannot be set: it runs several times in one forward, on other states each time, "
                    f"and they would spread by {min(spreads):.3g} to {max(spreads):.3g}. No one factor is right for all runs."
                )
    report = ScoreStart(
        StartedLayer(name, plan.scorer, changed_in(plan), factors[name], plan.spread, after.get(name, 0.0))
        for name, plan in before.items()
    )
    report.measured, report.unreached = inputs is not None, tuple(unreached)
    return report


def is_spread(value: Any) -> bool:
    """Whether it is a finite number of at least zero, of any type of numbers."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return 0 <= float(value) < math.inf
    except OverflowError:
        return False


def is_prompted(model: Any) -> bool:
    """Whether peft puts virtual tokens before the others (prefix and prompt tuning)."""
    config = getattr(extract_model_from_parallel(model, keep_torch_compile=False), "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def sign_of_training(model: nn.Module) -> str | None:
    """What shows that a model has been trained, in words."""
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    for name, norm in norms.items():
        for kind, numbers in (("gains", norm.weight), ("biases", getattr(norm, "bias", None))):
            if numbers is not None and numbers.min() != numbers.max():
                return f"the {kind} of {name!r} differ, which start equal"
    name = getattr(model, "name_or_path", "")
    return f"it was loaded from {name!r}, and no norm of it has gains that would show more" if name and not norms else None


def changed_in(plan: Plan) -> str:
    own = "scorer" if plan.scorer == "thin" else "scorer.linear3"
    return ", ".join(dict.fromkeys(source.name for source in plan.sources)) or own


@contextmanager
def restored_after_errors(model: nn.Module):
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        raise


def survey(
    model: nn.Module, modules: Mapping[str, Any], inputs: Mapping[str, Any] | None, wanted: float | None
) -> tuple[dict[str, Plan], dict[str, float]]:
    """One run of the model: what there is to scale in each layer that it reaches, and by which factor it has been scaled so
    that its spread is the wanted one, if one is.

    Raises:
        ValueError: that says for each reason which layers it speaks against, or that no layer was reached.
    """
    sources = Sources(model, dict(modules))
    plans: dict[Any, Plan | str] = {}
    factors: dict[Any, float] = {}
    pending: set[Any] = set()  # modules whose forward has not called its attention function yet
    names = {module: name for name, module in modules.items()}

    def seen_call(module: Any, *args: Any, **kwargs: Any) -> Call:
        call = call_of(module, *args, **kwargs)
        if inputs is None:
            return call
        return call.without_padding(tokens_of_queries(model, names[module], module, inputs, call))

    def look(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in plans and module not in pending:
            plans[module] = "it calls its attention function several times in one forward"
        elif inputs is not None and wanted is None and isinstance(plan := plans.get(module), Plan):
            with torch.no_grad():
                plan.later.append(statistics_of_layer(module, seen_call(module, query, key, value, *args, **kwargs)).spread)
        pending.discard(module)
        if module not in plans:
            found = sources.of(module, query, key, value)
            query, key, value = query.detach(), key.detach(), value.detach()
            with torch.no_grad():
                call = seen_call(module, query, key, value, *args, **kwargs)
                plan = found if isinstance(found, str) else plan_of(module, *found, query, key, call, inputs is not None)
                if isinstance(plan, Plan) and wanted and inputs is None and is_capped(plan, wanted):
                    plan = f"its dot products are capped at {plan.cap}; {ASK}"
                if isinstance(plan, Plan) and (other := sources.sharer_of(plan.sources)) is not None:
                    plan = f"{other} has weights of its queries and keys too, and would be scaled as well"
                plans[module] = plan
                if wanted is not None and isinstance(plan, Plan):
                    try:
                        factors[module] = factor = carry_out(module, plan, wanted)
                    except ValueError as error:
                        plans[module] = str(error)
                    else:
                        query, key = (
                            states * factor if any(map(plan_has(plan), parts)) else states
                            for states, parts in zip((query, key), found, strict=True)
                        )
        with torch.no_grad():
            return attend(module, query, key, value, *args, **kwargs)

    with ExitStack() as stack:
        device = stack.enter_context(left_as_it_was(model))
        stack.enter_context(looked_at(model))
        stack.enter_context(sources.noted())
        stack.enter_context(observed(modules.values(), look))
        for module in modules.values():
            hook = module.register_forward_pre_hook(lambda module, args: pending.add(module))
            stack.callback(hook.remove)
        if inputs is not None:
            model(**moved(dict(inputs), device))
            failures = ""
        else:
            _, failures = run_until_reached(model, modules, plans.__contains__, None)
    # passes over what a run that went well does not reach, as cross-attention of a decoder by itself
    if failures and (missing := [name for name, module in modules.items() if module not in plans]):
        raise ValueError(
            f"No run of the model reached {listed(missing)}. {failures} Give `inputs` that do.".replace("  ", " ")
        )
    if not plans:
        raise ValueError(f"These inputs reach none of the attention layers of this {type(model).__name__}.")
    against: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(reason := plans.get(module), str):
            against.setdefault(reason, []).append(name)
    if against:
        reasons = "; ".join(f"{listed(names)}: {reason}" for reason, names in against.items())
        raise ValueError(f"The scores of these layers cannot be set: {reasons}. Nothing was changed.")
    reached = {name: module for name, module in modules.items() if module in plans}
    return {name: plans[module] for name, module in reached.items()}, {  # type: ignore[misc]
        name: factors[module] for name, module in reached.items() if module in factors
    }


def plan_has(plan: Plan) -> Any:
    return lambda source: any(source.layer is each.layer for each in plan.sources)


def plan_of(
    module: Any,
    of_query: list[Source],
    of_key: list[Source],
    query: torch.Tensor,
    key: torch.Tensor,
    call: Any,
    measured: bool,
) -> Plan | str:
    """What to scale in a layer, and how far its scores spread now; or in words why that cannot be."""
    scorer: Any = getattr(module, "scorer", None)
    is_dot = scorer is None or scorer.mode in ("residual", "thin")
    if scorer is not None and scorer.mode == "residual" and scorer.linear3.weight.any():
        return 'its network adds to the dot product already: a scorer of mode "residual" that is not new'
    sources = merged([*of_query, *of_key])
    degree = (bool(of_query) + bool(of_key)) if is_dot else 1
    has_layers = scorer is not None and any(layer is not None for layer in scorer.layers)
    if has_layers and scorer.mode != "residual" and (not of_query or not of_key or has_biases(scorer)):
        sources, degree = [], 2 if is_dot else 1  # scales the scorer itself
    elif not sources:
        return "what makes its queries and keys makes its values as well"
    if measured:
        found = statistics_of_layer(module, call)
        if math.isnan(found.uniform_entropy):
            return "no query of these inputs may see two keys or more: give longer `inputs`"
        spread: float | str = found.spread
    else:
        factors = tuple(
            rms(states) / max(rms(torch.cat([part.output().flatten() for part in parts])), 1e-30) if parts else 1.0
            for states, parts in ((query, of_query), (key, of_key))
        )
        spread = spread_in_closed_form(module, of_query, of_key, query.shape[-1], call.scaling, factors)  # type: ignore[arg-type]
    if isinstance(spread, str):
        return spread
    if not spread < math.inf:
        return "its scores are no numbers, or too large: look at its weights and at the inputs, or ask for a smaller spread"
    if spread == 0:
        why = "its scorer may be dead, draw another (`reset_parameters()`)" if scorer else "its weights may be zero"
        return f"its scores have a spread of {spread}, which no factor changes; {why}"
    cap = call.softcap if scorer is None or scorer.mode == "residual" else None
    return Plan("dot product" if scorer is None else scorer.mode, sources, degree, spread, cap)


def is_capped(plan: Plan, wanted: float) -> bool:
    """Whether a soft cap makes the spread of dot products smaller than the closed form has it, by a hundredth or more."""
    return plan.cap is not None and wanted > plan.cap / 10


def has_biases(scorer: Any) -> bool:
    """Whether scores do not grow as queries and keys do."""
    return any(bias is not None and bias.any() for bias in scorer.weights()[1:-2:2])


def carry_out(module: Any, plan: Plan, wanted: float) -> float:
    """Returns the factor by which it has scaled.

    Raises:
        ValueError: if that is not possible, with the reason.
    """
    if wanted == 0 and not plan.goes_to_zero:
        raise ValueError("a spread of zero would not stay zero, since only a dot product of both queries and keys stays there")
    factor = plan.factor(wanted)
    if not plan.sources and plan.scorer == "thin":
        for parameter in module.scorer.parameters():
            parameter.mul_(factor)
    elif not plan.sources:
        module.scorer.linear3.weight.mul_(factor)
    for source in plan.sources:
        source.scale(factor)
    return factor
