"""Reading, tokenizing, splitting and batching training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ia3.cli.data import IGNORED, Example, Pair, collate, prepare, read_records
from ia3.errors import IA3Error


class Letters:
    """A tokenizer whose tokens are code points; 0 ends a text, 1 begins one."""

    eos_token_id: int | None = 0

    def __call__(self, text: str, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


LETTERS: Any = Letters()


def test_a_text_file_is_one_record_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffzwei\nZeilen\n".encode())
    assert read_records(path) == ["zwei\nZeilen\n"]


def test_json_lines_are_texts_or_pairs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON Lines
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c", "id": 3}\n', encoding="utf-8")
    assert read_records(path) == ["a\u2028b", "c"]
    path.write_text('{"prompt": "", "completion": "b"}\r\n', encoding="utf-8")
    assert read_records(path) == [Pair("", "b")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t ", "is empty"),
        ("a.txt", b"ab\0cd", "zero byte at 2"),
        ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.json", b'["a"]', "line 1 holds a JSON list"),
        ("a.jsonl", b'{"txt": "a"}', "its fields: 'txt'"),
        ("a.jsonl", b"{}", "its fields: none"),
        ("a.jsonl", b'{"prompt": "a"}', "needs a field 'text', or 'prompt' and 'completion'"),
        ("a.jsonl", b'\n{"text": 3}', "line 2: 'text' is a int"),
        ("a.jsonl", b'{"text": null}', "'text' is a NoneType"),
        ("a.jsonl", b'{"text": " "}', "'text' is blank"),
        ("a.jsonl", b'{"prompt": "a", "completion": ""}', "'completion' is blank"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 2 is of another kind"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(IA3Error) as caught:
        read_records(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IA3Error, match="does not exist"):
        read_records(tmp_path / "none.txt")
    with pytest.raises(IA3Error, match="is a folder"):
        read_records(tmp_path)


def test_texts_are_joined_and_cut_into_blocks() -> None:
    corpus = prepare(["abc", "de"], LETTERS, block_size=3, held_out=0)
    joined = [*map(ord, "abc"), 0, *map(ord, "de")]  # and an end that no block has room for
    assert [example.input_ids for example in corpus.train] == [joined[:3], joined[3:]]
    assert all(example.labels == example.input_ids for example in corpus.train)
    assert corpus.held_out == []


def test_of_a_single_text_the_end_is_held_out() -> None:
    corpus = prepare(["abcdefghijk"], LETTERS, block_size=2, held_out=0.3)
    assert corpus.train_tokens == 8
    assert [example.input_ids for example in corpus.held_out] == [[*map(ord, "ij")], [ord("k"), 0]]


@pytest.mark.parametrize("seed", range(5))
def test_of_several_texts_whole_ones_are_held_out(seed: int) -> None:
    texts = [chr(ord("a") + index) * (20 + index) for index in range(20)]
    corpus = prepare(texts, LETTERS, block_size=4, held_out=0.2, seed=seed)
    train = {token for example in corpus.train for token in example.input_ids} - {0}
    held_out = {token for example in corpus.held_out for token in example.input_ids} - {0}
    assert len(train) + len(held_out) == 20
    assert not train & held_out
    assert 0.15 < corpus.held_out_tokens / (corpus.train_tokens + corpus.held_out_tokens) < 0.3
    assert corpus == prepare(texts, LETTERS, block_size=4, held_out=0.2, seed=seed)


def test_only_completions_are_learned() -> None:
    corpus = prepare([Pair("ab", "cd")], LETTERS, block_size=8, held_out=0)
    learned = [ord("c"), ord("d"), 0]
    assert corpus.train == [Example([1, ord("a"), ord("b"), *learned], [IGNORED] * 3 + learned)]


def test_a_prompt_gives_way_to_its_completion() -> None:
    corpus = prepare([Pair("abcdef", "xyz"), Pair("abc", "uvwxyz")], LETTERS, block_size=5, held_out=0)
    texts = sorted("".join(map(chr, example.input_ids)) for example in corpus.train)
    assert texts == ["cuvwx", "fxyz\0"]
    assert corpus.cut == 2


def test_pairs_are_held_out_whole() -> None:
    pairs = [Pair("p", chr(ord("a") + index)) for index in range(10)]
    corpus = prepare(pairs, LETTERS, block_size=8, held_out=0.2)
    assert len(corpus.held_out) == 2
    assert len(corpus.train) == 8
    assert not set(map(str, corpus.train)) & set(map(str, corpus.held_out))


@pytest.mark.parametrize(
    ("records", "held_out", "said"),
    [
        (["abc"], 0.0, "too few for one sequence to train on"),
        (["abcdefghi"], 0.1, "too few for one sequence to train on"),
        (["abc", "abcdefghijklmno"], 0.1, "too few for one sequence to keep apart"),
        ([Pair("a", "b")], 0.1, "too few for one sequence to train on"),
    ],
)
def test_too_little_data_says_what_would_do(records: Any, held_out: float, said: str) -> None:
    with pytest.raises(IA3Error) as caught:
        prepare(records, LETTERS, block_size=8, held_out=held_out)
    assert said in str(caught.value)
    assert "--block-size" in str(caught.value)


def test_a_batch_is_padded_and_masked_only_where_lengths_differ() -> None:
    even = collate([Example([1, 2], [1, 2]), Example([3, 4], [3, 4])], pad_token_id=9)
    assert even.keys() == {"input_ids", "labels"}
    ragged = collate([Example([1, 2], [IGNORED, 2]), Example([3], [3])], pad_token_id=9)
    assert ragged["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert ragged["labels"].tolist() == [[IGNORED, 2], [3, IGNORED]]
    assert ragged["attention_mask"].tolist() == [[1, 1], [1, 0]]
