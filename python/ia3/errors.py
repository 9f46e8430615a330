"""The one exception that a user's mistake raises."""

from __future__ import annotations


class IA3Error(ValueError):
    """What came, what was expected and what to do, in one sentence.

    A ``ValueError``, because that is what PEFT raises for the same mistakes and what scripts already catch.
    """
