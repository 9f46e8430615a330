"""Reading, tokenizing and splitting training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from ia3.cli.data import IGNORED, Row, prepare, read_rows
from ia3.errors import IA3Error


class Letters:
    """A tokenizer whose tokens are code points; 0 ends a text, 1 begins one."""

    eos_token_id: int | None = 0
    chat_template: str | None = "{{ one }}"
    rewrites = False

    def __call__(self, text: str, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        hidden = [self.rewrites and turn["role"] == "assistant" for turn in messages[:-1]] + [False]
        shown = [{**turn, "content": "-"} if hide else turn for turn, hide in zip(messages, hidden, strict=True)]
        return "".join(f"{turn['role'][0]}:{turn['content']};" for turn in shown) + "a:" * add_generation_prompt


LETTERS: Any = Letters()


def chat(*turns: str) -> Row:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]}


def pair(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


def learned(sequence: dict[str, list[int]]) -> str:
    """The sequence, with a dot for each token that is read only."""
    assert all(label in (IGNORED, token) for token, label in zip(*sequence.values(), strict=True))
    return "".join("." if label == IGNORED else chr(label) for label in sequence["labels"])


def test_a_text_file_is_one_record_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffzwei\nZeilen\n".encode())
    assert read_rows(path) == [{"text": "zwei\nZeilen\n"}]


ROWS = [pair("a", "b\u2028\u0085\n, c"), pair("", "None")]
CHATS = [chat("uone", "atwo"), chat("uthree", "afour")]


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["pairs", "chats"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "json lines", "csv", "tsv", "parquet", "folder", "splits"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, rows: list[Row]) -> None:
    """Other columns are left out."""
    path = tmp_path / f"a.{kind.partition(' ')[0]}"
    more = [{**row, "number": number} for number, row in enumerate(rows)]
    if kind in ("jsonl", "ndjson", "json lines"):
        path.write_text("\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in more), "utf-8")
    elif kind == "json":
        path.write_text(json.dumps(more, indent=1))
    elif kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        cells = [[json.dumps(row["messages"])] if "messages" in row else list(row.values()) for row in rows]
        quoted = [
            delimiter.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [list(rows[0]), *cells]
        ]
        path.write_text("\n".join(quoted) + "\n", "utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(more).to_parquet(path)
    else:
        saved = datasets.Dataset.from_list(more)
        (saved if kind == "folder" else datasets.DatasetDict(train=saved, test=saved.select([0]))).save_to_disk(path)
    assert read_rows(path) == rows


def test_a_chat_may_have_further_fields(tmp_path: Path) -> None:
    """Of which tables make nulls in the turns that have none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]
    datasets.Dataset.from_list([{"messages": turns, "text": None}]).to_parquet(tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"messages": turns}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t ", "is empty"),
        ("a.txt", b"ab\0cd", "zero byte at 2"),
        ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.json", b'["a"]', "item 0 holds a JSON str"),
        ("a.json", b'[{"text": "a"}', "is not JSON"),
        ("a.jsonl", b'["a"]', "line 1 holds a JSON list"),
        ("a.jsonl", b'{"txt": "a"}', "its fields: 'txt'"),
        ("a.jsonl", b"{}", "its fields: none"),
        ("a.jsonl", b'{"prompt": "a"}', "needs a field 'text', or 'prompt' and 'completion'"),
        ("a.jsonl", b'\n{"text": 3}', "line 2: 'text' is a int"),
        ("a.jsonl", b'{"text": null}', "'text' is a NoneType"),
        ("a.jsonl", b'{"text": " "}', "'text' is blank"),
        ("a.jsonl", b'{"prompt": "a", "completion": ""}', "'completion' is blank"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 2 is of another kind"),
        ("a.jsonl", b'{"messages": "hello"}', "'messages' is not JSON"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "a turn without 'role' and 'content'"),
        ("a.csv", b"name,value\na,b\n", "its fields: 'name', 'value'"),
        ("a.csv", b'text\n"a" b\n', "is no table after line 1"),
        ("a.csv", b"prompt,completion\na\n", "line 2: 'completion' is a NoneType"),
        ("a.txt", b'\n{"text": "a"}\n{"text": "b"}\n', "looks like a .jsonl file"),
        ("a.md", b"prompt,completion\na,b\n", "looks like a .csv file"),
        ("a.txt", b'id\t"text"\n1\tb\n', "looks like a .tsv file"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as a data set"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(IA3Error) as caught:
        read_rows(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IA3Error, match="does not exist"):
        read_rows(tmp_path / "none.txt")
    with pytest.raises(IA3Error, match="cannot be read as a data set"):
        read_rows(tmp_path)
    with pytest.raises(IA3Error, match="is a device or a FIFO"):
        read_rows(Path("/dev/null"))
    saved = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(a=saved, b=saved).save_to_disk(tmp_path / "splits")
    with pytest.raises(IA3Error, match="has the splits a, b; expected one named train"):
        read_rows(tmp_path / "splits")
    (tmp_path / "none.csv").write_text("text\n")
    with pytest.raises(IA3Error, match="has no rows"):
        read_rows(tmp_path / "none.csv")


def texts(*values: str) -> list[Row]:
    return [{"text": value} for value in values]


def test_texts_are_joined_and_cut_into_blocks() -> None:
    corpus = prepare(texts("abc", "de"), LETTERS, block_size=3, held_out=0)
    joined = [*map(ord, "abc"), 0, *map(ord, "de")]  # and an end that no block has room for
    assert [sequence["input_ids"] for sequence in corpus.train] == [joined[:3], joined[3:]]
    assert all(sequence["labels"] == sequence["input_ids"] for sequence in corpus.train)
    assert corpus.held_out == []


def test_of_a_single_text_the_end_is_held_out() -> None:
    corpus = prepare(texts("abcdefghijk"), LETTERS, block_size=2, held_out=0.3)
    assert corpus.tokens("train") == 8
    assert [sequence["input_ids"] for sequence in corpus.held_out] == [[*map(ord, "ij")], [ord("k"), 0]]


@pytest.mark.parametrize("seed", range(5))
def test_of_several_texts_whole_ones_are_held_out(seed: int) -> None:
    rows = texts(*(chr(ord("a") + index) * (20 + index) for index in range(20)))
    corpus = prepare(rows, LETTERS, block_size=4, held_out=0.2, seed=seed)
    train = {token for sequence in corpus.train for token in sequence["input_ids"]} - {0}
    held_out = {token for sequence in corpus.held_out for token in sequence["input_ids"]} - {0}
    assert len(train) + len(held_out) == 20
    assert not train & held_out
    assert 0.15 < corpus.tokens("held_out") / (corpus.tokens("train") + corpus.tokens("held_out")) < 0.3
    assert corpus == prepare(rows, LETTERS, block_size=4, held_out=0.2, seed=seed)


def test_only_completions_are_learned() -> None:
    (sequence,) = prepare([pair("ab", "cd")], LETTERS, block_size=8, held_out=0).train
    assert sequence["input_ids"] == [1, *map(ord, "abcd"), 0]
    assert learned(sequence) == "...cd\0"


def test_a_prompt_gives_way_to_its_completion() -> None:
    rows = [pair("abcdef", "xyz"), pair("abc", "uvwxyz")]
    corpus = prepare(rows, LETTERS, block_size=5, held_out=0)
    assert sorted("".join(map(chr, sequence["input_ids"])) for sequence in corpus.train) == ["cuvwx", "fxyz\0"]
    assert corpus.cut == 2


def test_of_a_chat_the_answers_are_learned() -> None:
    (sequence,) = prepare([chat("sx", "uone", "atwo", "uthree", "afour")], LETTERS, block_size=99, held_out=0).train
    assert "".join(map(chr, sequence["input_ids"])) == "s:x;u:one;a:two;u:three;a:four;"
    assert learned(sequence) == "............two;..........four;"


def test_a_template_that_rewrites_earlier_turns_teaches_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "rewrites", True)
    (sequence,) = prepare([chat("uone", "atwo", "uthree", "afour")], LETTERS, block_size=99, held_out=0).train
    assert "".join(map(chr, sequence["input_ids"])) == "u:one;a:-;u:three;a:four;"
    assert learned(sequence) == "." * 20 + "four;"


def test_a_chat_that_cannot_be_learned_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IA3Error, match="no turn of the role 'assistant'"):
        prepare([chat("uone")], LETTERS, block_size=9, held_out=0)
    monkeypatch.setattr(Letters, "chat_template", None)
    with pytest.raises(IA3Error, match="no chat template"):
        prepare([chat("uone", "atwo")], LETTERS, block_size=9, held_out=0)


@pytest.mark.parametrize("make", [pair, lambda prompt, answer: chat("u" + prompt, "a" + answer)])
def test_pairs_and_chats_are_held_out_whole(make: Any) -> None:
    rows = [make("p", chr(ord("a") + index)) for index in range(10)]
    corpus = prepare(rows, LETTERS, block_size=12, held_out=0.2)
    assert len(corpus.held_out) == 2
    assert len(corpus.train) == 8
    assert not set(map(str, corpus.train)) & set(map(str, corpus.held_out))


@pytest.mark.parametrize(
    ("rows", "held_out", "said"),
    [
        (texts("abc"), 0.0, "too few for one sequence to train on"),
        (texts("abcdefghi"), 0.1, "too few for one sequence to train on"),
        (texts("abc", "abcdefghijklmno"), 0.1, "too few for one sequence to keep apart"),
        ([pair("a", "b")], 0.1, "too few for one sequence to train on"),
    ],
)
def test_too_little_data_says_what_would_do(rows: list[Row], held_out: float, said: str) -> None:
    with pytest.raises(IA3Error) as caught:
        prepare(rows, LETTERS, block_size=8, held_out=held_out)
    assert said in str(caught.value)
    assert "--block-size" in str(caught.value)
