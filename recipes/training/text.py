"""Text to train on: loading, tokenizing, cutting into blocks."""

import copy
import hashlib
import os
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Value
from tokenizers import processors
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tools.command_lines import at_least
from tools.messages import say
from training.data_files import SPLITS, Files, files_of_splits, kind_of, read_files
from training.hub_datasets import load_hub_dataset


SUFFIXES = (".txt", ".parquet", ".json", ".jsonl", ".csv")
EMBEDDED = "embedded"
HELD_OUT_SHARE = 0.05
LINE_THAT_TELLS = 30  # characters: shorter ones stand in many texts


@dataclass
class TextArguments:
    """Which text, and how it is cut."""

    dataset_name: str = field(
        default=EMBEDDED,
        metadata={
            "help": "A data set on the Hub (Salesforce/wikitext), a folder with train, validation and test files (txt, "
            "parquet, json, csv), one such file, or embedded: the language reference that Python ships."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration on the Hub (wikitext-2-v1)."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the text."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer on the Hub or in a folder. Default: the checkpoint's, or a byte-level BPE trained here."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Size of a tokenizer trained here."})
    block_size: int = field(default=256, metadata={"help": "Tokens per training example, and per window of evaluation."})
    stride: int | None = field(
        default=None, metadata={"help": "Step of overlapping windows in the last evaluation. Default: half of block_size."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many blocks only."})
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Evaluate the first so many tokens only."})

    def __post_init__(self) -> None:
        """Raises a ValueError for sizes with which there is nothing to train on, or to predict."""
        at_least("block_size", self.block_size, 2, "the first token of a block is predicted from nothing")
        at_least("max_eval_tokens", self.max_eval_tokens, 2, "the first token is predicted from nothing")
        at_least("max_train_samples", self.max_train_samples, 1)
        at_least("vocab_size", self.vocab_size, 257, "a byte-level BPE has all bytes and an end of text")
        if self.stride is not None and not 0 < self.stride <= self.block_size:
            raise ValueError(f"--stride {self.stride} must be from 1 to --block_size, {self.block_size} tokens.")


def load_text(arguments: TextArguments) -> DatasetDict:
    """Splits train, validation and test with a column of text, line breaks kept.

    Raises:
        SystemExit: naming what was not found, and what was expected.
    """
    name = arguments.dataset_name
    if name == EMBEDDED:
        return embedded_text(arguments.text_column_name)
    path = Path(name)
    if path.exists():
        splits = read_files(text_files(path, arguments.dataset_config_name))
    elif name.startswith((".", os.sep)) or path.suffix in SUFFIXES:
        raise SystemExit(f"There is no file or folder {name}.")
    else:
        splits = load_hub_dataset(name, arguments.dataset_config_name)
    if "train" not in splits:
        raise SystemExit(f"{name} has no split train; it has {', '.join(splits)}.")
    kept = {split: only_texts(splits[split], split, arguments) for split in SPLITS if split in splits}
    return with_held_out_splits(DatasetDict(kept), name)


def text_files(path: Path, config: str | None) -> Files:
    """The files of each split: those of a folder, or one file to be cut."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise SystemExit(f"{path} is none of {', '.join(SUFFIXES)}.")
        return {"train": [path]}
    found = files_of_splits(path, SUFFIXES, config)
    if "train" not in found:
        names = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise SystemExit(f"The folder {path} has no training text: expected one of {names}, there or in its folder data.")
    return found


def only_texts(data: Dataset, split: str, arguments: TextArguments) -> Dataset:
    """The column of texts, without rows that have none.

    Raises:
        SystemExit: if there is no such column, or it holds something else.
    """
    column, where = arguments.text_column_name, f"Split {split} of {arguments.dataset_name}"
    if column not in data.column_names:
        raise SystemExit(
            f"{where} has no column {column!r}; it has {', '.join(data.column_names)}. Choose one with --text_column_name."
        )
    data = data.select_columns(column)
    has_text = data.with_format("arrow")[:][column].is_valid().to_numpy()
    if not has_text.any():
        raise SystemExit(f"{where} has no text: its column {column!r} is empty in each of {data.num_rows} rows.")
    if data.features[column] not in (Value("string"), Value("large_string")):
        raise SystemExit(
            f"{where} has no text in its column {column!r}, but {kind_of(data.features[column])}. Choose another with "
            "--text_column_name, or write the texts as strings."
        )
    if not has_text.all():
        say(f"Note: {where} has no text in {(~has_text).sum():,} of {data.num_rows:,} rows, which are left out.")
        data = data.select(np.flatnonzero(has_text))
    return data


def with_held_out_splits(splits: DatasetDict, name: str) -> DatasetDict:
    """Where a data set brings no validation or test split, the end of its training text serves.

    Raises:
        SystemExit: if the training text has too few rows to be cut.
    """
    missing = [split for split in ("test", "validation") if split not in splits]
    rows = splits["train"].num_rows
    if rows <= len(missing):
        raise SystemExit(
            f"Split train of {name} has {rows} row(s), and its last rows are to serve as split {' and '.join(missing)}. Give "
            f"files of these splits, or a training text of at least {len(missing) + 1} rows."
        )
    for split in missing:
        train = splits["train"]
        kept = train.num_rows - max(1, round(HELD_OUT_SHARE * train.num_rows))
        splits[split] = train.select(range(kept, train.num_rows))
        splits["train"] = train.select(range(kept))
    return splits


def embedded_text(column: str) -> DatasetDict:
    """Python's language reference, every tenth topic held out for validation and the next one for test."""
    from pydoc_data.topics import topics

    texts = without_repetitions([topics[name] for name in sorted(topics)])
    held_out = {"validation": texts[5::10], "test": texts[6::10]}
    train = [text for index, text in enumerate(texts) if index % 10 not in (5, 6)]
    return DatasetDict({split: Dataset.from_dict({column: part}) for split, part in {"train": train, **held_out}.items()})


def without_repetitions(texts: list[str]) -> list[str]:
    """Leaves out copies, and chapters that have most lines of another text: they would show held-out text in training."""
    lines = {text: {line for line in text.splitlines() if len(line) > LINE_THAT_TELLS} for text in texts}

    def repeats(text: str, other: str) -> bool:
        return len(lines[other]) < len(lines[text]) and 2 * len(lines[other] & lines[text]) > len(lines[other])

    return [text for text in lines if not any(repeats(text, other) for other in lines)]


def load_tokenizer(arguments: TextArguments, checkpoint: str | None, splits: DatasetDict) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or the checkpoint's, or a byte-level BPE trained on the training split.

    Raises:
        SystemExit: if there is none of that name.
    """
    name = arguments.tokenizer_name or checkpoint
    if name is None:
        texts = splits["train"].select_columns(arguments.text_column_name)
        batches = (batch[arguments.text_column_name] for batch in texts.iter(1000))
        return GPT2Tokenizer().train_new_from_iterator(batches, vocab_size=arguments.vocab_size)
    folder = Path(name)
    bare: dict[str, Any] = {"vocab.json": GPT2Tokenizer, "vocab.txt": BertTokenizer}  # a vocabulary without a config
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        for file, tokenizer_class in bare.items():
            if (folder / file).exists():
                cased = {"do_lower_case": False} if tokenizer_class is BertTokenizer and "uncased" not in name else {}
                return without_additions(tokenizer_class.from_pretrained(name, **cased))
        raise SystemExit(f"The folder {name} has no tokenizer: expected tokenizer.json, vocab.json or vocab.txt.")
    try:
        return without_additions(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise SystemExit(f"The tokenizer {name} cannot be loaded: {error}") from None


def without_additions(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Without the [CLS], [SEP] and segment ids that BERT's tokenizer adds to a text: a GPT-2 is not trained with them, and
    adds up segment ids as if they were tokens. Others are returned as they are."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return tokenizer
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = processors.Sequence([])
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **tokenizer.special_tokens_map)


@dataclass
class TokenizedText:
    """A split as one row of tokens, with what per-word figures need."""

    tokens: np.ndarray  # int32
    token_ends: (
        np.ndarray
    )  # int64, how many tokens there are up to the start of each text of the split, and to the end of the last
    word_ends: np.ndarray  # int64, and how many words

    def tokens_per_word(self, limit: int | None = None) -> float | None:
        """Of the first `limit` tokens (default: all); None if they hold no word."""
        count = len(self.tokens[:limit])
        words = float(np.interp(count, self.token_ends, self.word_ends))
        return count / words if words else None


def fingerprint(*splits: np.ndarray) -> str:
    """Of the tokens of these splits, int32 each."""
    found = hashlib.sha256()
    for tokens in splits:
        found.update(tokens.tobytes())
        found.update(str(len(tokens)).encode() if len(splits) > 1 else b"")  # says where one ends
    return found.hexdigest()[:16]


def tokenize(split: Dataset, column: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    """All tokens of a split in order. Words are what stands between white space; where the tokenizer keeps line ends, each
    counts as one more, as in the WikiText papers, since a model has to predict it."""
    keeps_lines = "\n" in tokenizer.decode(tokenizer("a\nb", add_special_tokens=False)["input_ids"])
    parts = [np.empty(0, dtype=np.int32)]
    num_tokens, num_words = [0], [0]  # of each text
    for batch in split.select_columns(column).iter(1000):
        texts = batch[column]
        num_words += [len(text.split()) + (text.count("\n") if keeps_lines else 0) for text in texts]
        # adds no special tokens and does not warn about length, since the row is cut into blocks afterwards
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        num_tokens += map(len, ids)
        parts.append(np.fromiter(chain.from_iterable(ids), dtype=np.int32))
    return TokenizedText(np.concatenate(parts), np.cumsum(num_tokens), np.cumsum(num_words))


def cut_into_blocks(tokens: np.ndarray, block_size: int, limit: int | None = None, name: str = "The text") -> Dataset:
    """Training examples of `block_size` tokens; what is left over at the end is dropped.

    Args:
        name: of the text, in errors.

    Raises:
        SystemExit: if the text is shorter than one block.
    """
    count = len(tokens) // block_size
    if count == 0:
        raise SystemExit(f"{name} has {len(tokens)} tokens, less than one block of --block_size {block_size}.")
    blocks = tokens[: count * block_size].reshape(count, block_size)[:limit]
    return Dataset.from_dict({"input_ids": blocks}).with_format("torch")
