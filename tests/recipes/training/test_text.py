"""Text: where it comes from, how it is tokenized and cut, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tests.helpers.stock_models import FAMILIES
from training.text import TextArguments, cut_into_blocks, fingerprint, load_text, load_tokenizer, tokenize
from training.text_task import collate, prepare


LINES = [f"line {index} of the text .\n" for index in range(40)]


def write_folder(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / name.replace("_", ".")).write_text("".join(lines))
    return str(folder)


def test_what_is_recorded_of_a_text_follows_from_its_tokens():
    one, two = np.arange(5, dtype=np.int32), np.arange(6, dtype=np.int32)
    assert fingerprint(one) == fingerprint(np.arange(5, dtype=np.int32)) != fingerprint(two)
    assert fingerprint(one, two) != fingerprint(two, one) != fingerprint(np.concatenate((two, one)))


def test_losses_are_those_of_tokens_that_can_be_predicted():
    batch = collate([{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8, 9, 10])}])
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, 10]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("family", (FAMILIES["gpt2"], FAMILIES["llama"]), ids=("gpt2", "llama"))
def test_what_trainer_logs_is_the_loss_of_a_model(tmp_path, family):
    """GPT-2 has no name of a loss, so that `Trainer` counts each of its labels as predicted."""
    model = family.model()
    rows = Dataset.from_dict({"input_ids": torch.randint(3, 98, (8, 4))}).with_format("torch")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    loss = model.eval()(input_ids=rows[:]["input_ids"], labels=rows[:]["input_ids"]).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(loss, rel=0.02)  # with dropout


def test_the_embedded_text_has_three_disjoint_splits():
    splits = load_text(TextArguments())
    assert set(splits) == {"train", "validation", "test"}
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(texts) == len(set(texts)) > 60
    assert sum(map(len, splits["train"]["text"])) > 200_000


def test_chapters_of_the_embedded_text_do_not_show_what_is_held_out():
    """Whole chapters stand there beside their sections."""
    splits = load_text(TextArguments())
    lines = {
        split: {line.strip() for text in data["text"] for line in text.splitlines() if len(line.strip()) > 30}
        for split, data in splits.items()
    }
    for split in ("validation", "test"):
        assert len(lines[split]) > 100 and len(lines[split] & lines["train"]) < 0.02 * len(lines[split])


@pytest.mark.parametrize("name", ["valid_txt", "validation_txt", "val_txt"])
def test_a_folder_of_text_keeps_its_line_breaks(tmp_path, name):
    folder = write_folder(tmp_path / "data", train_txt=LINES, test_txt=LINES[:5], **{name: LINES[:3]})
    splits = load_text(TextArguments(dataset_name=folder))
    assert {split: data.num_rows for split, data in splits.items()} == {"train": 40, "validation": 3, "test": 5}
    assert splits["train"]["text"][0] == LINES[0]


def test_one_file_is_split_at_its_end(tmp_path):
    write_folder(tmp_path, all_txt=LINES)
    splits = load_text(TextArguments(dataset_name=str(tmp_path / "all.txt")))
    assert [line for split in ("train", "validation", "test") for line in splits[split]["text"]] == LINES
    assert splits["test"].num_rows == 2


@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_tables_of_text_with_a_column_of_another_name(tmp_path, kind):
    data = Dataset.from_dict({"body": LINES, "number": range(40)})
    getattr(data, f"to_{kind}")(str(tmp_path / f"train.{kind}"))
    assert load_text(TextArguments(dataset_name=str(tmp_path), text_column_name="body"))["train"]["body"][1] == LINES[1]
    with pytest.raises(SystemExit, match=r"no column 'text'; it has body, number\. Choose one with --text_column_name"):
        load_text(TextArguments(dataset_name=str(tmp_path)))


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="There is no file or folder"):
        load_text(TextArguments(dataset_name=str(tmp_path / "nowhere")))
    with pytest.raises(SystemExit, match=r"has no training text: expected one of train\.txt"):
        load_text(TextArguments(dataset_name=write_folder(tmp_path / "a", test_txt=LINES)))
    with pytest.raises(SystemExit, match="different formats"):
        load_text(TextArguments(dataset_name=write_folder(tmp_path / "b", train_txt=LINES, test_csv=LINES)))
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="is none of"):
        load_text(TextArguments(dataset_name=str(tmp_path / "picture.png")))


def test_cells_without_text_are_left_out_and_that_is_said(tmp_path, capsys):
    texts = [None if index % 4 == 1 else line for index, line in enumerate(LINES)]
    Dataset.from_dict({"text": texts, "n": range(40)}).to_parquet(str(tmp_path / "train.parquet"))
    splits = load_text(TextArguments(dataset_name=str(tmp_path)))
    kept = [text for split in ("train", "validation", "test") for text in splits[split]["text"]]
    assert kept == [text for text in texts if text is not None] and splits["train"].column_names == ["text"]
    assert f"Split train of {tmp_path} has no text in 10 of 40 rows, which are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("texts", "message"),
    (
        ([None] * 9, "has no text: its column 'text' is empty in each of 9 rows"),
        (list(range(9)), "has no text in its column 'text', but int64"),
        ([["a", "b"]] * 9, "has no text in its column 'text', but lists"),
        ([{"a": "b"}] * 9, "has no text in its column 'text', but structures"),
        ([True] * 9, "has no text in its column 'text', but bool"),
    ),
)
def test_what_is_no_text_is_refused(tmp_path, texts, message):
    Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(SystemExit, match=f"Split train of {tmp_path} {message}"):
        load_text(TextArguments(dataset_name=str(tmp_path)))


def test_numbers_among_texts_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    ours = f"Split train of {tmp_path} has no text in its column 'text', but values of several"
    of_datasets_4 = f"The file {tmp_path}/train.jsonl cannot be read: .*changed from string to number"
    with pytest.raises(SystemExit, match=f"{ours}|{of_datasets_4}"):
        load_text(TextArguments(dataset_name=str(tmp_path)))


@pytest.mark.parametrize("rows", (1, 2))
def test_a_text_of_too_few_rows_cannot_be_cut(tmp_path, rows):
    name = write_folder(tmp_path, train_txt=LINES[:rows])
    with pytest.raises(SystemExit, match=rf"has {rows} row\(s\), and its last rows are to serve as split test and validation"):
        load_text(TextArguments(dataset_name=name))
    write_folder(tmp_path, train_txt=LINES[:rows], test_txt=LINES[:1], validation_txt=LINES[:1])
    assert load_text(TextArguments(dataset_name=name))["train"].num_rows == rows


def test_splits_that_are_too_short_are_named(tmp_path):
    arguments = TextArguments(vocab_size=300, block_size=32)
    tokenizer = load_tokenizer(arguments, None, load_text(arguments))
    for split, message in {
        "train": "Split train of .* tokens, less than one block of --block_size 32",
        "validation": "Split validation of .* tokens, less than one block",
        "test": r"Split test of .* has 1 token\(s\), too few to predict any",
    }.items():
        files = {"train_txt": LINES, "validation_txt": LINES, "test_txt": LINES} | {f"{split}_txt": ["a"]}
        text = TextArguments(dataset_name=write_folder(tmp_path, **files), block_size=32)
        with pytest.raises(SystemExit, match=message):
            prepare(text, load_text(text), tokenizer, None, seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    (("block_size", 1), ("max_eval_tokens", 0), ("max_eval_tokens", 1), ("max_train_samples", 0), ("vocab_size", 256)),
)
def test_sizes_with_which_there_is_nothing_to_predict(name, value):
    with pytest.raises(ValueError, match=f"--{name} is {value}; expected at least"):
        TextArguments(**{name: value})


def test_a_tokenizer_is_trained_and_loses_nothing():
    arguments = TextArguments(vocab_size=400)
    splits = load_text(arguments)
    tokenizer = load_tokenizer(arguments, None, splits)
    assert len(tokenizer) == 400
    text = splits["test"]["text"][0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bare_vocabularies_load(tmp_path):
    tokenizer = load_tokenizer(TextArguments(vocab_size=300), None, load_text(TextArguments()))
    tokenizer.save_pretrained(tmp_path / "whole")
    assert load_tokenizer(TextArguments(tokenizer_name=str(tmp_path / "whole")), None, {}).get_vocab() == tokenizer.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Line", "line"]))
    cased = load_tokenizer(TextArguments(tokenizer_name=str(tmp_path)), None, {})
    assert cased("Line line", add_special_tokens=False)["input_ids"] == [5, 6]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="has no tokenizer"):
        load_tokenizer(TextArguments(tokenizer_name=str(tmp_path / "empty")), None, {})
    with pytest.raises(SystemExit, match="The tokenizer no/where cannot be loaded: "):
        load_tokenizer(TextArguments(tokenizer_name="no/where"), None, {})


def test_a_bert_tokenizer_adds_nothing_that_a_gpt2_is_not_trained_with(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    tokenizer = load_tokenizer(TextArguments(tokenizer_name=str(tmp_path)), None, {})
    tokenizer.save_pretrained(tmp_path / "saved")  # saves it as beside the model
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert dict(each("ab a")) == {"input_ids": [5, 6, 5], "attention_mask": [1, 1, 1]}
        assert each.decode([5, 6, 5]) == "ab a" and each.mask_token == "[MASK]"
    assert dict(load_tokenizer(TextArguments(tokenizer_name=str(tmp_path / "saved")), None, {})("a"))["input_ids"] == [5]


def test_tokens_in_order_and_words_with_line_ends():
    arguments = TextArguments(vocab_size=300)
    tokenizer = load_tokenizer(arguments, None, load_text(arguments))
    text = tokenize(Dataset.from_dict({"text": LINES}), "text", tokenizer)
    assert tokenizer.decode(text.tokens) == "".join(LINES)
    assert text.tokens_per_word() == len(text.tokens) / (40 * (6 + 1))


def test_line_ends_are_no_words_to_a_tokenizer_that_drops_them(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = load_tokenizer(TextArguments(tokenizer_name=str(tmp_path)), None, {})
    text = tokenize(Dataset.from_dict({"text": ["a b\n", "a\n"]}), "text", tokenizer)
    assert (text.tokens.tolist(), text.tokens_per_word()) == ([5, 6, 5], 1.0)


def test_tokens_per_word_of_a_part_are_those_of_that_part(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    tokenizer = load_tokenizer(TextArguments(tokenizer_name=str(tmp_path)), None, {})
    text = tokenize(Dataset.from_dict({"text": ["a a a", "", "abbb"]}), "text", tokenizer)
    assert [text.tokens_per_word(limit) for limit in (3, 7, None)] == [1.0, 7 / 4, 7 / 4]
    assert text.tokens_per_word(5) == 5 / 3.5  # counts half of the last text
    assert text.tokens_per_word(0) is None


def test_blocks_hold_all_tokens_but_the_last_few():
    blocks = cut_into_blocks(np.arange(23), 5)
    assert blocks["input_ids"][:].flatten().tolist() == list(range(20))
    assert cut_into_blocks(np.arange(23), 5, limit=2).num_rows == 2
    with pytest.raises(SystemExit, match="23 tokens, less than one block of --block_size 24"):
        cut_into_blocks(np.arange(23), 24)
