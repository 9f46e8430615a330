"""Requests of `ia3 generate --requests`: one JSON object a line, checked one by one, so that none spoils the others."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import IA3Error

BASE_NAME = "__base__"
_FIELDS = ("prompt", "adapter", "max_new_tokens")


@dataclass(frozen=True)
class Request:
    """What to go on from, with which adapter, and for how many tokens at most."""

    prompt: str
    adapter: str
    max_new_tokens: int


def read(path: Path) -> list[str]:
    """The lines of the file that are not blank. Raises IA3Error."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise IA3Error(f"{path} cannot be read: {error.strerror}; --requests is a file of JSON Lines.") from error
    except UnicodeDecodeError as error:
        raise IA3Error(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise IA3Error(f'{path} is empty; write one request a line, such as {{"prompt": "...", "adapter": "fr"}}.')
    return lines


def parse(line: str, adapters: Collection[str], max_new_tokens: int) -> Request:
    """One request. Raises IA3Error with what is wrong with it.

    adapters: the names there are; a request without one, or with `__base__`, is for the base model.
    max_new_tokens: for a request that says nothing else.
    """
    try:
        content = json.loads(line)
    except ValueError as error:
        raise IA3Error(f"it is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise IA3Error(f"it is a {type(content).__name__}; expected an object with a prompt.")
    unknown = sorted(content.keys() - set(_FIELDS))
    if unknown:
        raise IA3Error(f"it has the field {unknown[0]!r}; expected no others than {', '.join(_FIELDS)}.")
    prompt, adapter = content.get("prompt"), content.get("adapter")
    count = content.get("max_new_tokens", max_new_tokens)
    if not isinstance(prompt, str) or not prompt:
        raise IA3Error(f"its prompt is {prompt!r}; expected a text.")
    if adapter is None:
        adapter = BASE_NAME
    if not isinstance(adapter, str) or (adapter != BASE_NAME and adapter not in adapters):
        raise IA3Error(f"its adapter is {adapter!r}; expected the name of one of the {len(adapters)} in --adapters.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise IA3Error(f"its max_new_tokens is {count!r}; expected a number above 0.")
    return Request(prompt, adapter, count)
