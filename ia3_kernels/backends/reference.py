"""The torch reference as a backend: every device, every dtype."""

from __future__ import annotations

from .. import reference
from ..schemas import DTYPES
from .base import Backend

BACKEND = Backend(
    name="reference",
    description="plain torch, on every device",
    device_types=frozenset(),
    dtypes=frozenset(DTYPES),
    operators=reference.OPERATORS,
)
