"""``IA3Config``: PEFT's configuration of IA3, checked when it is made."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
import warnings
from dataclasses import dataclass
from typing import Any

import peft
import regex
from peft import PeftType, TaskType

from .errors import IA3Error, reason_of
from .files import read_json, source_folder

CONFIG_NAME = "adapter_config.json"


# Regular expressions come in files that others made, and some match for longer than anybody waits. Python's own engine
# cannot be stopped; the regex package can, and each pattern gets this many seconds of its thread's time, for all names
# together. Repetitions are counted before: that engine writes them out.
# Matching a name takes some microseconds, and that is free.
_MATCH_SECONDS, _FREE_SECONDS = 1.0, 2e-4
_LONGEST = 1 << 16


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> tuple[Any, list[float]]:
    """Return a compiled regular expression, and a place for the seconds that it has taken; ``ValueError`` for none."""
    counts = [int(number[:9]) for number in re.findall(r"[{,](\d+)", pattern)]
    size = len(pattern) * math.prod(max(count, 1) for count in counts)
    if size > _LONGEST:
        raise ValueError(f"its length times its repetitions is {size:,}; {_LONGEST:,} at most")
    re.compile(pattern)  # what PEFT takes
    return regex.compile(pattern), [0.0]


def fullmatch(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches a whole name; raises :class:`IA3Error` where it takes too long."""
    compiled, spent = _compiled(pattern)
    start = time.thread_time()
    try:
        if spent[0] > _MATCH_SECONDS:
            raise TimeoutError
        return compiled.fullmatch(name, timeout=_MATCH_SECONDS) is not None
    except (TimeoutError, MemoryError):
        raise IA3Error(
            f"the regular expression {pattern!r:.200} takes too long to match; write it without repetitions inside of "
            "repetitions, or pass a list of names."
        ) from None
    finally:
        spent[0] += max(time.thread_time() - start - _FREE_SECONDS, 0.0)


def _quoted(names: set[str] | list[str]) -> str:
    return ", ".join(f"{name!r:.200}" for name in sorted(names))


def _as_names(name: str, value: Any) -> set[str] | str | None:
    """Return a list of names as a set; a string (a regular expression) and ``None`` stay."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(entry, str) for entry in value):
        if len(value) > _LONGEST:
            raise IA3Error(f"{name} has {len(value):,} names; {_LONGEST:,} at most: write a regular expression.")
        return set(value)
    raise IA3Error(
        f"{name} is {value!r:.200}; expected a list of module names, a regular expression as a string, or None: "
        "correct it."
    )


@dataclass
class IA3Config(peft.IA3Config):
    """How (IA)³ is applied to a model: ``peft.IA3Config``, whose fields are checked.

    target_modules: the modules to scale. A list matches a module whose name equals an entry or ends with ``.entry``; a
        string is a regular expression matched against the whole name; ``"all-linear"`` is every linear layer but the
        output layer; ``None`` takes the defaults of the model's type.
    exclude_modules: modules to leave out, in the same forms.
    feedforward_modules: the targets whose *input* is scaled rather than their output. A list matches names that end
        with an entry and must be a subset of a ``target_modules`` list; a string is a regular expression.
    fan_in_fan_out: whether weights are stored ``[in, out]`` (transformers' ``Conv1D``); a wrong value is corrected
        with a warning.
    modules_to_save: further modules that are trained and saved whole. The heads of ``SEQ_CLS``, ``TOKEN_CLS`` and
        ``QUESTION_ANS`` models are added by themselves.
    init_ia3_weights: start the vectors at ones (else at normal noise).
    target_parameters: the three-dimensional parameters of experts to scale, by their names or the ends of these, as
        in PEFT's LoRA: the inputs of ``mlp.experts.down_proj``, the outputs of ``mlp.experts.gate_up_proj``. With
        ``target_modules=[]``, nothing else. PEFT's IA3 does not know this field, and refuses such an adapter.
    scale_queries: whether vectors on a fused projection (``c_attn``, ``query_key_value``, ``qkv_proj``) scale queries
        too, as in PEFT; else keys and values only, as in the paper. PEFT reads the same from the file.

    Raises :class:`~ia3.errors.IA3Error` (a ``ValueError``) where a field does not make sense.
    """

    target_parameters: list[str] | None = None
    scale_queries: bool = True

    def __post_init__(self) -> None:
        given: Any = self  # whose fields PEFT declares with types that its files do not keep to
        task = given.task_type
        if task is not None:
            try:
                given.task_type = TaskType(task)
            except ValueError:
                raise IA3Error(
                    f"task_type is {task!r:.200}; expected one of {', '.join(task.value for task in TaskType)}, "
                    "or None: correct it."
                ) from None
        if self.peft_type not in (None, PeftType.IA3):
            raise IA3Error(f"peft_type is {self.peft_type!r:.200}, but this is an IA3 configuration; leave it out.")
        for name in ("inference_mode", "fan_in_fan_out", "init_ia3_weights", "scale_queries"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, type(self).__dataclass_fields__[name].default)  # what a file's null means to PEFT
            elif not isinstance(value, bool):
                raise IA3Error(f"{name} is {value!r:.200}; expected True or False: correct it.")
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            setattr(self, name, _as_names(name, getattr(self, name)))
            self._check_pattern(name)
        saved = given.modules_to_save
        if saved is not None:
            names = _as_names("modules_to_save", saved)
            if isinstance(names, str):
                raise IA3Error(
                    f"modules_to_save is {names!r:.200}; expected a list of module names: write [{names!r:.200}]."
                )
            given.modules_to_save = list(saved)
        parameters = _as_names("target_parameters", self.target_parameters)
        if isinstance(parameters, str):
            raise IA3Error(
                f"target_parameters is {parameters!r}; expected a list of parameters' names: write [{parameters!r}]."
            )
        self.target_parameters = None if parameters is None else sorted(parameters)
        parameters = parameters or set()
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            outside = {
                entry
                for entry in self.feedforward_modules - self.target_modules
                if not any(f".{name}".endswith(f".{entry}") or entry.endswith(f".{name}") for name in parameters)
            }
            if outside:
                raise IA3Error(
                    f"feedforward_modules should be a subset of target_modules, but {_quoted(outside)} "
                    f"{'is' if len(outside) == 1 else 'are'} not among the targets {_quoted(self.target_modules)}; "
                    "add the names to target_modules or take them out of feedforward_modules."
                )
        # What of it means parameters, PEFT refuses.
        feedforward, given.feedforward_modules = given.feedforward_modules, None
        super().__post_init__()
        given.feedforward_modules = feedforward

    def _check_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if isinstance(pattern, str):
            try:
                _compiled(pattern)
            except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
                raise IA3Error(
                    f"{name} is {pattern!r:.200}, which is not a regular expression ({reason_of(error)}); correct it, "
                    "or pass a list of names."
                ) from None

    def to_dict(self) -> dict[str, Any]:
        """Return what a file holds: names in order, so that equal configurations make equal files.

        Fields that PEFT does not know, and would warn of, are in it where they mean something.
        """
        fields: dict[str, Any] = {
            name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()
        }
        if self.target_parameters is None:
            del fields["target_parameters"]
        if self.scale_queries:
            del fields["scale_queries"]
        return fields

    @classmethod
    def of(cls, config: Any) -> IA3Config:
        """Return a checked copy of a ``peft.IA3Config``; raises :class:`IA3Error` for anything else."""
        if not isinstance(config, peft.IA3Config):
            raise IA3Error(f"peft_config is a {type(config).__name__}; expected an ia3.IA3Config: make one.")
        values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config) if entry.init}
        copied: dict[str, Any] = {
            name: set(value) if isinstance(value, set) else value for name, value in values.items()
        }
        return cls(**copied)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **source: Any
    ) -> IA3Config:
        """Read ``adapter_config.json`` from a local folder or a hub's repository; raises :class:`IA3Error`.

        source: for a hub, ``revision``, ``token`` and ``cache_dir``.
        """
        path = source_folder(pretrained_model_name_or_path, subfolder, **source) / CONFIG_NAME
        if not os.path.lexists(path):
            raise IA3Error(f"there is no {CONFIG_NAME} in {path.parent}; name the local folder of a saved adapter.")
        content = read_json(path, "save the adapter again")
        if content.get("peft_type") != PeftType.IA3.value:
            raise IA3Error(
                f"{path} has peft_type {content.get('peft_type')!r:.200}; expected 'IA3': load this adapter with PEFT."
            )
        known = {entry.name for entry in dataclasses.fields(IA3Config) if entry.init}
        unknown = sorted(content.keys() - known)
        if unknown:
            warnings.warn(
                f"{path} has fields that this version does not know ({_quoted(unknown)}), probably from a newer PEFT; "
                "they have no effect.",
                stacklevel=2,
            )
        try:
            return cls(**{name: value for name, value in content.items() if name in known})
        except IA3Error as error:
            raise IA3Error(f"{path}: {error}") from None
