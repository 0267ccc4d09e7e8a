"""Trains a GPT-2 with Neural Attention and one with the dot product on the same text, and compares them.

    python recipes/language_modeling.py recipes/configs/quickstart.yaml
    python recipes/language_modeling.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-v1 --output_dir DIR
    accelerate launch recipes/language_modeling.py CONFIG

Flags after a configuration file override it. Running the same command again goes on where it stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import DatasetDict
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from arguments import NeuralArguments, parse_arguments
from checkpoints import load_checkpoint_config
from experiment import Experiment
from hf_neural_attention import NeuralGPT2Config, NeuralGPT2LMHeadModel
from perplexity import perplexity
from prepared import Prepared
from publishing import carry_out
from reporting import Task
from text_data import EMBEDDED, TextArguments, TokenizedText, cut_into_blocks, load_text, load_tokenizer, tokenize


TASK = "language modelling"
PIPELINE_TAG = "text-generation"
SAMPLE_TOKENS = 60


@dataclass
class ModelArguments:
    """The GPT-2 to train: a checkpoint, or a new one of this size."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A GPT-2 checkpoint (stock or neural) to start from; the sizes below are then its own."},
    )
    n_embd: int = field(default=256, metadata={"help": "Width."})
    n_layer: int = field(default=4, metadata={"help": "Layers."})
    n_head: int = field(default=4, metadata={"help": "Heads."})
    n_inner: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers. Default: 4 n_embd."})
    n_positions: int | None = field(default=None, metadata={"help": "Longest sequence. Default: block_size."})
    dropout: float = field(default=0.1, metadata={"help": "Of embeddings, attention weights and residual branches."})
    prompt: str | None = field(default=None, metadata={"help": "Start of the sample. Default: the first words of the test."})


def build_model(
    arm: str, model: ModelArguments, neural: NeuralArguments, text: TextArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model of an arm, newly initialised or from the checkpoint."""
    fields = neural.config_fields() if arm == "neural" else {}
    model_class = NeuralGPT2LMHeadModel if arm == "neural" else GPT2LMHeadModel
    if model.model_name_or_path is not None:
        return model_class.from_pretrained(model.model_name_or_path, **fields)
    config_class: Any = NeuralGPT2Config if arm == "neural" else GPT2Config
    config = config_class(
        vocab_size=len(tokenizer),
        n_positions=model.n_positions or text.block_size,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_inner=model.n_inner,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        resid_pdrop=model.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    return model_class(config)


def check_fit(model: ModelArguments, text: TextArguments, neural: NeuralArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many positions the model has.

    Raises:
        SystemExit: if text, tokenizer and model do not fit together.
    """
    positions = model.n_positions or text.block_size
    if model.model_name_or_path is not None:
        config = load_checkpoint_config(model.model_name_or_path, "gpt2", neural)
        positions = config.n_positions
        if len(tokenizer) > config.vocab_size:
            raise SystemExit(
                f"The tokenizer has {len(tokenizer)} tokens and {model.model_name_or_path} embeddings for "
                f"{config.vocab_size}: they do not belong together. Choose the checkpoint's own with --tokenizer_name."
            )
        if text.tokenizer_name is not None and len(tokenizer) < config.vocab_size:
            print(
                f"Note: the tokenizer {text.tokenizer_name} has {len(tokenizer)} tokens and the checkpoint embeddings for "
                f"{config.vocab_size}. If it is not the one that the checkpoint was trained with, training starts from noise."
            )
    if text.block_size > positions:
        raise SystemExit(
            f"--block_size {text.block_size} is more than the {positions} positions of the model. Lower it, or raise "
            "--n_positions for a new model."
        )
    if text.stride is not None and not 0 < text.stride <= text.block_size:
        raise SystemExit(f"--stride {text.stride} must be from 1 to --block_size, {text.block_size} tokens.")
    return positions


def generate_sample(model: Any, folder: Path | None, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """Continues the prompt, prints and keeps it (`sample.txt`), and returns it as Markdown."""
    set_seed(seed)
    positions = getattr(model.config, "max_position_embeddings", 1024)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][:, : positions // 2].to(
        model.device
    )
    options = {"do_sample": True, "top_k": 50, "temperature": 0.8, "pad_token_id": tokenizer.eos_token_id or 0}
    length = min(SAMPLE_TOKENS, positions - ids.shape[1])
    output = model.generate(inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **options)
    sample = str(tokenizer.decode(output[0], skip_special_tokens=True))
    if folder is not None:
        (folder / "sample.txt").write_text(sample + "\n")
        print(f"\nSample: {sample}\n")
    quoted = "\n".join(f"> {line}" for line in sample.splitlines())
    return f"A sample (top-k 50, temperature 0.8) after the prompt `{prompt.strip()}`:\n\n{quoted}"


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of blocks, which are their own labels."""
    batch = default_data_collator(examples)
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}


def final_figures(trainer: Trainer, texts: dict[str, TokenizedText], text: TextArguments) -> dict[str, float]:
    """Perplexities of the trained model on each split, over whole windows and with a stride."""
    model = cast(torch.nn.Module, trainer.model)
    figures: dict[str, float] = {}
    stride = text.stride or text.block_size // 2
    for split, tokenized in texts.items():
        for name, step in (("whole", text.block_size), ("stride", stride)):
            scores = perplexity(
                model,
                tokenized.tokens[: text.max_eval_tokens],
                window=text.block_size,
                stride=step,
                batch_size=trainer.args.per_device_eval_batch_size,
                tokens_per_word=tokenized.tokens_per_word(text.max_eval_tokens),
                context=trainer.accelerator.autocast,
                progress=not trainer.args.disable_tqdm,
            )
            figures |= {f"{split}_{metric}_{name}": value for metric, value in scores.items()}
    return figures


def how_to_load(folder: str) -> str:
    """Code for cards."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        'inputs = tokenizer("The", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    )


def describe_task(text: TextArguments, texts: dict[str, TokenizedText], tokenizer: PreTrainedTokenizerBase) -> Task:
    """What cards and tables say beside the figures."""
    stride = text.stride or text.block_size // 2
    windows = {"whole": f"windows of {text.block_size}", "stride": f"windows of {text.block_size}, stride {stride}"}
    metrics = {
        f"{split}_{metric}_{name}": f"{split} perplexity per {unit} ({windows[name]})"
        for split in ("validation", "test")
        for metric, unit in (("perplexity", "token"), ("word_perplexity", "word"))
        for name in windows
    }
    metrics |= {f"{split}_loss_stride": f"{split} loss, nats per token (stride {stride})" for split in ("validation", "test")}
    counts = ", ".join(f"{split} {len(part.tokens):,}" for split, part in texts.items())

    name = "Python's language reference" if text.dataset_name == EMBEDDED else text.dataset_name
    return Task(
        name=TASK,
        pipeline_tag=PIPELINE_TAG,
        dataset=Path(name).name if Path(name).exists() else f"{name} {text.dataset_config_name or ''}".strip(),
        hub_dataset=None if text.dataset_name == EMBEDDED or Path(name).exists() else name,
        main_metric="test_perplexity_stride",
        is_accuracy=False,
        metrics=metrics,
        loading=how_to_load,
        notes=(
            f"Tokens ({len(tokenizer):,} in the vocabulary): {counts}. "
            + (f"Evaluated are the first {text.max_eval_tokens:,} of a split. " if text.max_eval_tokens else "")
            + f"With a stride, each token is predicted from at least "
            f"{text.block_size - stride} tokens before it; in whole windows, from whatever its window holds. Perplexity per "
            "word counts words between white space and one end per line. GPT-2 is pre-norm; the paper's own models are "
            "post-norm."
        ),
    )


def prepare(
    text: TextArguments, splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, prompt: str | None, seed: int
) -> Prepared:
    """Text as blocks to train on, and what is measured on the held-out splits."""
    texts = {split: tokenize(data, text.text_column_name, tokenizer) for split, data in splits.items()}
    counts = ", ".join(f"{split} {len(part.tokens):,}" for split, part in texts.items())
    print(f"Tokens: {counts}; vocabulary {len(tokenizer):,}")
    limit = text.max_eval_tokens and max(1, text.max_eval_tokens // text.block_size)
    lines = (line for line in splits["test"][text.text_column_name] if line.strip())
    start = prompt or " ".join(next(lines, tokenizer.eos_token or "The").split()[:6])
    held_out = {split: texts[split] for split in ("validation", "test")}
    return Prepared(
        evaluate=lambda trainer: final_figures(trainer, held_out, text),
        show=lambda model, folder: generate_sample(model, folder, tokenizer, start, seed),
        trainer_arguments={
            "train_dataset": cut_into_blocks(texts["train"].tokens, text.block_size, text.max_train_samples),
            "eval_dataset": cut_into_blocks(texts["validation"].tokens, text.block_size, limit),
            "data_collator": collate,
            "processing_class": tokenizer,
        },
        task=describe_task(text, texts, tokenizer),
        fingerprint=texts["train"].fingerprint,
    )


ARGUMENTS = (ModelArguments, TextArguments, NeuralArguments, TrainingArguments)


def load_experiment(words: list[str] | None = None) -> tuple[Experiment, Task, NeuralArguments]:
    """Data, models and training as flags ask for them (default: those of `sys.argv`)."""
    model, text, neural, training = parse_arguments(*ARGUMENTS, words=words, description=__doc__)
    splits = load_text(text)
    tokenizer = load_tokenizer(text, model.model_name_or_path, splits)
    tokenizer.model_max_length = check_fit(model, text, neural, tokenizer)
    data = prepare(text, splits, tokenizer, model.prompt, training.seed)

    def build(arm: str) -> PreTrainedModel:
        return build_model(arm, model, neural, text, tokenizer)

    return data.experiment(build, training, neural, model, text), data.task, neural


def main() -> None:
    carry_out(*load_experiment())


if __name__ == "__main__":
    main()
