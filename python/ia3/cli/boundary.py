"""Where exceptions and signals become sentences: one line on stderr, an exit code, and no traceback."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import typer

from ..errors import IA3Error, printable, reason_of

USER_ERROR = 2
BUG = 1

# typer vendors click in some versions and imports it in others; in both, BadParameter derives from UsageError.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


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
    """Run `command` and return the exit code: an int that it returned, else 0, or what its error asks for."""
    try:
        with _terminated_cleanly(), _short_warnings():
            result = command()
    except _UsageError as error:
        if str(error):  # without one, typer has shown the help
            say("Error", _usage_sentence(error))
        return USER_ERROR
    except (Stopped, KeyboardInterrupt) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        say("Interrupted", stop.sentence)
        return 128 + stop.number
    except Exception as error:
        if settings.traceback:
            traceback.print_exc()
        code, sentence = _describe(error)
        say("Error", sentence)
        return code
    return result if isinstance(result, int) else 0


def _describe(error: Exception) -> tuple[int, str]:
    if isinstance(error, IA3Error):
        return USER_ERROR, str(error)
    first = reason_of(error)
    # torch has a class for a full GPU, but reports a full main memory as a plain RuntimeError
    if isinstance(error, MemoryError) or "out of memory" in first or "can't allocate memory" in first:
        remedy = "try a smaller --batch-size or --block-size, fewer new tokens, or a smaller model"
        return USER_ERROR, f"the memory is full; {remedy}."
    return BUG, f"unexpected {type(error).__name__}: {first} (`ia3 --traceback ...` shows more, for a report)"


def _usage_sentence(error: Any) -> str:
    path = error.ctx.command_path if error.ctx else "ia3"
    return f"{error.format_message().rstrip('.')}; `{path} --help` lists what fits."


@contextmanager
def signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let `handler` have Ctrl-C and SIGTERM meanwhile; outside of the main thread they are another's to handle."""
    previous: dict[int, Any] = {}
    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in a job that a shell runs in the background
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for each, before in previous.items():
            signal.signal(each, before)


def _terminated_cleanly() -> AbstractContextManager[None]:
    """Let both signals unwind like an exception, so that half-written folders are removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    return signals(leave)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the source line that raised them."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if not issubclass(category, (DeprecationWarning, FutureWarning)):  # those are for programmers
            say("Warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
