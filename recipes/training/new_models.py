"""New models of any family: their configs from flags, their stock classes, and their neural layers by `patch`."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, set_seed

from hf_neural_attention import compact, patch
from hf_neural_attention.models.configuration_neural_patched import PATCHED_TYPE
from hf_neural_attention.registration import FAMILIES
from training.arms import Arm
from training.data_files import in_one_line
from training.model_families import GPT2, VIT, ModelFamily
from training.neural_arguments import NeuralArguments
from training.paper_models import PaperDecoderConfig, PaperEncoderConfig


FAULTS = (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError)  # of configs that cannot be read

# Gives for fields of configs that no override can set what does
NOT_OVERRIDES = {
    "dtype": "--bf16 or --fp16 trains in half precision",
    "torch_dtype": "--bf16 or --fp16 trains in half precision",
    "attn_implementation": "recipes train under Transformers' default",
    "_attn_implementation": "recipes train under Transformers' default",
    "model_type": "--model_type names the family",
    "architectures": "--model_type names the family",
}

FIELDS_HINT = " Fields of its config may have to be set, by --config_overrides."

GENERAL = ("id2label", "label2id")  # fields that all configs take

# Lists what configs call the dropout of embeddings, attention weights and residual branches
DROPOUT = (
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "dropout", "attention_dropout"),
    *("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
)

Fields = dict[str, Any]


@dataclass
class FamilyArguments:
    """The family of a new model, as in Transformers' own examples."""

    model_type: str | None = field(
        default=None,
        metadata={
            "help": "Family of a new model, llama or deit say: the sizes that have a flag here are those of its config where "
            "that has them, whatever they are called there. Fields without a flag keep the family's default, such as "
            "head_dim=128 of Qwen3: give them by --config_overrides. Default: the recipe's own family."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A config (on the Hub or in a folder) of a new model; its sizes are then its own."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of a new model's config, over all others: num_key_value_heads=2,rms_norm_eps=1e-6 say."},
    )


def check_one_source(checkpoint: str | None, arguments: FamilyArguments) -> None:
    """Raises SystemExit if flags say in two ways which model it is to be."""
    given = {"model_type": arguments.model_type, "config_name": arguments.config_name}
    named = [f"--{name} {value}" for name, value in {"model_name_or_path": checkpoint, **given}.items() if value is not None]
    if len(named) > 1:
        raise SystemExit(f"{' and '.join(named)} each say which model to train. Give one of them.")
    if checkpoint is not None and arguments.config_overrides is not None:
        raise SystemExit(
            f"--config_overrides changes new models, and {named[0]} is trained already, with a config of its own. Leave out "
            "one of them."
        )


class Size:
    """A flag for the size of a new model, and what configs call it. All of these fields that a config has are set."""

    def __init__(self, flag: str, value: Any, *names: str, is_needed: bool = True):
        self.flag, self.value, self.names, self.is_needed = flag, value, names, is_needed


def causal_sizes(n_embd: int, n_layer: int, n_head: int, n_inner: int | None, positions: int, dropout: float) -> list[Size]:
    """Those of a language model, by the flags' names, which are GPT-2's."""
    feed_forward = ("n_inner", "intermediate_size", "ffn_dim", "decoder_ffn_dim")
    return [
        Size("n_embd", n_embd, "hidden_size"),
        Size("n_layer", n_layer, "num_hidden_layers", "decoder_layers"),
        Size("n_head", n_head, "num_attention_heads", "decoder_attention_heads"),
        Size("n_inner", n_inner or 4 * n_embd, *feed_forward, is_needed=n_inner is not None),
        Size("n_positions", positions, "max_position_embeddings", is_needed=False),
        Size("dropout", dropout, *DROPOUT, is_needed=False),
    ]


def new_config(
    arguments: FamilyArguments,
    family: ModelFamily,
    mapping: Any,
    sizes: Iterable[Size],
    data: Fields,
    fixed: Collection[str] = (),
) -> PreTrainedConfig:
    """The config of a new stock model.

    Args:
        family: the recipe's own.
        mapping: Transformers', of the configs of all models that do what the recipe trains them for.
        data: fields that the data decides, of which a config gets those that it has.
        fixed: those that nothing else may decide.

    Raises:
        SystemExit: if there is no such family, it lacks what a flag sets, or its config refuses a value.
    """
    if arguments.config_name is not None:
        stock = load_config(arguments.config_name)
    else:
        model_type = arguments.model_type or family[Arm.DOT].config.model_type
        check_family(model_type)
        stock = CONFIG_MAPPING[model_type]()
    if type(stock) not in mapping:
        raise SystemExit(f"Transformers has no model of type {stock.model_type} for this task.")
    fields = fields_of(stock) if arguments.config_name is not None else fields_of_sizes(stock, sizes)
    fields |= {name: value for name, value in data.items() if name in vars(stock) or name in GENERAL}
    names = stock.attribute_map  # from names that many configs have to its own
    given = overrides(arguments.config_overrides, stock)
    if decided := sorted(given.keys() & fixed):
        raise SystemExit(f"--config_overrides: {decided[0]} is what the data and --image_size say. Leave it out.")
    fields = {names.get(name, name): value for each in (fields, given) for name, value in each.items()}
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[stock.model_type](**fields)
        check_heads(config)
    except Exception as error:  # noqa: BLE001, since configs of hundreds of families may raise anything
        raise SystemExit(f"This config of type {stock.model_type} cannot be made: {said_by(error)}") from None
    return config


def said_by(error: Exception) -> str:
    """What an error says, with its type where that is not written for readers."""
    words = in_one_line(error)
    return words if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {words}"


def fields_of(config: PreTrainedConfig) -> Fields:
    """What makes the same config, also of another type."""
    left_out = ("model_type", "architectures", "transformers_version")
    return {name: value for name, value in config.to_diff_dict().items() if name not in left_out}


def load_config(name: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, *FAULTS) as error:
        raise SystemExit(f"--config_name {name} is no config: {error}") from None
    check_family(config.model_type)
    return config


def check_family(model_type: str) -> None:
    if model_type in FAMILIES or model_type == PATCHED_TYPE:
        stock = FAMILIES.get(model_type, "llama say")
        raise SystemExit(
            f"The model type {model_type} has neural layers by itself. Name the stock one, {stock}: --attention and the "
            "--neural_* flags say which layers are neural."
        )
    if model_type not in CONFIG_MAPPING:
        raise SystemExit(f"--model_type {model_type} is no model type of Transformers: expected llama, opt, deit or the like.")


def fields_of_sizes(stock: PreTrainedConfig, sizes: Iterable[Size]) -> Fields:
    fields: Fields = {}
    for size in sizes:
        names = [name for name in size.names if hasattr(stock, name)]
        if not names and size.is_needed and size.value:
            raise SystemExit(
                f"--{size.flag}: configs of type {stock.model_type} have none of the fields {', '.join(size.names)}. Give "
                "them with --config_name, a folder with a config.json."
            )
        if size.value is not None:
            fields |= dict.fromkeys(names, size.value)
    return fields


def overrides(text: str | None, stock: PreTrainedConfig) -> Fields:
    """The fields in `name=value,name=value`.

    Raises:
        SystemExit: if it is something else, or the config has no such field.
    """
    fields: Fields = {}
    for pair in filter(None, (text or "").split(",")):
        name, is_pair, value = pair.partition("=")
        if not is_pair:
            raise SystemExit(f"--config_overrides {text}: expected name=value,name=value; {pair!r} is no such pair.")
        if name.strip() in NOT_OVERRIDES:
            raise SystemExit(f"--config_overrides cannot set {name.strip()}: {NOT_OVERRIDES[name.strip()]}. Leave it out.")
        if not hasattr(stock, name.strip()):
            raise SystemExit(f"--config_overrides: configs of type {stock.model_type} have no field {name.strip()!r}.")
        fields[name.strip()] = value_of(value.strip())
    return fields


def value_of(word: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if word.lower() in words:
        return words[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def check_heads(config: PreTrainedConfig) -> None:
    """Raises SystemExit for heads that cannot be grouped, or of no whole size."""
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    heads, groups, width = (getattr(config, name, None) for name in names)
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    if isinstance(groups, int) and heads % groups:
        raise SystemExit(
            f"A {config.model_type} with {heads} heads cannot have keys and values in {groups} (num_key_value_heads). Add "
            f"--config_overrides num_key_value_heads={heads}, or another divisor."
        )
    if getattr(config, "head_dim", None) is None and width % heads:
        raise SystemExit(f"A {config.model_type} of width {width} cannot have {heads} heads: they would have no whole size.")


def patch_settings(neural: NeuralArguments) -> Fields:
    """Arguments of `patch`, as flags give them; whatever they leave open is its own default."""
    fields = {name: value for name, value in neural.config_fields().items() if name != "neural_compact"}
    return {name.removeprefix("neural_"): value for name, value in fields.items()}


def build_new(
    arm: Arm, config: PreTrainedConfig, family: ModelFamily, mapping: Any, neural: NeuralArguments, seed: int
) -> PreTrainedModel:
    """The stock model of a config, or the same one with neural layers: of the class that the recipe's own family has for it,
    or else by `patch`, in mode replace unless flags say otherwise.

    Args:
        family, mapping: as in `new_config`.

    Raises:
        ValueError: if it cannot be patched, or made compact.
    """
    fields = neural.config_fields() if arm.is_neural else {}
    if type(config) is family[Arm.DOT].config:
        classes = family[arm]
        return classes.model(classes.config(**fields_of(config), **fields))
    set_seed(seed)  # draws the same stock weights for both arms: compact layers are folded of them
    found = mapping[type(config)]
    model: Any = (found[0] if isinstance(found, tuple) else found)(config)
    if not arm.is_neural:
        return model
    set_seed(seed)
    patch(model, **{"mode": "replace", **patch_settings(neural)})
    return compact(model) if neural.neural_compact else model


def check_new(build: Callable[[Arm], PreTrainedModel], config: PreTrainedConfig, neural: NeuralArguments) -> PreTrainedModel:
    """Builds each arm once, so that what cannot be built is known before anything is trained. Returns the stock model.

    Raises:
        SystemExit: with the reason.
    """
    what = config.model_type
    own = type(config) in (GPT2[Arm.DOT].config, VIT[Arm.DOT].config)
    if not own and neural.layers() == [] and Arm.NEURAL in neural.arms:
        raise SystemExit(f"--neural_layers none: the neural {what} would be the stock one. Choose layers, or --attention dot.")
    arm = Arm.DOT
    try:
        stock = build(arm)
        for arm in neural.arms:
            if arm.is_neural:
                build(arm)
    except Exception as error:  # noqa: BLE001, since models of hundreds of families may raise anything
        raise SystemExit(f"The {arm} model of type {what} cannot be built: {said_by(error)}") from None
    return stock


# Say what is known of where families normalise; the paper's own models do so after each sublayer
PRE_NORM = {"gpt2": "GPT-2", "vit": "ViT", "llama": "Llama", "deit": "DeiT", "dinov2": "DINOv2"}
POST_NORM = {
    "marian": "Marian's decoder",
    PaperDecoderConfig.model_type: "This decoder",
    PaperEncoderConfig.model_type: "This encoder",
}


def family_note(model: PreTrainedModel) -> str:
    """What cards say of the family of a stock model."""
    kind = FAMILIES.get(model.config.model_type, model.config.model_type)
    note = f"Family: `{kind}` (`{type(model).__name__}`). "
    if kind in POST_NORM:
        return f"{note}{POST_NORM[kind]} is post-norm, as the paper's own models are."
    if kind in PRE_NORM:
        return f"{note}{PRE_NORM[kind]} is pre-norm; the paper's own models are post-norm."
    return note.strip()
