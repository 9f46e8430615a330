"""Training data: reading files of every usual kind, tokenizing, and keeping a part apart.

A row is a text (`text`), a `prompt` and its `completion`, or a chat (`messages`). Texts are joined, an end-of-text
token between them, and cut into blocks of equal length; every token is learned. Of the others each stays one sequence,
and only completions and the assistant's turns are learned.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from ..errors import IA3Error, reason_of
from ..files import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss of transformers skips
KINDS = {"messages": ("messages",), "pairs": ("prompt", "completion"), "text": ("text",)}  # by their fields
EXPECTED = "a field 'text', or 'prompt' and 'completion', or 'messages'"
FILES = "DATA is text, JSON, JSON Lines, CSV, TSV, Parquet, or a folder that `datasets` saved"
JSON = (".json", ".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# A row has the fields of its kind, a sequence `input_ids` and `labels`: an id itself where it is learned, or IGNORED.
Row = dict[str, Any]
Tokens = dict[str, list[int]]
_Placed = Iterable[tuple[str, Any]]  # what is to become rows, each behind the words that say where it stands


@dataclass(frozen=True)
class Corpus:
    """Tokenized data: what is trained on and what is kept apart. `cut` counts rows that were too long for a block."""

    kind: str
    train: list[Tokens]
    held_out: list[Tokens]
    cut: int = 0

    def tokens(self, part: str) -> int:
        """Count the tokens in the part `train` or `held_out`, padding left out."""
        return sum(len(sequence["input_ids"]) for sequence in getattr(self, part))


# --- reading -----------------------------------------------------------------------------------------------------


def needs_datasets(path: Path) -> bool:
    """Return whether the `datasets` library has to read this."""
    return path.is_dir() or path.suffix.lower() == ".parquet"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file or folder, all of one kind. The suffix decides; what has no known one is a text.

    Raises IA3Error, naming the file and where known the line, for whatever keeps it from being read.
    """
    suffix = path.suffix.lower()
    if not os.path.exists(path):
        raise IA3Error(f"{path} does not exist; {FILES}.")
    if needs_datasets(path):
        return _checked((f"{path}, row {number}", row) for number, row in enumerate(_load_dataset(path)))
    text = _read_text(path)
    if suffix in JSON:
        return _checked(_parse_records(text, path))
    if suffix in DELIMITERS:
        return _checked(_parse_table(text, path, DELIMITERS[suffix]))
    _refuse_disguise(text, path)
    return [{"text": text}]


def _load_dataset(path: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            # streamed: no second copy of it in a cache
            return list(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise IA3Error(f"{path} cannot be read as a data set ({reason_of(error)}); {FILES}.") from error
    if isinstance(found, datasets.Dataset):
        return found
    if "train" not in found and len(found) > 1:
        raise IA3Error(f"{path} has the splits {', '.join(found)}; expected one named train, or a single one.")
    return found.get("train", next(iter(found.values())))


def _read_text(path: Path) -> str:
    from ia3_kernels import target

    raw = read_bytes(path, target.host_memory() // 4, FILES)
    if b"\0" in raw:
        raise IA3Error(f"{path} is not text (it has a zero byte at {raw.index(0)}); {FILES}.")
    try:
        text = raw.decode("utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        what = f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise IA3Error(f"{path} is not UTF-8 ({what}); convert it to UTF-8.") from error
    if not text.strip():
        raise IA3Error(f"{path} is empty; training needs text.")
    return text


def _parse_records(text: str, path: Path) -> _Placed:
    """Read one JSON array; or JSON Lines, which many name .json as well."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, str(path), "expected an array of objects")):
            yield f"{path}, item {number}", record
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold what splitlines() splits at
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, "expected one object a line")


def parse_json(text: str | bytes, where: str, expected: str) -> Any:
    """Parse JSON, in UTF-8 and of any depth of nonsense. Raises IA3Error: `where` it stood, what was `expected`."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise IA3Error(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise IA3Error(f"{where} is not JSON ({error.msg} at column {error.colno}); {expected}.") from error
    except RecursionError as error:
        raise IA3Error(f"{where} is nested too deeply; {expected}.") from error
    except ValueError as error:  # a number of too many digits
        raise IA3Error(f"{where} is not JSON ({reason_of(error)}); {expected}.") from error


def _parse_table(text: str, path: Path, delimiter: str) -> _Placed:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise IA3Error(f"{path} is no table after line {reader.line_num} ({error}); quote its fields.") from error


def _refuse_disguise(text: str, path: Path) -> None:
    """Raise IA3Error for JSON Lines or a table under another name: nobody wants braces and field names learned."""
    first = text.lstrip().partition("\n")[0].strip()
    found = []
    with suppress(ValueError, RecursionError):
        found += [".jsonl"] if isinstance(json.loads(first), dict) else []
    for suffix, delimiter in DELIMITERS.items():
        names = {name.strip().strip('"') for name in first.split(delimiter)}
        if delimiter in first and any(names.issuperset(fields) for fields in KINDS.values()):
            found.append(suffix)
    if found:
        raise IA3Error(f"{path} looks like a {found[0]} file, and would be learned as plain text; name it {found[0]}.")


def _checked(records: _Placed) -> list[Row]:
    rows: list[Row] = []
    kind = ""
    for where, record in records:
        if not isinstance(record, dict):
            raise IA3Error(f"{where} holds a JSON {type(record).__name__}; expected an object.")
        found = kind_of(record)
        if not found:
            names = ", ".join(map(repr, record)) or "none"
            raise IA3Error(f"{where} needs {EXPECTED}; its fields: {names[:200]}.")
        if kind and found != kind:
            raise IA3Error(f"{where} is of another kind than those before; give all of them {EXPECTED}.")
        kind = found
        rows.append({name: _field(record, name, where) for name in KINDS[kind]})
    if not rows:
        raise IA3Error("the data has no rows; training needs some.")
    return rows


def kind_of(record: Row) -> str:
    """Return the key of KINDS whose fields are there and not null, or an empty string."""

    def first(has: Callable[[str], bool]) -> str:
        return next((kind for kind, fields in KINDS.items() if all(map(has, fields))), "")

    # a null where a text belongs is told by the field's own check
    return first(lambda field: record.get(field) is not None) or first(lambda field: field in record)


def _field(record: Row, name: str, where: str) -> Any:
    value = record[name]
    if name == "messages":
        return check_messages(value, where)
    if not isinstance(value, str):
        raise IA3Error(f"{where}: '{name}' is a {type(value).__name__}; expected a string.")
    if not value.strip() and name != "prompt":
        raise IA3Error(f"{where}: '{name}' is blank; remove the row or give it text.")
    return value


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Return a chat's turns without their empty fields, or raise IA3Error."""
    if isinstance(messages, str):  # a table's cell
        messages = parse_json(messages, f"{where}: 'messages'", "expected a list of turns")
    if not isinstance(messages, list) or not messages:
        raise IA3Error(f"{where}: 'messages' is not a list of turns; expected {{'role': ..., 'content': ...}} in each.")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise IA3Error(f"{where}: 'messages' holds a turn without 'role' and 'content'; give it both.")
    return [{name: value for name, value in turn.items() if value is not None} for turn in messages]


# --- tokenizing and splitting ------------------------------------------------------------------------------------


def prepare(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, block_size: int, held_out: float, seed: int = 0
) -> Corpus:
    """Tokenize `rows` into sequences of at most `block_size` tokens and keep a fraction `held_out` (0 to 1) apart.

    What is kept apart is chosen by `seed`: whole texts, pairs or chats; of a single text, its end. The tokens that do
    not fill a last block are dropped. Raises IA3Error if either part comes out empty.
    """
    kind = kind_of(rows[0])
    make = {"text": _text, "pairs": _pair, "messages": _chat}[kind]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    whole = [make(row, tokenizer, end) for row in rows]
    sizes = [len(sequence["input_ids"]) for sequence in whole]
    cut = 0
    if kind != "text":
        cut = sum(size > block_size for size in sizes)
        kept = max(1, round(held_out * len(rows))) if held_out else 0
        train, apart = _split([_cut(sequence, block_size) for sequence in whole], [1] * len(rows), kept, seed)
    elif len(rows) > 1:
        tokens = max(held_out * sum(sizes), block_size) if held_out else 0
        train, apart = (_blocks(part, block_size) for part in _split(whole, sizes, tokens, seed))
    else:
        blocks = _blocks(whole, block_size)
        kept = max(1, round(held_out * len(blocks))) if held_out else 0
        train, apart = blocks[: len(blocks) - kept], blocks[len(blocks) - kept :]
    if not train or (held_out and not apart):
        raise IA3Error(
            f"the data has {sum(sizes):,} tokens in {len(rows):,} rows, too few for one sequence "
            f"{'to keep apart' if train else 'to train on'} (block size {block_size}, held-out fraction {held_out:g}); "
            "give more data, a smaller --block-size or another --held-out (0 keeps nothing apart)."
        )
    return Corpus(kind, train, apart, cut)


def _split(sequences: list[Tokens], sizes: list[int], wanted: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Keep random sequences apart until their `sizes` make `wanted`; one that would overshoot it by half stays."""
    order = list(range(len(sequences)))
    Random(seed).shuffle(order)
    apart: set[int] = set()
    total = 0
    for index in order:
        if total < wanted and total + sizes[index] <= 1.5 * wanted:
            apart.add(index)
            total += sizes[index]
    train = [sequence for index, sequence in enumerate(sequences) if index not in apart]
    return train, [sequences[index] for index in sorted(apart)]


def _blocks(documents: list[Tokens], size: int) -> list[Tokens]:
    """Join documents and cut them into blocks; what does not fill the last one is dropped."""
    stream = list(chain.from_iterable(document["input_ids"] for document in documents))
    blocks = (stream[start : start + size] for start in range(0, len(stream) - size + 1, size))
    return [{"input_ids": block, "labels": list(block)} for block in blocks]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: a text longer than the model's context is what blocks are for, not something to warn about
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _text(row: Row, tokenizer: PreTrainedTokenizerBase, end: list[int]) -> Tokens:
    return _sequence((_tokenize(tokenizer, row["text"]) + end, True))


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, end: list[int]) -> Tokens:
    prompt = _tokenize(tokenizer, row["prompt"], special=True)
    if end and prompt[-1:] == end:  # a tokenizer that ends every text would end the prompt before its completion
        prompt = prompt[:-1]
    completion = _tokenize(tokenizer, row["completion"]) + end
    if len(prompt) + len(completion) < 2:
        raise IA3Error(f"the pair with completion {row['completion']!r:.200} is a single token; give it a prompt.")
    return _sequence((prompt, False), (completion, True))


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase, end: list[int]) -> Tokens:
    """Split a chat, as the model's template writes it, at the beginnings and ends of the assistant's turns."""
    messages = row["messages"]
    turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not turns:
        raise IA3Error("a chat has no turn of the role 'assistant', so there is nothing to learn in it; remove it.")
    # A template may write earlier turns differently once there are later ones; then the last turn alone is learned.
    for wanted in (turns, turns[-1:]):
        pieces: list[tuple[list[int], bool]] = []
        done = ""
        for index in wanted:
            prompt = render_chat(tokenizer, messages[:index], add_generation_prompt=True)
            whole = render_chat(tokenizer, messages[: index + 1], add_generation_prompt=False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                break
            pieces += [(_tokenize(tokenizer, prompt[len(done) :]), False)]
            pieces += [(_tokenize(tokenizer, whole[len(prompt) :]), True)]
            done = whole
        else:
            return _sequence(*pieces)
    raise IA3Error(
        "the model's chat template writes an answer differently from what it prompts with, so that prompt and answer "
        "cannot be told apart; write the data as 'prompt' and 'completion'."
    )


def _sequence(*pieces: tuple[list[int], bool]) -> Tokens:
    """Join pieces, each of which is its tokens and whether they are learned."""
    labels = (tokens if is_learned else [IGNORED] * len(tokens) for tokens, is_learned in pieces)
    return {"input_ids": list(chain(*(tokens for tokens, _ in pieces))), "labels": list(chain(*labels))}


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return a chat as the model's own template writes it. Raises IA3Error if it has none, or refuses the turns."""
    if not tokenizer.chat_template:
        raise IA3Error(
            "the model's tokenizer has no chat template, so it cannot take 'messages'; use an instruction-tuned model, "
            "or write 'prompt' and 'completion'."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # whatever a template raises, it raises about the turns
        raise IA3Error(f"the model's chat template refuses the chat: {reason_of(error)}.") from error


def _cut(sequence: Tokens, size: int) -> Tokens:
    """Cut to `size` tokens: what is learned matters most, so the prompt gives way first, from its far end.

    One token always stays before what is learned: the first token of a sequence is never predicted.
    """
    labels = sequence["labels"]
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    start = max(0, min(len(labels) - size, first - 1))
    return {name: values[start : start + size] for name, values in sequence.items()}
