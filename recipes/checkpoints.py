"""Starting from a checkpoint: what it must be, and what the command line may ask of it."""

from transformers import AutoConfig, PreTrainedConfig

from arguments import ARMS, NeuralArguments


def load_checkpoint_config(name: str, stock_type: str, neural: NeuralArguments) -> PreTrainedConfig:
    """The config of a checkpoint of the family, stock or neural.

    Raises:
        SystemExit: if there is none, it is of another family, or it is neural and the dot product is to be trained from it.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model_name_or_path {name} is no checkpoint: {error}") from None
    if config.model_type not in (stock_type, f"neural_{stock_type}"):
        raise SystemExit(f"{name} is a model of type {config.model_type}; this recipe trains {stock_type}.")
    if config.model_type != stock_type and "dot" in ARMS[neural.attention]:
        raise SystemExit(
            f"{name} was trained with Neural Attention: no dot-product model can start from it. Add --attention neural."
        )
    return config
