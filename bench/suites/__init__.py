"""The suites, by the name that the command line knows them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..records import Recorder
from ..settings import Settings
from . import (
    accuracy,
    decode,
    host,
    memory,
    merge,
    merge_checkpoint,
    mixed,
    moe,
    operators,
    protocol,
    serve,
    train_step,
)

SUITES: Mapping[str, Callable[[Settings, Recorder], None]] = {
    "operators": operators.run,
    "accuracy": accuracy.run,
    "host": host.run,
    "train_step": train_step.run,
    "protocol": protocol.run,
    "decode": decode.run,
    "memory": memory.run,
    "mixed": mixed.run,
    "moe": moe.run,
    "merge": merge.run,
    "merge_checkpoint": merge_checkpoint.run,
    "serve": serve.run,
}
