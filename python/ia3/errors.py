"""The one exception that a user's mistake raises, and what may be said in it."""

from __future__ import annotations

# Of what came; whoever reads a sentence wants its end as well.
_LONGEST = 2000


class IA3Error(ValueError):
    """What came, what was expected and what to do, in one sentence.

    A ``ValueError``, because that is what PEFT raises for the same mistakes and what scripts already catch. Names and
    values in it may come from files that others made: control characters become escapes, for it may go to a terminal.
    """

    def __init__(self, sentence: object = "") -> None:
        super().__init__(printable(str(sentence)))


def printable(text: str) -> str:
    """Return text without control characters, and without the middle where it is too long to be read."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 500]} … {text[-500:]}"
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(shown)


def reason_of(error: BaseException) -> str:
    """Return another library's message on one line, shortened, or the error's class where it says nothing."""
    words = " ".join(str(error).split())
    return (words if len(words) <= 300 else f"{words[:200]} … {words[-100:]}") or type(error).__name__
