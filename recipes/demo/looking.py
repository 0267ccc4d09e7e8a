"""What the page shows, as data: opens models, reads texts and images, looks at attention, patches copies and compares them."""

import copy
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_neural_attention import analysis, calibrate, patch, patch_status


LONGEST = 256  # tokens of a text, so that a page is there in seconds
KEPT_MODELS = 3  # in memory, beside those that visitors have before them
MOST_PARAMETERS = 1_500_000_000  # of a model from the Hub, on machines as small as a free Space
SHOWN_SIDE = 512  # pixels of a picture that attention is laid over
TOP = 5  # predictions that are shown

# Lists what can be wrong with a file or folder that somebody names
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, ImportError, StrictDataclassError, SafetensorError)
NO_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, PIL.Image.DecompressionBombError)

# Maps the end of an architecture's name to what loads it, and what it predicts
HEADS: dict[str, tuple[Any, str | None]] = {
    "LMHeadModel": (AutoModelForCausalLM, "token"),
    "ForCausalLM": (AutoModelForCausalLM, "token"),
    "ForImageClassification": (AutoModelForImageClassification, "class"),
    "ForSequenceClassification": (AutoModelForSequenceClassification, "class"),
}


# Lists problems whose outputs are no shares of one, as those of a single output
NO_CHOICE = ("regression", "multi_label_classification")


class Mistake(ValueError):
    """What the visitor of the page can mend, in a sentence."""


@dataclass(frozen=True)
class Opened:
    """A model, with what makes inputs for it."""

    name: str
    model: Any
    reader: Any  # a tokenizer, or an image processor
    predicts: str | None  # "token", "class" or nothing
    unpatched: "Opened | None" = None  # what it was, if it was patched on the page

    @property
    def takes_images(self) -> bool:
        return self.model.main_input_name == "pixel_values"

    @property
    def is_neural(self) -> bool:
        return bool(patch_status(self.model))


@dataclass(frozen=True)
class Example:
    """What a model looks at."""

    inputs: dict[str, torch.Tensor]
    text: str = ""
    tokens: tuple[str, ...] = ()  # of the text
    image: PIL.Image.Image | None = None
    shown: PIL.Image.Image | None = None  # the image, as small as it is drawn


@dataclass(frozen=True)
class Look:
    """What a model makes of an example. Layers are counted from 0, in the order of the model."""

    opened: Opened
    example: Example
    names: list[str]  # of the layers' modules
    scorers: list[str]  # of the layers: "dot product", or the mode of the scorer
    maps: list[torch.Tensor]  # of the layers: [heads, queries, keys]
    dot_products: dict[int, torch.Tensor]  # neural layer -> the dot product's map of the same queries and keys
    seen: dict[int, analysis.QueriesAndKeys]  # neural layer -> what its scorer sees
    scores: analysis.ScoreStatistics | None  # None where they cannot be looked at
    health: analysis.ScorerHealth | None  # None without a network
    logits: torch.Tensor | None  # [tokens, vocabulary], or [classes]

    @property
    def heads(self) -> int:
        return min(weights.shape[0] for weights in self.maps)

    def surface(self, layer: int, head: int) -> analysis.ScoreSurface | None:
        """Of a neural layer, where the head's queries and keys are; None for others."""
        if layer not in self.seen:
            return None
        scorer: Any = self.opened.model.get_submodule(self.names[layer]).scorer
        return analysis.surface_around(scorer, self.seen[layer], head)


def in_one_line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def local_models(folder: Path = Path("runs")) -> list[str]:
    """Folders below this one with a model in them, but for checkpoints of runs; what `make quickstart` leaves comes first."""
    found = [path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/config.json")]
    kept = [path.as_posix() for path in found if not path.name.startswith("checkpoint-")]
    return sorted(kept, key=lambda name: ("quickstart" not in name, not name.endswith("neural"), name))


def open_model(name: str) -> Opened:
    """A model from a folder or the Hub, stock or neural, in evaluation mode. The last ones are kept, for all visitors alike.

    Raises:
        Mistake: if there is none, or it cannot be shown here.
    """
    name = name.strip()
    check_name(name)
    folder = Path(name)
    changed = max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0) if folder.is_dir() else 0
    return load_model(name, changed)


@lru_cache(maxsize=KEPT_MODELS)
def load_model(name: str, changed: int) -> Opened:
    """See `open_model`; a folder that has changed since is read anew."""
    try:
        config = AutoConfig.from_pretrained(name)
        architecture = next(iter(config.architectures or ()), "")
        auto, predicts = next((HEADS[end] for end in HEADS if architecture.endswith(end)), (AutoModel, None))
        if not Path(name).is_dir():
            check_size(auto, config, name)
        if predicts == "class" and (config.num_labels == 1 or config.problem_type in NO_CHOICE):
            predicts = None
        model = auto.from_pretrained(name).eval()
    except Mistake:
        raise
    except Exception as error:
        if not isinstance(error, UNREADABLE) and not is_pickled(error):
            raise
        raise Mistake(what_is_wrong(name, error)) from None
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise Mistake(f"{name} takes `{model.main_input_name}`; this page has texts and images alone.")
    if model.config.is_encoder_decoder:
        raise Mistake(f"{name} has an encoder and a decoder; this page shows models with one stack of layers.")
    try:
        takes_images = model.main_input_name == "pixel_values"
        reader = (
            AutoImageProcessor.from_pretrained(name, backend="pil") if takes_images else AutoTokenizer.from_pretrained(name)
        )
    except UNREADABLE as error:
        what = "image processor" if takes_images else "tokenizer"
        raise Mistake(f"The {what} of {name} cannot be loaded: {in_one_line(error)}") from None
    if not takes_images and len(reader) <= len(reader.all_special_tokens):  # is what Transformers makes of no files
        raise Mistake(f"{name} has no tokenizer, so it cannot read a text.")
    return Opened(name, model, reader, predicts)


def check_name(name: str) -> None:
    """Raises a Mistake if this is neither a folder with a model nor what the Hub could have."""
    path = Path(name)
    if not name:
        raise Mistake("Type a folder with a model in it, or a model's name on the Hub.")
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise Mistake(f"This name cannot be looked up: {in_one_line(getattr(error, 'strerror', error))}") from None
    if is_folder:
        if not (path / "config.json").exists():
            inside = local_models(path)
            hint = f" These folders in it do: {', '.join(inside[:5])}." if inside else ""
            raise Mistake(f"The folder {name} has no config.json, so it holds no model.{hint}")
    elif is_there:
        raise Mistake(f"{name} is a file; expected a folder with a model in it, or a model's name on the Hub.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise Mistake(f"There is no folder {name}, and a name on the Hub looks like openai-community/gpt2.")


def check_size(auto: Any, config: Any, name: str) -> None:
    """Raises a Mistake before a model is downloaded that is too large."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise Mistake(f"{name} has {size:,} parameters; this page takes up to {MOST_PARAMETERS:,}.")


def is_pickled(error: BaseException) -> bool:
    """Whether weights are pickles, and damaged or more than weights; by the error's name, since nothing here unpickles."""
    return type(error).__name__ == "UnpicklingError"


def what_is_wrong(name: str, error: BaseException) -> str:
    if is_pickled(error):
        return f"The weights of {name} are damaged, or are more than weights, which is not read here."
    if Path(name).is_dir():
        return f"The model in {name} cannot be loaded: {in_one_line(error)}"
    if isinstance(error, OSError):
        return f"{name} is neither a folder here nor a model that the Hub gives out, or the Hub cannot be reached."
    return f"{name} cannot be loaded: {in_one_line(error)}"


def read_text(opened: Opened, text: str) -> Example:
    """Raises a Mistake if it is too short to attend to anything, or longer than the model or the page takes."""
    inputs = dict(opened.reader(text, return_tensors="pt"))
    ids = inputs["input_ids"].flatten().long()
    most = min(getattr(opened.model.config, "max_position_embeddings", None) or LONGEST, LONGEST)
    if not 1 < len(ids) <= most:
        raise Mistake(f"The text has {len(ids)} token{'s' * (len(ids) != 1)}; expected 2 to {most}.")
    if int(ids.max()) >= opened.model.get_input_embeddings().weight.shape[0]:
        raise Mistake(f"The tokenizer of {opened.name} has tokens that the model does not know: they do not belong together.")
    return Example(inputs, text, tuple(token_text(opened, token) for token in ids.tolist()))


def token_text(opened: Opened, token: int) -> str:
    return str(opened.reader.decode([token])).replace("\n", "\\n")


def read_image(opened: Opened, path: str | Path | None) -> Example:
    """Raises a Mistake if there is none, or none that can be read."""
    if path is None:
        raise Mistake("Drop an image first.")
    try:
        with PIL.Image.open(path) as image:
            whole = analysis.to_rgb(image)
    except NO_IMAGE as error:
        reason = in_one_line(error).replace(str(path), Path(path).name)
        raise Mistake(f"{Path(path).name} is no image that can be read: {reason}") from None
    return of_image(opened, whole)


def of_image(opened: Opened, image: PIL.Image.Image) -> Example:
    """The example that an image in RGB is for this model."""
    inputs = dict(opened.reader(image, return_tensors="pt"))
    shown = analysis.as_seen(image, inputs["pixel_values"][0], opened.reader).copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return Example(inputs, image=image, shown=shown)


@torch.no_grad()
def look(opened: Opened, example: Example) -> Look:
    """Runs the model on an example, and looks at all of its layers.

    Raises:
        Mistake: if the model does not show its attention.
    """
    model, inputs = opened.model, example.inputs
    try:
        maps = [weights[0].float() for weights in analysis.attention_maps(model, **inputs)]
    except (ValueError, RuntimeError, TypeError) as error:
        raise Mistake(f"{opened.name} does not show its attention: {in_one_line(error)}") from None
    if opened.takes_images:
        check_grid(opened, example, maps)
    scores = or_none(analysis.score_statistics, model, inputs)
    if scores is None or len(scores) != len(maps):
        scores, names, scorers = None, [f"layer {index}" for index in range(len(maps))], ["dot product"] * len(maps)
    else:
        names, scorers = [layer.layer for layer in scores], [layer.scorer for layer in scores]
    places = {name: index for index, name in enumerate(names)}
    neural = opened.is_neural and scores is not None
    dot_products = analysis.dot_product_maps(model, **inputs) if neural else {}
    seen = analysis.queries_and_keys(model, **inputs) if neural else {}
    logits = model(**inputs).get("logits") if opened.predicts else None
    return Look(
        opened,
        example,
        names,
        scorers,
        maps,
        {places[name]: weights[0] for name, weights in dot_products.items()},
        {places[name]: layer for name, layer in seen.items()},
        scores,
        or_none(analysis.scorer_health, model, inputs) if neural else None,
        None if logits is None else logits[0].float(),
    )


def check_grid(opened: Opened, example: Example, maps: list[torch.Tensor]) -> None:
    """Raises a Mistake if attention is not that of all patches to all, as in windows or with patches left out."""
    try:
        for weights in maps:
            analysis.attention_over_image(weights[0], (1, 1), grid=grid_of(opened, example))
    except ValueError as error:
        raise Mistake(f"The attention of {opened.name} cannot be laid over an image: {in_one_line(error)}") from None


def grid_of(opened: Opened, example: Example) -> tuple[int, int] | None:
    """Rows and columns of an image's patches."""
    return analysis.patch_grid(opened.model.config, example.inputs["pixel_values"])


def or_none(function: Any, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """What the function says of the model, or None where it cannot say anything."""
    try:
        return function(model, **inputs)
    except ValueError:
        return None


def layers_of(text: str) -> str | list[int]:
    """`all`, or numbers with commas between them.

    Raises:
        Mistake: for anything else.
    """
    words = text.replace(",", " ").split()
    if words == ["all"]:
        return "all"
    if not words or not all(re.fullmatch(r"-?\d+", word) for word in words):
        raise Mistake(f"The layers are {text!r}; expected all, or numbers such as 0, 2.")
    return [int(word) for word in words]


def patch_copy(
    opened: Opened, example: Example, layers: str, mode: str, proj_dim: int, per_head: bool, calibration_steps: int
) -> Opened:
    """A patched copy of a stock model; the model itself stays as it is.

    Args:
        layers: as `layers_of` takes them.
        calibration_steps: of `calibrate` on the example, for modes without the dot product; 0 leaves scorers as drawn.

    Raises:
        Mistake: if the model cannot be patched like this.
    """
    stock = opened.unpatched or opened
    if stock.is_neural:
        raise Mistake(f"{stock.name} has neural layers already. Open a stock model, and patch that.")
    chosen = layers_of(layers)
    try:
        model = copy.deepcopy(stock.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # draws the same scorers for the same settings
            patch(model, chosen, mode=mode, proj_dim=int(proj_dim), per_head=per_head, example_inputs=example.inputs)
        if calibration_steps and mode != "residual":
            calibrate(model, [example.inputs], steps=int(calibration_steps), progress=False)
    except ValueError as error:
        raise Mistake(in_one_line(error)) from None
    return Opened(stock.name, model.eval(), stock.reader, stock.predicts, stock)


class Prediction(NamedTuple):
    what: str  # a token, its spaces as dots, or a class
    probability: float


def probabilities(look: Look) -> torch.Tensor | None:
    """Of the next token, or of the classes."""
    if look.logits is None:
        return None
    return (look.logits[-1] if look.opened.predicts == "token" else look.logits).softmax(-1)


def predictions(look: Look, count: int = TOP) -> list[Prediction]:
    """The likeliest ones, the first first."""
    shares = probabilities(look)
    if shares is None:
        return []
    values, indices = shares.topk(min(count, len(shares)))
    labels = look.opened.model.config.id2label
    names = [
        token_text(look.opened, index).replace(" ", "·") if look.opened.predicts == "token" else str(labels[index])
        for index in indices.tolist()
    ]
    return [Prediction(*pair) for pair in zip(names, values.tolist(), strict=True)]


def perplexity(look: Look) -> float | None:
    """Of the text, its first token excepted, for a language model."""
    if look.logits is None or look.opened.predicts != "token":
        return None
    return float(cross_entropy(look.logits[:-1], look.example.inputs["input_ids"][0, 1:]).exp())


class Change(NamedTuple):
    """What a patch did."""

    layers: list[float]  # mean share of an attention row's weight that is elsewhere now, 0 to 1
    output: float | None  # KL divergence of the predictions from those before, in nats, mean over tokens
    before: list[Prediction]
    after: list[Prediction]
    perplexities: tuple[float, float] | None  # before and after


def changes(before: Look, after: Look) -> Change:
    """Compares a model with its patched copy on one example."""
    layers = [float((new - old).abs().sum(-1).mean() / 2) for old, new in zip(before.maps, after.maps, strict=True)]
    output = None
    if before.logits is not None and after.logits is not None:
        old, new = before.logits.log_softmax(-1), after.logits.log_softmax(-1)
        output = max(float((old.exp() * (old - new)).sum(-1).mean()), 0.0)
    pair = perplexity(before), perplexity(after)
    perplexities = (pair[0], pair[1]) if pair[0] is not None and pair[1] is not None else None
    return Change(layers, output, predictions(before), predictions(after), perplexities)
