"""Where exceptions become sentences: one line on stderr, an exit code, and no traceback."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TextIO

import typer

from ..errors import IA3Error, printable, reason_of

USER_ERROR = 2
BUG = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# typer vendors click in some versions and imports it in others; in both, BadParameter derives from UsageError.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Stopped(SystemExit):
    """A signal ended the work, and a sentence says what it left."""

    def __init__(self, number: int, sentence: str = "the command did not finish.") -> None:
        super().__init__(128 + number)  # as shells report it
        self.number, self.sentence = number, sentence


@dataclass
class Settings:
    """What the options before the command's name set."""

    traceback: bool = False


def say(kind: str, sentence: str) -> None:
    """Write one line to stderr: `kind` in colour on a terminal, then the sentence, never wrapped or re-interpreted."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    style = {"Error": "bold red", "Warning": "bold yellow"}.get(kind, "bold")
    console.print(f"{kind}:", style=style, end=" ")
    console.print(" ".join(printable(sentence).split()), markup=False)


def run(command: Callable[[], object], settings: Settings) -> int:
    """Run `command` and returns the exit code: an int that it returned, else 0, or what its error asks for."""
    try:
        with _terminated_cleanly(), _short_warnings():
            result = command()
    except _UsageError as error:
        if str(error):  # without one, typer has shown the help
            say("Error", _usage_sentence(error))
        return USER_ERROR
    except Stopped as stop:
        say("Interrupted", stop.sentence)
        return 128 + stop.number
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        if settings.traceback:
            traceback.print_exc()
        code, sentence = _describe(error)
        say("Error", sentence)
        return code
    if result == INTERRUPTED:  # typer may have caught Ctrl-C itself, and returns its code
        say("Interrupted", "the command did not finish.")
    return result if isinstance(result, int) else 0


def _describe(error: Exception) -> tuple[int, str]:
    if isinstance(error, IA3Error):
        return USER_ERROR, str(error)
    first = reason_of(error)
    # torch has a class for a full GPU, but reports a full main memory as a plain RuntimeError
    if isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first:
        return (
            USER_ERROR,
            "the memory is full; try a smaller --batch-size or --block-size, fewer new tokens, or a smaller model.",
        )
    return BUG, f"unexpected {type(error).__name__}: {first} (`ia3 --traceback ...` shows more, for a report)"


def _usage_sentence(error: Exception) -> str:
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ia3"
    return f"{message.rstrip('.')}; `{path} --help` lists what fits."


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that half-written folders are removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: signals are another's to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the source line that raised them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, (DeprecationWarning, FutureWarning)):  # those are for programmers
            say("Warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
