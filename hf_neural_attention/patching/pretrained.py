"""Patched models as whole checkpoints: what `save_pretrained` writes of them, and `from_pretrained`.

The weights of a patched model are saved like any others. Its config.json would be that of the stock model, which would load
without a word about the scorers. So `patch` gives the instance a `save_pretrained` that writes another `model_type`: for
GPT-2 and ViT that of our own classes, else that of patched models, which tells whoever reads the error what to do. The Auto
classes know both once this package is imported.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import CONFIG_NAME
from transformers.utils.quantization_config import QuantizationMethod

import hf_neural_attention

from ..introspection import compact_layers, once, patched_modules
from ..models.configuration_neural_attention import FORMAT_VERSION
from ..models.configuration_neural_patched import PATCHED_TYPE, RECORD, PatchError, check_version
from ..models.modeling_neural_attention import ScoredAttentionMixin, check_known_implementation, content_of, split_config
from ..models.modeling_neural_patched import PREFIX, load_patched
from ..models.neural_attention_compact import cannot_unfold
from ..models.neural_attention_interface import NeuralConfigView
from ..models.neural_attention_scorer import is_quantised
from ..registration import FAMILIES
from .compacting import compact
from .layers import listed
from .records import check_without_adapters, record_of, transformers_class


# Matches names of the layers that `neural_layers` of our own configs counts, by the stock model type
COUNTED_LAYERS = {"gpt2": r"(?:.+\.)?h\.(\d+)\.attn", "vit": r"(?:.+\.)?layers\.(\d+)\.attention"}


class ConfigToSave(NeuralConfigView):
    """A patched model's config while it is saved: the stock one, but for what gets into config.json."""

    def __init__(self, base: PreTrainedConfig, record: dict[str, Any]):
        super().__init__(base)
        object.__setattr__(self, "record", record)

    @property
    def _attn_implementation(self) -> str:
        return self.base._attn_implementation

    def save_pretrained(self, save_directory: Any, **kwargs) -> None:
        self.base.save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("auto_map", None)  # names code that makes the stock model, if there is any
        content |= neural_fields(self.record) or {
            "model_type": PATCHED_TYPE,
            "architectures": [f"{PREFIX}{self.record['base_model']['class']}"],
            RECORD: self.record,
        }
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def neural_fields(record: dict[str, Any]) -> dict[str, Any] | None:
    """What makes the stock config.json that of our own class for the model; None if there is none that has such layers."""
    stock_type, layers = record["base_model"]["model_type"], record["layers"]
    neural_type = next((neural for neural, stock in FAMILIES.items() if stock == stock_type), None)
    architecture = f"Neural{record['base_model']['class']}"
    if neural_type is None or stock_type not in COUNTED_LAYERS or architecture not in hf_neural_attention.__all__:
        return None
    matches = [re.fullmatch(COUNTED_LAYERS[stock_type], name) for name in layers]
    settings = [{**each, "per_head": each["num_heads"] is not None} for each in layers.values()]
    if not all(matches) or any(each != settings[0] for each in settings):
        return None
    names = ("proj_dim", "hidden_dims", "mode", "per_head", "init")
    fields = {f"neural_{name}": settings[0][name] for name in names if name in settings[0]}
    if settings[0].get("compact"):
        mode = settings[0].get("mode", "replace")
        fields |= {"neural_compact": True, "neural_mode": mode, "neural_folded_from": record.get("folded_from")}
    if fields["neural_mode"] == "thin":
        fields |= {"neural_proj_dim": settings[0]["hidden_dims"][0], "neural_hidden_dims": None}
    return {
        "model_type": neural_type,
        "architectures": [architecture],
        "neural_format_version": FORMAT_VERSION,
        "neural_layers": sorted(int(match.group(1)) for match in matches if match),
        **fields,
    }


def check_quantised_alike(model: Any) -> None:
    """Raises a PatchError if a model was quantised by bitsandbytes before it got its scorers: its config.json would have these
    quantised as well when they are loaded, from weights that are not."""
    config = getattr(model.config, "quantization_config", None)
    fields = config if isinstance(config, dict) else {} if config is None else vars(config)
    if fields.get("quant_method") != QuantizationMethod.BITS_AND_BYTES:  # leaves others be, which may choose layers otherwise
        return
    kept = [name for key, names in fields.items() if "skip" in key or "not_convert" in key for name in names or ()]
    quantised_again = [
        name
        for name, module in patched_modules(model).items()
        for layer_name, layer in module.scorer.named_modules()
        if type(layer) is nn.Linear
        and not is_quantised(layer.weight)
        and should_convert_module(f"{name}.scorer.{layer_name}", kept)
    ]
    if quantised_again:
        names = listed(dict.fromkeys(quantised_again))
        raise PatchError(
            f"The model was quantised before it was patched, and the scorers of {names} are not quantised, which a checkpoint "
            "cannot say. Use `save_patch`, and `load_patch` into the quantised model. Or patch the model as it was before, "
            "save it whole, and load that with `quantization_config=`. Nothing was written."
        )


def save_patched(model: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.save_pretrained` of a patched model.

    Args:
        own: what the instance had in place of its class's method before it was patched, or None.
    """
    save = partial(type(model).save_pretrained, model) if own is None else own
    # saves as usual if a patched part was unpatched by itself, or if Transformers' own adapters are all that is saved
    if not patched_modules(model) or getattr(model, "_hf_peft_config_loaded", False):
        return save(*args, **kwargs)
    check_without_adapters(model)
    check_quantised_alike(model)
    # keeps names as they are: the rules that restore old checkpoints' names would also take parts of a scorer for theirs
    kwargs.setdefault("save_original_format", False)
    stock = model.config
    model.config = ConfigToSave(stock, record_of(model))
    try:
        return save(*args, **kwargs)
    finally:
        model.config = stock


def adjust_implementation(model: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
    """What `set_attn_implementation` of a patched model asks: it refuses what neural layers cannot run."""
    if patched_modules(model):
        check_known_implementation(model, attn_implementation)
    return type(model)._check_and_adjust_attn_implementation(model, attn_implementation, *args, **kwargs)


def ties_of(model: Any, all_submodels: bool = False) -> dict[str, str]:
    """`PreTrainedModel.get_expanded_tied_weights_keys` of a patched model: which parameters are one. Scorers, and what packed
    layers have, belong to no other layer, also where a family shares the rest of its attention among layers (Zamba)."""
    hidden: list[tuple[nn.Module, str, nn.Module]] = []
    for attention in once(patched_modules(model)).values():
        scorer = attention.scorer
        names = ["scorer", *(getattr(scorer, each) for each in ("query_layer", "key_layer") if hasattr(scorer, each))]
        for name in names:
            parent, _, child = name.rpartition(".")
            hidden.append((attention.get_submodule(parent), child, attention.get_submodule(name)))
    try:
        for parent, child, _ in hidden:
            setattr(parent, child, None)  # keeps the place among its siblings
        return type(model).get_expanded_tied_weights_keys(model, all_submodels)
    finally:
        for parent, child, module in hidden:
            setattr(parent, child, module)


# Holds attributes of our own classes that say what they do not support, which patched instances get
UNSUPPORTED = {name: value for name, value in vars(ScoredAttentionMixin).items() if value is False}
ADJUSTING = "_check_and_adjust_attn_implementation"
TYING = "get_expanded_tied_weights_keys"


def hook_model(model: nn.Module) -> None:
    """Lets `save_pretrained` of a patched model, and of the patched models inside it, say which layers are neural, and
    `set_attn_implementation` refuse what these cannot run."""
    each: Any
    for each in model.modules():
        if isinstance(each, PreTrainedModel) and patched_modules(each):
            own = vars(each).get("save_pretrained")
            if getattr(own, "func", None) is not save_patched:
                vars(each)["save_pretrained"] = partial(save_patched, each, own)
            vars(each).update(UNSUPPORTED)
            vars(each)[ADJUSTING] = partial(adjust_implementation, each)
            vars(each)[TYING] = partial(ties_of, each)


def unhook_model(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(vars(module).get(ADJUSTING), "func", None) is adjust_implementation:
            for name in (ADJUSTING, TYING, *UNSUPPORTED):
                vars(module).pop(name, None)
        hook: Any = vars(module).get("save_pretrained")
        if getattr(hook, "func", None) is save_patched:
            del vars(module)["save_pretrained"]
            if (own := hook.args[1]) is not None:
                vars(module)["save_pretrained"] = own


def from_pretrained(pretrained_model_name_or_path: Any, *, model_class: Any = None, **kwargs: Any) -> Any:
    """Loads a model with neural layers that was saved whole: one that `patch` made, or one of this package's own classes.

    Args:
        pretrained_model_name_or_path (`str` or path): A folder, or a repository on the Hub.
        model_class (*optional*): Stock class that the model shall have: with another head, with one, or without; or one that
            Transformers does not have (a subclass of your own, or one whose code comes from the Hub). Default: the one of the
            name that was saved.
        kwargs: as for `PreTrainedModel.from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `revision` ...), but no
            `config`. `neural_compact=True` makes the model compact when it is loaded (see `compact`), if it is not.

    Returns:
        The model in evaluation mode, of that class: patched, so that `unpatch` gives the stock model.
        A patched GPT-2 or ViT comes as the class of this package that computes the same (`NeuralGPT2LMHeadModel` ...), as
        `AutoModel` loads it.

    Raises:
        OSError: if there is no such folder or repository.
        PatchError: if the checkpoint has no neural layers, is of a later version of this package or of a class that this
            Transformers does not have, does not fit `model_class`, or lacks weights of its scorers.
    """
    where, with_info = str(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
    wanted = kwargs.pop("neural_compact", None)
    content = content_of(pretrained_model_name_or_path, kwargs)
    architecture = next(iter(content.get("architectures") or []), "")
    if content.get("model_type") in FAMILIES and architecture in hf_neural_attention.__all__:
        own = own_class(architecture, model_class, where)
        model, info = own.from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        check_complete(info, where, model)
    elif RECORD not in content:
        raise PatchError(
            f"{where} has no neural layers: its model type is {content.get('model_type')!r} and its config.json has no "
            f"`{RECORD}`. Load it with Transformers, and give it neural layers by `hf_neural_attention.patch`, or by "
            "`load_patch` if what you have is a patch for it."
        )
    elif "config" in kwargs:
        raise PatchError(
            f"`from_pretrained` takes no `config`: that of {where} says which layers are neural. Give what shall differ by "
            "name (`attn_implementation=...`), or change its config.json."
        )
    else:
        record = content.pop(RECORD)
        check_version(record, f"config.json of {where}")
        advice = "Give that class as `model_class`."
        base = transformers_class(record, where, advice) if model_class is None else model_class
        content["model_type"] = record["base_model"]["model_type"]
        content.pop("auto_map", None)
        if not isinstance(getattr(base, "config_class", None), type):
            name = getattr(base, "__name__", repr(base))
            raise PatchError(
                f"`model_class` is {name}; expected a class of models, as that which {where} was saved as "
                f"({record['base_model']['class']}), or of the same family with another head."
            )
        config, arguments = split_config(content, kwargs, base.config_class)
        config.name_or_path = where
        model, info = load_patched(base, record, where, config, **arguments)
        hook_model(model)
    is_compact = bool(compact_layers(model))
    if wanted is False and is_compact:
        raise PatchError(cannot_unfold(where))
    if wanted and not is_compact:
        compact(model)
    return (model, info) if with_info else model


def own_class(architecture: str, model_class: Any, where: str) -> Any:
    """The class of this package that `architecture` names, or the one that does what a stock class of its family does.

    Raises:
        PatchError: if there is none.
    """
    saved = getattr(hf_neural_attention, architecture)
    if model_class is None:
        return saved
    candidates = [getattr(hf_neural_attention, name) for name in hf_neural_attention.__all__]
    family = [each for each in candidates if getattr(each, "config_class", None) is saved.config_class]
    name = getattr(model_class, "__name__", repr(model_class))
    for own in family:
        if own is model_class or own.__name__ == f"Neural{name}":
            return own
    raise PatchError(
        f"{where} holds a {architecture}, which cannot be loaded as a {name}: expected one of "
        f"{', '.join(own.__name__ for own in family)}, or the stock class of one of these."
    )


def check_complete(info: dict[str, Any], where: str, model: nn.Module) -> None:
    """Raises a PatchError if scorers, or anything in compact layers, were not loaded but drawn."""
    inside = tuple(f"{name}." for name in compact_layers(model))
    if missing := sorted(name for name in info["missing_keys"] if ".scorer." in name or name.startswith(inside)):
        raise PatchError(
            f"{where} lacks weights of its neural layers: {', '.join(missing[:5])}. The checkpoint is not complete."
        )
