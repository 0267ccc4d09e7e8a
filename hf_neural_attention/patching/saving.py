"""`save_patch` and `load_patch`: the scorers alone, which are small, beside the name of the model that they belong to."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from ..introspection import once, patched_modules, unwrap
from ..models.configuration_neural_patched import check_version
from ..models.modeling_neural_attention import HUB_OPTIONS
from ..models.modeling_neural_patched import name_in
from ..models.neural_attention_names import forget_names, origin_of
from ..models.neural_attention_parallel import is_distributed
from ..models.neural_attention_scorer import NeuralScorer
from ..models.neural_attention_zero3 import gathered
from ..uploading import title_of, upload
from .errors import PatchError
from .layers import attention_modules, listed
from .patching import attach_scorers, check_model, check_whole, inspect_layers
from .probing import AttentionCall
from .records import check_plain, is_repository, record_of, scorers_of, transformers_class


WEIGHTS, RECORD = "neural_patch.safetensors", "neural_patch.json"

logger = logging.getLogger(__name__)


def save_patch(
    model: nn.Module,
    save_directory: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool | None = None,
    base_revision: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload Neural Attention patch",
) -> None:
    """Saves what `patch` and training added to a model: the weights of its scorers, and where they belong.

    Writes `neural_patch.safetensors` (names as in the model's state dict) and `neural_patch.json` (the base model's id,
    revision and class, each layer's settings, versions), and a README.md, if there is none but that of a patch that it
    replaces. `load_patch` reads them.

    Args:
        model (`nn.Module`): A patched model, however wrapped. Sharded by FSDP2 or DeepSpeed ZeRO-3, all processes must call
            this.
        save_directory (`str` or `Path`): Is made if it is not there.
        state_dict (`dict`, *optional*): The model's whole state dict, where it cannot be had from the model itself:
            `accelerator.get_state_dict(model)` under FSDP1.
        is_main_process (`bool`): Whether this process writes. Default: where several train, the first of them.
        base_revision (`str`): Of the base model on the Hub. Default: the commit in the cache, if it holds one only.
        push_to_hub (`bool`): Also upload the folder. Default: False.
        repo_id, token, private, commit_message: for the upload. Default of `repo_id`: the folder's name.

    Raises:
        PatchError: if the model is not patched, or is compact, or a scorer has adapters inside or is quantised.
        RuntimeError: if the upload fails; the folder is whole then, and the message says how to go on.
    """
    if is_main_process is None:
        is_main_process = not is_distributed() or torch.distributed.get_rank() == 0
    check_whole(unwrap(model), "saved as a patch for a stock model (`save_pretrained` saves all of it)")
    record = record_of(model, base_revision)
    modules = once(patched_modules(unwrap(model)))
    for name, module in modules.items():
        check_plain(name, module.scorer)
    if state_dict is not None and not is_main_process:
        return  # stops here, since a gathered `state_dict` is empty on the other processes
    scorers = {name: module.scorer for name, module in modules.items()}
    apart = [parameter for scorer in scorers.values() for parameter in scorer.parameters()] if state_dict is None else []
    with gathered(apart):
        weights = {
            key: whole_tensor(key, tensor if state_dict is None else found_in(state_dict, key))
            for key, tensor in weights_of(scorers).items()
        }
    if not is_main_process:
        return
    for key, tensor in weights_of(empty_scorers(record, "the model")).items():
        if weights[key].shape != tensor.shape:
            raise PatchError(f"{key} is here in part: it is sharded. Give the whole `state_dict=`.")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    title = title_of(folder, repo_id, push_to_hub, token)
    found = card_in(folder)
    # replaces each file in one step, so that a killed process leaves the old one or the new one
    save_file(weights, folder / f"{WEIGHTS}.draft", metadata={"format": "pt"})
    (folder / f"{RECORD}.draft").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in (WEIGHTS, RECORD):
        (folder / f"{file}.draft").replace(folder / file)
    if found.is_ours:
        name = title if repo_id or push_to_hub else found.name or title
        (folder / "README.md").write_text(card_of(record, name), encoding="utf-8")
    if push_to_hub:
        files = [WEIGHTS, RECORD, "README.md"]
        upload(folder, title, token, private, commit_message, allow_patterns=files)


class CardFound(NamedTuple):
    """What a folder has of a card: whether a new one may take its place, and the name of the patch in it."""

    is_ours: bool
    name: str | None = None


def card_in(folder: Path) -> CardFound:
    """A card is ours if it is, word for word, what was written there for the patch that is about to be replaced."""
    path = folder / "README.md"
    if not path.exists():
        return CardFound(True)
    try:
        text = path.read_text(encoding="utf-8")
        name = text.split('load_patch("', 1)[1].split('"')[2]
        is_ours = text == card_of(json.loads((folder / RECORD).read_text(encoding="utf-8")), name)
    except Exception:  # noqa: BLE001, takes it for somebody's own, beside no patch or a damaged one
        return CardFound(False)
    return CardFound(is_ours, name)


def weights_of(scorers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All weights of scorers, by the name that they have in the model's state dict."""
    return {
        f"{name}.scorer.{part}": tensor for name, scorer in scorers.items() for part, tensor in scorer.state_dict().items()
    }


def empty_scorers(record: Mapping[str, Any], where: str) -> dict[str, NeuralScorer]:
    """The scorers of a record without numbers, for which none are drawn."""
    with torch.device("meta"):
        return scorers_of(record, where)


def found_in(state_dict: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    # allows a prefix, since peft and torch.compile put something before the names
    matches = [key] if key in state_dict else [name for name in state_dict if name.endswith(f".{key}")]
    if len(matches) != 1:
        raise PatchError(f"`state_dict` has no {key!r}; it must be the whole state dict of the patched model.")
    return state_dict[matches[0]]


def whole_tensor(key: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if tensor.is_meta:
        raise PatchError(f"{key} has no numbers here: it is offloaded, or sharded. Give the whole `state_dict=`.")
    return tensor.detach().cpu().contiguous()


def load_patch(
    model_or_name: Any,
    patch_directory: str | Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Puts a saved patch on a model, in place, and returns the model. After an error the model is what it was.

    Args:
        model_or_name (`nn.Module` or `str`): The base model, or its name on the Hub or folder, from where it is loaded as the
            class that the patch was made for.
        patch_directory (`str` or `Path`): A folder with what `save_patch` wrote, or a repository on the Hub.
        revision, token: of the patch's repository; the token serves for the base model's as well. So do `cache_dir`,
            `force_download`, `local_files_only` and `proxies`.
        base_revision (`str`): Of the base model, where a name is given. Default: the one that the patch was made for, if it is
            the same repository.
        example_inputs: as in `patch`.
        kwargs: for the base model's `from_pretrained` (`dtype`, `device_map` ...), where a name is given.

    Raises:
        OSError: if there is no such folder or repository, or it has no patch.
        PatchError: if the patch does not fit the model (saying what differs), is damaged, or of a later version.
        TypeError: if `kwargs` are given beside a model.
    """
    where = str(patch_directory)
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs and name not in ("revision", "subfolder")}
    hub["token"] = token
    record, weights = read_patch(where, revision=revision, **hub)
    scorers = filled_scorers(record, weights, where)
    if isinstance(model_or_name, nn.Module):
        if kwargs or base_revision:
            given = ", ".join(kwargs) or "base_revision"
            raise TypeError(f"{given}: arguments for loading a model, beside a model that is loaded already.")
        model = model_or_name
    else:
        same = is_repository(model_or_name) and model_or_name == record["base_model"].get("name_or_path")
        wanted = base_revision or (record["base_model"].get("revision") if same else None)
        options = {**hub, **({"revision": wanted} if wanted else {}), **kwargs}
        advice = "Load that model yourself, and give it to `load_patch`."
        model = transformers_class(record, where, advice).from_pretrained(model_or_name, **options)
    check_model(model)
    base = unwrap(model)
    scorers = {name_in(base, name): scorer for name, scorer in scorers.items()}
    found = attention_modules(base)
    complain(base, record, where, [f"there is no attention module {name!r}" for name in scorers if name not in found])
    calls = inspect_layers(base, list(scorers), example_inputs)
    complain(base, record, where, [text for name, scorer in scorers.items() for text in misfits(name, scorer, calls[name])])
    made_for, here = record["base_model"]["name_or_path"], origin_of(base)
    attach_scorers(base, scorers)
    forget_names(model)  # looks around the base as well, where peft keeps the adapters that are prompts
    if made_for and here and made_for != here:
        logger.warning("The patch %s was made for %s and is now on %s, which it fits in shape.", where, made_for, here)
    return model


def read_patch(where: str, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and weights of a patch, from a folder or the Hub, as `cached_file` with these options finds it."""
    files = [str(cached_file(where, name, **options)) for name in (RECORD, WEIGHTS)]
    try:
        record = json.loads(Path(files[0]).read_text(encoding="utf-8"))
        weights = load_file(files[1])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PatchError(f"{RECORD} in {where} is damaged: {error}. Save or download the patch again.") from None
    except SafetensorError as error:
        raise PatchError(f"{WEIGHTS} in {where} is damaged: {error}. Save or download the patch again.") from None
    check_version(record, f"{RECORD} in {where}")
    return record, weights


def filled_scorers(record: dict[str, Any], weights: dict[str, torch.Tensor], where: str) -> dict[str, NeuralScorer]:
    """The scorers of a record with their weights, by the name of their attention module."""
    scorers = empty_scorers(record, f"{RECORD} in {where}")
    wanted = weights_of(scorers)
    wrong = sorted(wanted.keys() ^ weights.keys())
    wrong += [name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    if wrong:
        raise PatchError(f"{WEIGHTS} and {RECORD} in {where} do not belong together: they differ in {listed(wrong)}.")
    for name, scorer in scorers.items():
        scorer.load_state_dict({part: weights[f"{name}.scorer.{part}"] for part in scorer.state_dict()}, assign=True)
    return scorers


def misfits(name: str, scorer: NeuralScorer, call: AttentionCall) -> list[str]:
    """How a layer differs from the one that a scorer was made for."""
    _, num_heads, _, head_dim = call.query
    texts = [] if scorer.head_dim == head_dim else [f"{name!r} has head_dim {head_dim}, not {scorer.head_dim}"]
    if scorer.num_heads not in (None, num_heads):
        texts.append(f"{name!r} has {num_heads} heads, not {scorer.num_heads}")
    return texts


def complain(base: nn.Module, record: dict[str, Any], where: str, differences: list[str]) -> None:
    """Raises a PatchError if there are differences, naming them and what the patch was made for."""
    if not differences:
        return
    wanted, here = record["base_model"], getattr(getattr(base, "config", None), "model_type", "unknown")
    shown = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
    raise PatchError(
        f"The patch {where} does not fit this {type(base).__name__} (model type {here}): {shown}. It was made for "
        f"{wanted['name_or_path'] or 'a model without a name'}, a {wanted['class']} (model type {wanted['model_type']}). "
        "Nothing was changed."
    )


def card_of(record: dict[str, Any], name: str) -> str:
    """README.md of a patch: what it belongs to, and how to load it."""
    base, layers = record["base_model"], record["layers"]
    known = base["name_or_path"] if is_repository(base["name_or_path"]) else None
    settings = next(iter(layers.values()))
    metadata = ModelCardData(base_model=known, library_name="hf_neural_attention", tags=["neural-attention"])
    return f"""---
{metadata.to_yaml()}
---

# Neural Attention patch

Scorers for {len(layers)} attention layer{"s" if len(layers) > 1 else ""} of {known or f"a {base['class']}"}, with mode
`{settings["mode"]}` and `proj_dim` {settings["proj_dim"]}, made by `hf_neural_attention`
{record["hf_neural_attention_version"]}.

```python
from hf_neural_attention import load_patch

model = load_patch("{known or "BASE_MODEL"}", "{name}")
```

Neural Attention: DiGiugno and Mahmood, arXiv 2502.17206.
"""
