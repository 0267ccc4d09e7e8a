"""The task of language modelling, whatever the model: how a text is trained on, measured, shown, and described on a card."""

from pathlib import Path
from typing import Any, cast

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, default_data_collator, set_seed

from tools.messages import say
from training.causal_models import NOTHING, loss_of_the_next_token, predicts_the_next_token
from training.data_files import in_one_line
from training.new_models import family_note
from training.perplexity import perplexity
from training.prepared_data import PreparedData
from training.reporting import Task
from training.text import EMBEDDED, TextArguments, TokenizedText, cut_into_blocks, fingerprint, tokenize


TASK = "language modelling"
PIPELINE_TAG = "text-generation"
SAMPLE_TOKENS = 60
MEASURES = ("loss",)  # by an evaluation on the way


def prepare(
    text: TextArguments, splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, prompt: str | None, seed: int
) -> PreparedData:
    """Text as blocks to train on, and what is measured on the held-out splits.

    Raises:
        SystemExit: naming the split that is too short.
    """
    texts = {split: tokenize(data, text.text_column_name, tokenizer) for split, data in splits.items()}
    counts = ", ".join(f"{split} {len(part.tokens):,}" for split, part in texts.items())
    say(f"Tokens: {counts}; vocabulary {len(tokenizer):,}")
    name = f"of {text.dataset_name}"
    if len(texts["test"].tokens) < 2:
        raise SystemExit(f"Split test {name} has {len(texts['test'].tokens)} token(s), too few to predict any.")
    limit = text.max_eval_tokens and max(1, text.max_eval_tokens // text.block_size)
    lines = (line for line in splits["test"][text.text_column_name] if line.strip())
    start = prompt or " ".join(next(lines, tokenizer.eos_token or "The").split()[:6])
    held_out = {split: texts[split] for split in ("validation", "test")}
    return PreparedData(
        evaluate=lambda trainer: final_figures(trainer, held_out, text),
        show=lambda model, folder: generate_sample(model, folder, tokenizer, start, seed),
        trainer_arguments={
            "train_dataset": cut_into_blocks(
                texts["train"].tokens, text.block_size, text.max_train_samples, f"Split train {name}"
            ),
            "eval_dataset": cut_into_blocks(texts["validation"].tokens, text.block_size, limit, f"Split validation {name}"),
            "data_collator": collate,
            "processing_class": tokenizer,
        },
        task=describe_task(text, texts, tokenizer),
        fingerprints={
            "train_tokens": fingerprint(texts["train"].tokens),
            "held_out_tokens": fingerprint(*(part.tokens for part in held_out.values())),
        },
    )


def fit_to(data: PreparedData, model: PreTrainedModel, name: str, block_size: int, hint: str = "") -> None:
    """Makes the data right for the models of a family, and lets cards name it.

    Args:
        model: one of them, stock.
        name: of it, in errors.
        block_size: tokens of an example.
        hint: what to do where it cannot read them.

    Raises:
        SystemExit: if it cannot read so many, or is none that predicts each token from those before it.
    """
    data.task.notes += f" {family_note(model)}"
    if not predicts_the_next_token(model, name, block_size, hint):
        data.trainer_arguments["compute_loss_func"] = loss_of_the_next_token


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of blocks, which are their own labels. The first token has none, since nothing is before it: `Trainer` would
    count it for GPT-2, though nothing predicts it, and divide losses and gradients by one too many."""
    batch = default_data_collator(examples)
    labels = batch["input_ids"].clone()
    labels[:, 0] = NOTHING
    return {"input_ids": batch["input_ids"], "labels": labels}


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


def generate_sample(model: Any, folder: Path | None, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    """Continues the prompt, prints and keeps it (`sample.txt`), and returns it as Markdown."""
    if not model.can_generate():
        return f"A {type(model).__name__} does not generate text."
    set_seed(seed)
    positions = getattr(model.config, "max_position_embeddings", 1024)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][:, : positions // 2].to(
        model.device
    )
    options = {"do_sample": True, "top_k": 50, "temperature": 0.8, "pad_token_id": tokenizer.eos_token_id or 0}
    length = min(SAMPLE_TOKENS, positions - ids.shape[1])
    try:
        output = model.generate(inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **options)
    except RuntimeError as error:  # keeps the figures of a model that has diverged, of whose scores none can be drawn
        return f"It generates no text: {in_one_line(error)}"
    sample = str(tokenizer.decode(output[0], skip_special_tokens=True))
    if folder is not None:
        (folder / "sample.txt").write_text(sample + "\n", encoding="utf-8")
        print(f"\nSample: {sample}\n")
    quoted = "\n".join(f"> {line}" for line in sample.splitlines())
    return f"A sample (top-k 50, temperature 0.8) after the prompt `{prompt.strip()}`:\n\n{quoted}"


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
            + f"With a stride, each token after the first window is predicted from at least "
            f"{text.block_size - stride} tokens before it; in whole windows, from whatever its window holds. Perplexity per "
            "word counts words between white space, and an end per line where the tokenizer keeps line ends."
        ),
    )


def how_to_load(folder: str) -> str:
    """Code for cards."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        'inputs = tokenizer("The", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    )
