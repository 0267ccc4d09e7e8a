"""`export_to_hub`: a model as a folder, or a repository on the Hub, that anyone can load."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

import hf_neural_attention

from .introspection import compact_layers, is_born_neural, unwrap
from .models.configuration_neural_patched import RECORD, PatchedConfig
from .models.modeling_neural_patched import PREFIX, PatchedModelMixin
from .models.neural_attention_names import origin_of
from .patching.errors import PatchError
from .patching.pretrained import neural_fields
from .patching.records import check_without_adapters, could_be_repository, is_repository, record_of
from .patching.sizes import SIZE_TITLES, size_of, stock_twin
from .registration import FAMILIES, MODELS_OF_AUTO_CLASSES
from .uploading import WEIGHT_FILES, title_of, upload


MODELS = Path(__file__).parent / "models"
CITATION = """@article{digiugno2025neural,
  title   = {Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models},
  author  = {DiGiugno, Andrew and Mahmood, Kaleel},
  journal = {arXiv preprint arXiv:2502.17206},
  year    = {2025}
}"""

# Maps an Auto class to what a pipeline calls its task
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


def export_to_hub(
    model: nn.Module,
    save_directory: str | Path,
    tokenizer_or_processor: Any = None,
    *,
    remote_code: bool = True,
    results: Mapping[str, float] | str | Path | None = None,
    dataset: str | None = None,
    license: str | None = None,
    description: str = "",
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model with Neural Attention",
) -> Path:
    """Writes everything that others need of a model with neural layers, and uploads it if asked to.

    The folder holds the weights (safetensors), the config, the generation config (with the cache on, which `Trainer` switches
    off), the tokenizer or image processor, a model card, and the code of the model. It loads offline in three ways, with the
    same logits to the bit on the same backend: by the Auto classes after `import hf_neural_attention`, by
    `trust_remote_code=True` where this package is not installed, and by `pipeline`. There is no pickle in it. A model that no
    Auto class makes (`NeuralGPT2DoubleHeadsModel`) loads by its own class, or by `hf_neural_attention.from_pretrained`, as the
    card says.

    Files are written into a hidden folder in it and moved at the end: an export that fails leaves what was there.

    Args:
        model (`nn.Module`): A `NeuralGPT2*` or `NeuralViT*` model, or one of any family whose layers `patch` has made neural.
            The card of a compact one says what it was folded from, and its size beside that of the stock model.
        save_directory (`str` or `Path`): Is made if it is not there; files of the same names are replaced, and weights of
            another export removed. What else is there stays, and is not uploaded.
        tokenizer_or_processor (*optional*): With `save_pretrained`.
        remote_code (`bool`): Put the model's code beside it, for those without this package. Default: True.
        results (`dict`, or path of a JSON file of the recipes, *optional*): Figures for the card, by name.
        dataset (`str`, *optional*): What the figures are of, for the card. What could be a name on the Hub is in its metadata
            as well.
        description (`str`): for the card.
        license (`str`, *optional*): For the card, which says none by default: that of a checkpoint is not ours to give. Where
            the model was made of one on the Hub, the card names that as its base.
        push_to_hub (`bool`): Upload what was written. Default: False.
        repo_id, token, private, commit_message: for the upload. Default of `repo_id`: the folder's name.

    Returns:
        The folder.

    Raises:
        PatchError: (a ValueError) if the model has no neural layers, or adapters, or is of a class that Transformers does not
            have (save it by `save_pretrained`, or `save_patch`).
        RuntimeError: if the upload fails; the folder is whole then, and the message says how to go on.
    """
    base: Any = unwrap(model)
    check_without_adapters(base)
    architecture = exported_class(base)
    figures = read_results(results)
    folder = Path(save_directory)
    check_no_adapters(folder)
    title = title_of(folder, repo_id, push_to_hub, token)
    with made_or_left(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as name:
        draft = Path(name)  # is inside, since files move without a copy on one disk alone, and a folder may be a disk
        with cache_switched_on(base):
            base.save_pretrained(draft)
        if tokenizer_or_processor is not None:
            tokenizer_or_processor.save_pretrained(draft)
        auto_map = auto_classes(base.config.model_type, architecture)
        if remote_code:
            add_code(draft, auto_map)
        pipeline = next(
            (task for name, task in PIPELINES.items() if auto_map.get(name, "").endswith(f".{architecture}")), None
        )
        (draft / "README.md").write_text(
            card(
                title,
                architecture,
                auto_map,
                pipeline,
                figures,
                dataset,
                license,
                origin_of(base),
                description,
                remote_code,
                compact_section(base) if compact_layers(base) else "",
            ),
            encoding="utf-8",
        )
        exported = [path.name for path in draft.iterdir()]
        # moves the config last, since a folder without it is no model
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            if path.is_dir():  # holds a tokenizer's further chat templates
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                path.replace(folder / path.name)
        for path in folder.iterdir():
            if WEIGHT_FILES.fullmatch(path.name) and path.name not in exported:
                path.unlink()  # would be loaded in place of the new ones
    if push_to_hub:
        patterns = [each for name in exported for each in (name, f"{name}/**")]
        upload(folder, title, token, private, commit_message, whole_model=True, allow_patterns=patterns)
    return folder


@contextmanager
def made_or_left(folder: Path) -> Iterator[None]:
    """Makes a folder where there is none, and takes it away again after an error."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):  # keeps what was moved into it before
                folder.rmdir()
        raise


def check_no_adapters(folder: Path) -> None:
    """Raises a PatchError if a folder holds adapters, which the Auto classes would put into any model that is there."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise PatchError(
            f"{folder} holds adapters ({ADAPTER_CONFIG_NAME}), which would be loaded into the exported model. Export it to "
            "another folder, or remove them. Nothing was written."
        )


def exported_class(model: Any) -> str:
    """Name of this package's class for a model."""
    if isinstance(model, PreTrainedModel) and is_born_neural(model):
        if type(model).__name__ in hf_neural_attention.__all__:
            return type(model).__name__
    else:
        record = record_of(model)  # raises if nothing is patched
        if fields := neural_fields(record):
            return fields["architectures"][0]
        name = record["base_model"]["class"]
        if isinstance(getattr(transformers, name, None), type):
            return f"{PREFIX}{name}"
    raise PatchError(
        f"Neither hf_neural_attention nor Transformers has a class that makes this {type(model).__name__}, so there is no "
        "code to export beside it. Use `model.save_pretrained` and `hf_neural_attention.from_pretrained`, or `save_patch` and "
        "`load_patch`."
    )


def auto_classes(model_type: str, architecture: str) -> dict[str, str]:
    """`auto_map` of a config.json: Auto class -> "file.Class", for every Auto class that has one of the family."""
    if architecture.startswith(PREFIX):
        return auto_classes_of_patched(model_type, architecture.removeprefix(PREFIX))
    family = next(name for name, stock in FAMILIES.items() if model_type in (name, stock))
    found = {"AutoConfig": f"configuration_{family}.{CONFIG_MAPPING[family].__name__}"}
    for auto, models in MODELS_OF_AUTO_CLASSES.items():
        names = [model.__name__ for model in models if model.config_class.model_type == family]
        if names:
            found[auto.__name__] = f"modeling_{family}.{architecture if architecture in names else names[0]}"
    return found


def auto_classes_of_patched(model_type: str, stock_name: str) -> dict[str, str]:
    """`auto_classes` of a patched model: it stands wherever a stock model of its family does."""
    found = {"AutoConfig": f"{PatchedConfig.__module__.split('.')[-1]}.{PatchedConfig.__name__}"}
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        models = mapping.get(CONFIG_MAPPING[model_type], None) if mapping else None
        if models is not None:
            names = [model.__name__ for model in (models if isinstance(models, tuple) else (models,))]
            chosen = stock_name if stock_name in names else names[0]
            found[name] = f"{PatchedModelMixin.__module__.split('.')[-1]}.{PREFIX}{chosen}"
    return found


def add_code(folder: Path, auto_map: dict[str, str]) -> None:
    """Copies the files of the classes in `auto_map`, and what they import, and enters it into config.json."""
    files = {MODELS / f"{place.split('.')[0]}.py" for place in auto_map.values()}
    files |= {Path(path) for file in files for path in get_relative_import_files(file)}
    for file in sorted(files):
        shutil.copy(file, folder / file.name)
    path = folder / CONFIG_NAME
    content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_code_of_saved(folder: Path) -> None:
    """`add_code` for a model that `save_pretrained` has written; nothing for a stock one, or one whose class is nobody's."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [""])[0]
    if architecture in hf_neural_attention.__all__:
        add_code(folder, auto_classes(config["model_type"], architecture))
    elif RECORD in config and isinstance(getattr(transformers, architecture.removeprefix(PREFIX), None), type):
        add_code(folder, auto_classes(config[RECORD]["base_model"]["model_type"], architecture))


@contextmanager
def cache_switched_on(model: Any) -> Iterator[None]:
    """`Trainer` sets `use_cache` to False, and never back."""
    candidates = (model.config, getattr(model, "generation_config", None))
    configs: list[Any] = [config for config in candidates if hasattr(config, "use_cache")]
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = True
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value


def read_results(results: Mapping[str, float] | str | Path | None) -> dict[str, float]:
    """Figures by name, from a dict or from a file that a recipe wrote (`results.json`)."""
    if results is None:
        return {}
    if isinstance(results, str | Path):
        results = json.loads(Path(results).read_text(encoding="utf-8"))
    metrics = results.get("metrics", results) if isinstance(results, Mapping) else None
    if not isinstance(metrics, Mapping):
        raise ValueError("`results` must hold numbers by name, or a recipe's results.json with `metrics`.")
    return {str(name): plain_number(name, value) for name, value in metrics.items()}


def plain_number(name: Any, value: Any) -> float:
    """A number of Python's own, which YAML has words for, of one of numpy's or torch's.

    Raises:
        ValueError: if it is none.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, int | float):
        # makes a plain one of a subclass, as numpy's float64 is
        return value if type(value) in (bool, int) else float(value) if isinstance(value, float) else int(value)
    raise ValueError(f"`results` has {value!r} for {name!r}; it must hold numbers by name, or be a recipe's results.json.")


def compact_section(model: Any) -> str:
    """What the card says of a compact model: what it was folded from, and its size beside stock's, counted here."""
    config = model.config
    folded_from = config.neural_folded_from if is_born_neural(model) else record_of(model).get("folded_from")
    origin = f"It was folded from `{folded_from}`, and computes the same up to rounding." if folded_from else ""
    stock = stock_twin(model)
    sizes = {f"stock `{type(stock).__name__}`": size_of(stock), "this model": size_of(model)}
    rows = "\n".join(
        f"| {name} | {' | '.join(f'{cell:,}' if isinstance(cell, int) else cell for cell in size.cells)} |"
        for name, size in sizes.items()
    )
    return f"""
## Compact form

Its neural layers project hidden states straight to the first layer of their scorers, without queries and keys.
{origin}

| counted, not measured | {" | ".join(SIZE_TITLES)} |
| --- | --- | --- | --- |
{rows}
"""


def card(
    name: str,
    architecture: str,
    auto_map: dict[str, str],
    pipeline: str | None,
    figures: dict[str, float],
    dataset: str | None,
    license: str | None,
    origin: str,
    description: str,
    remote_code: bool,
    on_compact_form: str = "",
) -> str:
    """The model card: metadata, figures, what a compact model was folded from, how to load it, limits, citation."""
    auto = next((auto for auto, place in auto_map.items() if place.endswith(f".{architecture}")), None)
    loader, home = (architecture, "hf_neural_attention") if auto is None else (auto, "transformers")
    first_line = f"from {home} import {loader}\n\n"
    if auto is None and architecture.startswith(PREFIX):
        loader, first_line = home, ""
    hub_dataset = dataset if could_be_repository(dataset) else None
    evaluations = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=hub_dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in figures.items()
    ]
    metadata = ModelCardData(
        license=license,
        base_model=origin if is_repository(origin) else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["neural-attention", "hf_neural_attention"],
        datasets=hub_dataset,
        model_name=name.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
    )
    rows = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in figures.items())
    table = f"\n## Figures\n\n{f'On {dataset}.' if dataset else ''}\n\n| | |\n| --- | --- |\n{rows}\n" if figures else ""
    without = f'''
# without it: its code lies beside the weights, and runs only if you say so
model = {loader}.from_pretrained("{name}", trust_remote_code=True)
'''
    use = f'''
import hf_neural_attention
from transformers import pipeline

run = pipeline("{pipeline}", "{name}")
'''
    return f"""---
{metadata.to_yaml()}
---

# {name.split("/")[-1]}

A `{architecture}`: a model with Neural Attention (DiGiugno and Mahmood, arXiv 2502.17206), which scores a query against a key
with a small network instead of a dot product. {description}
{table}{on_compact_form}
## Use

```python
{first_line}# with the package hf_neural_attention installed
import hf_neural_attention

model = {loader}.from_pretrained("{name}")
{without if remote_code and auto is not None else ""}```
{f"{chr(10)}```python{use}```{chr(10)}" if pipeline else ""}
## Limits

It knows what it was trained on and no more; nobody has examined it for bias or safety.

## Citation

```bibtex
{CITATION}
```
"""
