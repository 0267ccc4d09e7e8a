"""Perplexity of a causal language model before and after its weights are rounded to int8 by bitsandbytes.

    python recipes/quantize.py --model_name_or_path runs/quickstart/neural
    python recipes/quantize.py --model_name_or_path DIR --dataset_name FOLDER --card model_cards/models/NAME

The scorers' weights are rounded like all others, unless --keep_scorers; what a neural layer then computes with is what its
rounded layers answer. Needs `pip install '.[quantization,recipes]'`.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import hf_neural_attention  # noqa: F401, registers its models
from hf_neural_attention.introspection import count
from tools.command_lines import at_least, make_folder_of, parse_arguments
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment
from training import paper_models  # noqa: F401, registers the recipes' own models
from training.data_checks import check_positions, check_tokens
from training.data_files import in_one_line
from training.perplexity import perplexity
from training.text import TextArguments, load_text, load_tokenizer, tokenize


# Lists what can be wrong with a folder that somebody names
UNREADABLE = (OSError, ValueError, RuntimeError, StrictDataclassError, SafetensorError)


@dataclass
class QuantizationArguments:
    """Which model, and what of it is rounded."""

    model_name_or_path: str = field(metadata={"help": "A causal language model on the Hub or in a folder."})
    keep_scorers: bool = field(default=False, metadata={"help": "Leave the weights of scorers in floating point."})
    batch_size: int = field(default=16, metadata={"help": "Windows at a time."})
    card: str | None = field(default=None, metadata={"help": "Write NAME.md and NAME.json."})

    def __post_init__(self) -> None:
        """Raises a ValueError for windows of nothing."""
        at_least("batch_size", self.batch_size, 1)


def size_of(model: Any) -> int:
    """Bytes of all weights as they are stored, tied ones once; of quantised ones, integers and scales."""
    tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}
    return count(tensors.values())[1]


def load(name: str, **options: Any) -> Any:
    """Raises SystemExit if there is no causal language model of that name."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except UNREADABLE as error:
        raise SystemExit(f"--model_name_or_path {name} cannot be loaded: {in_one_line(error)}") from None


def load_config(name: str) -> Any:
    """Raises SystemExit if there is no model of that name."""
    try:
        return AutoConfig.from_pretrained(name)
    except UNREADABLE as error:
        raise SystemExit(f"--model_name_or_path {name} is no checkpoint: {in_one_line(error)}") from None


def main() -> None:
    arguments, text = parse_arguments(QuantizationArguments, TextArguments, description=__doc__)
    if find_spec("bitsandbytes") is None:
        raise SystemExit("bitsandbytes is not installed, which rounds the weights: pip install '.[quantization,recipes]'")
    if arguments.card:
        make_folder_of("--card", arguments.card)
    config = load_config(arguments.model_name_or_path)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        check_positions(text, positions)
    splits = load_text(text)
    tokenizer = load_tokenizer(text, arguments.model_name_or_path, splits)
    if (embeddings := getattr(config, "vocab_size", None)) is not None:
        check_tokens(text, tokenizer, arguments.model_name_or_path, embeddings)
    test = tokenize(splits["test"], text.text_column_name, tokenizer)
    kept = [r".*\.scorer"] if arguments.keep_scorers else []
    rows: list[dict[str, Any]] = []
    for name in ("float32", "int8"):
        options: dict[str, Any] = {"dtype": torch.float32}  # whatever the checkpoint is stored in
        if name == "int8":
            quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
            options |= {"quantization_config": quantization, "device_map": "auto"}
        model = load(arguments.model_name_or_path, **options)
        if name == "float32":  # keeps the head, since it is tied to the embeddings, which stay as they are
            head = model.get_output_embeddings()
            kept += [label for label, module in model.named_modules() if module is head]
        figures = perplexity(
            model,
            test.tokens[: text.max_eval_tokens],
            window=text.block_size,
            stride=text.stride or text.block_size // 2,
            batch_size=arguments.batch_size,
        )
        converted = [label for label, module in model.named_modules() if "8bit" in type(module).__name__]
        rows.append(
            {"weights": name, "perplexity": figures["perplexity"], "megabytes": size_of(model) / 1e6, "layers": converted}
        )
    table = markdown_table(
        ["weights", "test perplexity per token", "MB"],
        [[row["weights"], f"{row['perplexity']:.4f}", f"{row['megabytes']:.2f}"] for row in rows],
    )
    print(table)
    if arguments.card:
        where = environment()
        record = {"command": command_line(), "environment": where, "rows": rows}
        write_json(Path(f"{arguments.card}.json"), record)
        Path(f"{arguments.card}.md").write_text(
            "# Weights in int8\n\n"
            f"{table}\n\nBy `{record['command']}` on {where['cpu']}, torch {where['torch']}, "
            f"transformers {where['transformers']}, with bitsandbytes. Embeddings and the tied head stay in float32.\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
