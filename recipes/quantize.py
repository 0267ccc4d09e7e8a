"""Perplexity of a causal language model before and after its weights are rounded to int8 by bitsandbytes.

    python recipes/quantize.py --model_name_or_path runs/quickstart/neural
    python recipes/quantize.py --model_name_or_path DIR --dataset_name FOLDER --card model_cards/models/NAME

The scorers' weights are rounded like all others, unless --keep_scorers; what a neural layer then computes with is what its
rounded layers answer. Needs `pip install '.[quantization,recipes]'`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_neural_attention  # noqa: F401, registers its models
from tools.command_lines import parse_arguments
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment
from training.perplexity import perplexity
from training.text import TextArguments, load_text, load_tokenizer, tokenize


@dataclass
class QuantizationArguments:
    """Which model, and what of it is rounded."""

    model_name_or_path: str = field(metadata={"help": "A causal language model on the Hub or in a folder."})
    keep_scorers: bool = field(default=False, metadata={"help": "Leave the weights of scorers in floating point."})
    batch_size: int = field(default=16, metadata={"help": "Windows at a time."})
    card: str | None = field(default=None, metadata={"help": "Write NAME.md and NAME.json."})


def size_of(model: Any) -> int:
    """Bytes of all weights as they are stored; of quantised ones, integers and scales."""
    state = model.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def main() -> None:
    arguments, text = parse_arguments(QuantizationArguments, TextArguments, description=__doc__)
    splits = load_text(text)
    tokenizer = load_tokenizer(text, arguments.model_name_or_path, splits)
    test = tokenize(splits["test"], text.text_column_name, tokenizer)
    # keeps the head, since it is tied to the embeddings, which stay as they are
    kept = ["lm_head", *([r".*\.scorer"] if arguments.keep_scorers else [])]
    settings = {"float32": None, "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
    rows: list[dict[str, Any]] = []
    for name, quantization in settings.items():
        options = {} if quantization is None else {"quantization_config": quantization, "device_map": "auto"}
        model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, **options)
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
        Path(arguments.card).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(f"{arguments.card}.json"), record)
        Path(f"{arguments.card}.md").write_text(
            "# Weights in int8\n\n"
            f"{table}\n\nBy `{record['command']}` on {where['cpu']}, torch {where['torch']}, "
            f"transformers {where['transformers']}, with bitsandbytes. Embeddings and the tied head stay in float32.\n"
        )


if __name__ == "__main__":
    main()
