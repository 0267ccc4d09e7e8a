"""Whole models: a training step, a forward pass, and decoding with each kind of cache; stock with SDPA beside neural ones."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, StaticCache, set_seed

from benchmarks.correctness import Check
from benchmarks.time_and_memory import Limits
from hf_neural_attention import NeuralCache, set_backend, use_backend
from hf_neural_attention.models.neural_attention_cache import CACHE_ARGUMENT, cache_nbytes
from tools.timing_by_turns import Runner, Spread, ratio_of
from training.arms import Arm
from training.model_families import GPT2, VIT, ModelFamily


STOCK = "stock, SDPA"
COMPACT = 'neural_layers="all", neural_compact=True'
# Sets fields of the config, beside those that a family adds for its compact form
ATTENTIONS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "neural_layers=[0]": {"neural_layers": [0]},
    'neural_layers="all"': {"neural_layers": "all"},
    COMPACT: {"neural_layers": "all", "neural_compact": True},
}
NEW_TOKENS = 16

# Makes a cache of that name from a model and the number of tokens that there must be room for
CACHES: dict[str, Callable[[Any, int], Any]] = {
    "DynamicCache": lambda model, room: DynamicCache(config=model.config),
    "StaticCache": lambda model, room: StaticCache(model.config, room),
    "NeuralCache": lambda model, room: NeuralCache(model),
    "NeuralCache, fixed size": NeuralCache,
}


class SizedFamily(NamedTuple):
    """A family at the sizes that its stock config has by default, and what those are called."""

    name: str
    classes: ModelFamily
    compact_shape: tuple[int, int]  # hidden layers of its compact form


GPT2_124M = SizedFamily("GPT-2 124M", GPT2, (2, 1))
VIT_BASE = SizedFamily("ViT-B/16", VIT, (16, 2))


def build_models(family: SizedFamily, attentions: list[str], device: str, **fields: Any) -> dict[str, Any]:
    """Models with random weights, the same but for the scorers. `fields` of the config; by default the stock one's sizes."""
    set_seed(0)
    dot, neural = family.classes[Arm.DOT], family.classes[Arm.NEURAL]
    stock: Any = dot.model(dot.config(**fields, attn_implementation="sdpa"))
    models = {}
    for attention in attentions:
        model = stock
        if attention != STOCK:
            own = ATTENTIONS[attention] | ({"neural_hidden_dims": family.compact_shape} if attention == COMPACT else {})
            model = neural.model(neural.config(**fields, **own, attn_implementation="sdpa"))
            kept = model.state_dict()
            same = {name: tensor for name, tensor in stock.state_dict().items() if tensor.shape == kept[name].shape}
            model.load_state_dict(same, strict=False)
        models[attention] = model.to(device)
    return models


def draw_batch(family: SizedFamily, config: Any, batch_size: int, device: str) -> dict[str, Any]:
    """Random tokens, as many as the model takes, or images, with labels."""
    if family is GPT2_124M:
        tokens = torch.randint(config.vocab_size, (batch_size, config.n_positions))
        return {"input_ids": tokens.to(device), "labels": tokens.to(device), "use_cache": False}
    pixels = torch.randn(batch_size, config.num_channels, config.image_size, config.image_size)
    labels = torch.randint(config.num_labels, (batch_size,))
    return {"pixel_values": pixels.to(device), "labels": labels.to(device)}


def set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def precision(device: str) -> torch.autocast:
    """That of a step: bfloat16 under autocast on GPUs, where models are trained so, and float32 on CPUs."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")


@contextmanager
def chosen_backend(name: str | None) -> Iterator[None]:
    """Chooses it for all threads: on GPUs, gradient checkpointing runs a forward pass in those of autograd, which do not see
    `use_backend`."""
    set_backend(name)
    try:
        yield
    finally:
        set_backend(None)


def named_precision(name: str, device: str) -> str:
    """What a step's name says where a table has several: on GPUs, decoding is not under autocast, as in `generate`."""
    return "" if device == "cpu" else f", {name}"


def step_results(model: Any, batch: dict[str, Any], device: str, backend: str | None = None) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of the loss with respect to all parameters, as one vector; float64 models stay in float64."""
    model.zero_grad()
    with chosen_backend(backend):
        with nullcontext() if model.dtype == torch.float64 else precision(device):
            output = model(**batch)
        output.loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return {"logits": output.logits.detach(), "gradient": torch.cat(gradients)}


def check_step(model: Any, batch: dict[str, Any], device: str) -> Check:
    """Logits and gradient of a step without dropout against the reference backend in float64, on the inputs that are timed.

    Errors by their norms, at most twice those of the reference backend in the same precision, and one rounding: in the largest
    ones alone it would show which ReLUs rounding has opened.
    """
    model = copy.deepcopy(model).train()
    set_dropout(model, 0.0)
    ours = step_results(model, batch, device)
    # saves memory, since the reference holds all pairs of a layer; Transformers before 5.23 has the second name alone
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    same = step_results(model, batch, device, "reference")
    widened = {name: value.double() if name == "pixel_values" else value for name, value in batch.items()}
    exact = step_results(model.double(), widened, device, "reference")
    for name, expected in exact.items():
        error, usual = ((results[name].double() - expected).norm().item() for results in (ours, same))
        allowed = 2 * usual + torch.finfo(ours[name].dtype).eps * expected.norm().item()
        if not error <= allowed:
            return Check(False, f"does not match the reference (error of {name} {error:.3g}, allowed {allowed:.3g})")
    return Check(True, "logits and gradient, without dropout")


def training_runner(model: Any, batch: dict[str, Any], device: str) -> Runner:
    """Forward, backward and a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run(_: Any) -> None:
        model.train()
        with precision(device):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Runner(run, device=device)


def forward_runner(model: Any, batch: dict[str, Any], device: str) -> Runner:
    @torch.no_grad()
    def run(_: Any) -> None:
        model.eval()
        with precision(device):
            model(**batch)

    return Runner(run, device=device)


def timed_rows(
    shared: dict[str, Any], arms: list[dict[str, Any]], runners: dict[int, Runner], limits: Limits
) -> Iterator[dict[str, Any]]:
    """A row for each arm, the first of which is what the others are compared with; only those with a runner are timed."""
    times = limits.times_of(runners)
    for index, arm in enumerate(arms):
        row = {**shared, **arm}
        if index in times:
            row |= {**Spread.of(times[index]).fields("seconds"), "turns": len(times[index])}
            row |= ratio_of(times[index], times[0]).fields("to_stock") if 0 in times else {}
        yield row


def measure_steps(
    family: SizedFamily,
    device: str,
    limits: Limits,
    batch_size: int,
    dropouts: tuple[float, ...],
    forward: bool,
    attentions: Sequence[str] = tuple(ATTENTIONS),
    **fields: Any,
) -> Iterator[dict[str, Any]]:
    """A training step with each dropout, and a forward pass if wanted, of the stock model and the neural ones by turns."""
    models = build_models(family, list(attentions), device, **fields)
    batch = draw_batch(family, models[STOCK].config, batch_size, device)
    checks = {name: check_step(model, batch, device) for name, model in models.items() if name != STOCK}
    arms = [
        {"attention": name, "parameters": model.num_parameters(), "note": checks[name].message if name in checks else ""}
        for name, model in models.items()
    ]
    allowed = {index: model for index, (name, model) in enumerate(models.items()) if name == STOCK or checks[name].passed}
    size = f"{batch_size} x {batch['input_ids'].shape[1]:,} tokens" if family is GPT2_124M else f"{batch_size} images"
    for dropout in dropouts:
        for model in allowed.values():
            set_dropout(model, dropout)
        runners = {index: training_runner(model, batch, device) for index, model in allowed.items()}
        step = f"training step, {size}, dropout {dropout}{named_precision('bfloat16', device)}"
        shared = {"model": family.name, "step": step, "dropout": dropout}
        yield from timed_rows(shared, arms, runners, limits)
    if forward:
        runners = {index: forward_runner(model, batch, device) for index, model in allowed.items()}
        yield from timed_rows(
            {"model": family.name, "step": f"forward, {size}{named_precision('bfloat16', device)}"}, arms, runners, limits
        )


@torch.no_grad()
def fill_cache(model: Any, cache: Any, prompt: torch.Tensor) -> list[int]:
    """Continues the prompt greedily; the cache then holds it and more. Returns the new tokens."""
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        disable_compile=True,
    )
    return tokens[0, prompt.shape[1] :].tolist()


def shorten(cache: Any, length: int) -> None:
    """Forgets all but the first `length` tokens."""
    excess = int(cache.get_seq_length()) - length
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):  # keeps a cache of fixed size: what comes next is written over the rest
            layer.cumulative_length.sub_(excess)
        else:
            layer.crop(-excess)


def decode_runner(model: Any, cache: Any, prompt: torch.Tensor, device: str) -> Runner:
    """One token more after the prompt."""

    @torch.no_grad()
    def run(_: Any) -> None:
        model(prompt[:, -1:], logits_to_keep=1, **{CACHE_ARGUMENT: cache})

    return Runner(run, lambda: shorten(cache, prompt.shape[1]), most_calls=1, device=device)


def measure_decoding(
    cached_tokens: int, attentions: list[str], caches: list[str], device: str, limits: Limits, **fields: Any
) -> Iterator[dict[str, Any]]:
    """Time and bytes of a token in GPT-2 with each attention and kind of cache, by turns.

    First, all caches of a model must lead to the same tokens, which are those of the blockwise backend with a DynamicCache.
    """
    room = cached_tokens + NEW_TOKENS
    # Unties embeddings, since a tied random model repeats the token before, which agrees with anything; nor may it end early
    fields = {"n_positions": room, "tie_word_embeddings": False, "eos_token_id": None, "bos_token_id": None, **fields}
    models = build_models(GPT2_124M, attentions, device, **fields)
    prompt = torch.randint(models[STOCK].config.vocab_size, (1, cached_tokens)).to(device)
    arms: list[dict[str, Any]] = []
    runners = {}
    for attention, model in models.items():
        model.eval()
        with use_backend("blockwise"):
            expected = fill_cache(model, DynamicCache(config=model.config), prompt)
        for name in caches:
            if attention in (STOCK, COMPACT) and name.startswith("Neural"):
                continue  # have no keys that a scorer would make smaller
            cache = CACHES[name](model, room)
            same = fill_cache(model, cache, prompt) == expected and len(set(expected)) > 2
            shorten(cache, cached_tokens)
            arm: dict[str, Any] = {"attention": attention, "cache": name, "note": "same tokens"}
            if same:
                runners[len(arms)] = decode_runner(model, cache, prompt, device)
                tokens = room if "Static" in name or "fixed" in name else cached_tokens
                arm["bytes_per_token"] = cache_nbytes(cache) / tokens
            else:
                arm["note"] = (
                    f"other tokens than with the blockwise backend and a DynamicCache, or too few of them: {expected}"
                )
            arms.append(arm)
    step = f"decode, {cached_tokens:,} cached tokens{named_precision('float32', device)}"
    shared = {"model": f"{GPT2_124M.name}, untied", "step": step, "cached_tokens": cached_tokens}
    yield from timed_rows(shared, arms, runners, limits)
