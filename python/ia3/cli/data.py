"""Training data: reading files, tokenizing, keeping a part apart, and batching.

Two kinds of data exist. Texts are joined, an end-of-text token between them, and cut into blocks of equal length; every
token is learned. Prompt-and-completion pairs stay one sequence each; only the completion is learned.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IA3Error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss of transformers skips
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Pair:
    """A prompt, which is read, and a completion, which is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, and for each the label that the loss compares with (the id itself, or IGNORED)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Corpus:
    """Tokenized data: what is trained on and what is kept apart. `cut` counts pairs that were too long for a block."""

    train: list[Example]
    held_out: list[Example]
    cut: int = 0

    @property
    def train_tokens(self) -> int:
        """Tokens in the training part, padding not counted."""
        return sum(len(example.input_ids) for example in self.train)

    @property
    def held_out_tokens(self) -> int:
        """Tokens in the held-out part, padding not counted."""
        return sum(len(example.input_ids) for example in self.held_out)


# --- reading -----------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[str] | list[Pair]:
    """The texts or pairs of a file: JSON Lines by its suffix (.jsonl, .ndjson, .json), else one UTF-8 text.

    Raises IA3Error, naming the file and where known the line, for whatever keeps it from being read.
    """
    text = _read_text(path)
    if not text.strip():
        raise IA3Error(f"{path} is empty; training needs text.")
    return _parse_json_lines(text, path) if path.suffix.lower() in JSON_SUFFIXES else [text]


def _read_text(path: Path) -> str:
    if not path.exists():
        raise IA3Error(f"{path} does not exist; DATA is a text file or a JSON Lines file.")
    if not path.is_file():
        raise IA3Error(f"{path} is a folder or a device; DATA is one text file or one JSON Lines file.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror}.") from error
    if b"\0" in raw:
        raise IA3Error(f"{path} is not text (it has a zero byte at {raw.index(0)}); DATA is UTF-8 text.")
    try:
        return raw.decode("utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        raise IA3Error(
            f"{path} is not UTF-8 (byte {raw[error.start]:#04x} at offset {error.start}); convert it to UTF-8."
        ) from error


def _parse_json_lines(text: str, path: Path) -> list[str] | list[Pair]:
    texts: list[str] = []
    pairs: list[Pair] = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold what splitlines() splits at
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _parse_object(line, where)
        if "text" in record:
            texts.append(_field(record, "text", where))
        elif "prompt" in record and "completion" in record:
            pairs.append(Pair(_field(record, "prompt", where), _field(record, "completion", where)))
        else:
            found = ", ".join(map(repr, record)) or "none"
            raise IA3Error(f"{where} needs a field 'text', or 'prompt' and 'completion'; its fields: {found}.")
        if texts and pairs:
            raise IA3Error(f"{where} is of another kind than the lines before; use either 'text' or pairs in one file.")
    return texts or pairs


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise IA3Error(
            f"{where} is not JSON ({error.msg} at column {error.colno}); expected one object a line."
        ) from error
    except RecursionError as error:
        raise IA3Error(f"{where} is nested too deeply; expected one flat object a line.") from error
    if not isinstance(record, dict):
        raise IA3Error(f"{where} holds a JSON {type(record).__name__}; expected one object a line.")
    return record


def _field(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise IA3Error(f"{where}: '{name}' is a {type(value).__name__}; expected a string.")
    if not value.strip() and name != "prompt":
        raise IA3Error(f"{where}: '{name}' is blank; remove the line or give it text.")
    return value


# --- tokenizing and splitting ------------------------------------------------------------------------------------


def prepare(
    records: Sequence[str] | Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    held_out: float,
    seed: int = 0,
) -> Corpus:
    """Tokenizes `records` into sequences of at most `block_size` tokens and keeps a fraction `held_out` (0 to 1) apart.

    What is kept apart is chosen by `seed`: whole texts, or whole pairs; of a single text, its end. The tokens that do
    not fill a last block are dropped. Raises IA3Error if either part comes out empty.
    """
    pairs = [record for record in records if isinstance(record, Pair)]
    if pairs:
        return _prepare_pairs(pairs, tokenizer, block_size, held_out, seed)
    return _prepare_texts(
        [record for record in records if isinstance(record, str)], tokenizer, block_size, held_out, seed
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: a text longer than the model's context is what blocks are for, not something to warn about
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _prepare_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int, held_out: float, seed: int
) -> Corpus:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = [_tokenize(tokenizer, text) + end for text in texts]
    total = sum(map(len, documents))
    if not held_out:
        train, kept = documents, []
    elif len(documents) == 1:
        blocks = total // block_size
        split = (blocks - max(1, round(held_out * blocks))) * block_size
        train, kept = [documents[0][: max(split, 0)]], [documents[0][max(split, 0) :]]
    else:
        train, kept = _hold_out_documents(documents, max(held_out * total, block_size), seed)
    corpus = Corpus(_blocks(train, block_size), _blocks(kept, block_size))
    _check_sizes(corpus, held_out, f"the data has {total:,} tokens in {len(documents):,} texts", block_size)
    return corpus


def _hold_out_documents(
    documents: list[list[int]], target: float, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Whole documents in a random order until they hold `target` tokens; one that would overshoot by half is passed."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    kept: set[int] = set()
    tokens = 0
    for index in order:
        if tokens < target and tokens + len(documents[index]) <= 1.5 * target:
            kept.add(index)
            tokens += len(documents[index])
    return (
        [document for index, document in enumerate(documents) if index not in kept],
        [documents[index] for index in sorted(kept)],
    )


def _blocks(documents: list[list[int]], size: int) -> list[Example]:
    stream = list(chain.from_iterable(documents))
    starts = range(0, len(stream) - size + 1, size)
    return [Example(stream[start : start + size], stream[start : start + size]) for start in starts]


def _prepare_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, block_size: int, held_out: float, seed: int
) -> Corpus:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples: list[Example] = []
    cut = 0
    for pair in pairs:
        prompt = _tokenize(tokenizer, pair.prompt, special=True)
        if end and prompt[-1:] == end:  # a tokenizer that ends every text would end the prompt before its completion
            prompt = prompt[:-1]
        completion = _tokenize(tokenizer, pair.completion) + end
        cut += len(prompt) + len(completion) > block_size
        # The completion is what is learned, so the prompt gives way first, from its far end. One token always stays
        # before the completion: the first token of a sequence is never predicted.
        completion = completion[: block_size - 1]
        prompt = prompt[max(0, len(prompt) + len(completion) - block_size) :]
        if len(prompt) + len(completion) < 2:
            raise IA3Error(f"the pair with completion {pair.completion!r} is a single token; give it a prompt.")
        examples.append(Example(prompt + completion, [IGNORED] * len(prompt) + completion))
    random.Random(seed).shuffle(examples)
    kept = max(1, round(held_out * len(examples))) if held_out else 0
    corpus = Corpus(examples[kept:], examples[:kept], cut)
    _check_sizes(corpus, held_out, f"the data has {len(pairs):,} pairs", block_size)
    return corpus


def _check_sizes(corpus: Corpus, held_out: float, have: str, block_size: int) -> None:
    if corpus.train and (corpus.held_out or not held_out):
        return
    part = "to train on" if not corpus.train else "to keep apart"
    raise IA3Error(
        f"{have}, too few for one sequence {part} (block size {block_size}, held-out fraction {held_out:g}); "
        "give more data, a smaller --block-size or another --held-out (0 keeps nothing apart)."
    )


# --- batching ----------------------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of `input_ids` and `labels`, both [batch, longest] int64, padded on the right.

    `attention_mask` is there only where something was padded: attention without a mask is faster.
    """
    import torch

    length = max(len(example.input_ids) for example in examples)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (length - len(values))]

    batch = {
        "input_ids": torch.tensor([padded(example.input_ids, pad_token_id) for example in examples]),
        "labels": torch.tensor([padded(example.labels, IGNORED) for example in examples]),
    }
    if any(len(example.input_ids) < length for example in examples):
        batch["attention_mask"] = torch.tensor([padded([1] * len(example.input_ids), 0) for example in examples])
    return batch
