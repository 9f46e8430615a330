"""Requests of `ia3 generate --requests`: one JSON object a line, checked one by one, so that none spoils the others."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import IA3Error
from ..files import LONGEST_TEXT
from .data import check_messages, parse_json

BASE_NAME = "__base__"
FIELDS = ("id", "prompt", "messages", "adapter", "max_new_tokens", "stop")


@dataclass(frozen=True)
class Request:
    """What to go on from, a text or a chat's turns, with which adapter (None: the base model), and until when."""

    prompt: str | list[dict[str, Any]]
    adapter: str | None
    max_new_tokens: int
    stop: tuple[str, ...]


def read(path: Path) -> list[tuple[int, bytes]]:
    """Return the lines of a file (`-`: of stdin) that are not blank, with their numbers from 1. Raises IA3Error.

    Lines end at a newline and nowhere else: JSON may hold what other programs take for the end of a line.
    """
    try:
        # A FIFO is as good as a file: `--requests <(...)`
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            content = file.read(LONGEST_TEXT + 1)
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror}; --requests is a file of JSON Lines.") from error
    if len(content) > LONGEST_TEXT:
        raise IA3Error(f"{path} has more than {LONGEST_TEXT:,} bytes; give fewer requests at a time.")
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # a byte-order mark is no part of the first request
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise IA3Error(f'{path} is empty; write one request a line, such as {{"prompt": "...", "adapter": "fr"}}.')
    return found


def decode(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds. Raises IA3Error with what is wrong with it."""
    content = parse_json(line, "it", "expected an object with a prompt")
    if not isinstance(content, dict):
        raise IA3Error(f"it is a {type(content).__name__}; expected an object with a prompt.")
    return content


def parse(content: dict[str, Any], adapters: Collection[str], max_new_tokens: int, stop: Sequence[str]) -> Request:
    """Return one request. Raises IA3Error with what is wrong with it.

    adapters: the names there are; a request without one, or with `__base__`, is for the base model.
    max_new_tokens, stop: for a request that says nothing else.
    """
    unknown = sorted(content.keys() - set(FIELDS))
    if unknown:
        raise IA3Error(f"it has the field {unknown[0]!r:.200}; expected no others than {', '.join(FIELDS)}.")
    prompt, adapter = content.get("prompt"), content.get("adapter")
    if content.get("messages") is not None:
        if prompt is not None:
            raise IA3Error("it has a prompt and messages; expected one of them.")
        prompt = check_messages(content["messages"], "it")
    elif not isinstance(prompt, str) or not prompt:
        raise IA3Error(f"its prompt is {str(prompt)[:200]!r}; expected a text.")
    if adapter == BASE_NAME and BASE_NAME not in adapters:
        adapter = None
    if adapter is not None and (not isinstance(adapter, str) or adapter not in adapters):
        expected = f"the name of one of the {len(adapters)} in --adapters" if adapters else "none without --adapters"
        raise IA3Error(f"its adapter is {str(adapter)[:200]!r}; expected {expected}.")
    count = content.get("max_new_tokens", max_new_tokens)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise IA3Error(f"its max_new_tokens is {str(count)[:200]}; expected a number above 0.")
    ends = content.get("stop", stop)
    ends = [ends] if isinstance(ends, str) else ends
    if not isinstance(ends, (list, tuple)) or not all(isinstance(text, str) and text for text in ends):
        raise IA3Error(f"its stop is {str(ends)[:200]!r}; expected a text, or a list of them.")
    return Request(prompt, adapter, count, tuple(ends))
