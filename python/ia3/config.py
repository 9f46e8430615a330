"""``IA3Config``: every field of PEFT's configuration of IA3, with its defaults, checked."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from .errors import IA3Error
from .files import atomic_write_text
from .hub import source_folder

CONFIG_NAME = "adapter_config.json"
# The release of PEFT whose file format we write.
FORMAT_VERSION = "0.21.0"


class TaskType(str, Enum):
    """What the model is for; it decides which heads are trained and saved with the vectors."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """The method, as PEFT names it in its files."""

    IA3 = "IA3"


def _quoted(names: set[str] | list[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _as_names(name: str, value: Any) -> set[str] | str | None:
    """A list of names becomes a set; a string (a regular expression) and ``None`` stay."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(entry, str) for entry in value):
        return set(value)
    raise IA3Error(
        f"{name} is {value!r}; expected a list of module names, a regular expression as a string, or None: correct it."
    )


@dataclass
class IA3Config:
    """How (IA)³ is applied to a model; field for field what PEFT's ``IA3Config`` holds.

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

    Raises :class:`~ia3.errors.IA3Error` (a ``ValueError``) where a field does not make sense.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    # Fields that a newer PEFT wrote and this version does not know: kept, and written back.
    unknown_fields: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                raise IA3Error(
                    f"task_type is {self.task_type!r}; expected one of {', '.join(task.value for task in TaskType)}, "
                    "or None: correct it."
                ) from None
        if self.peft_type not in (None, PeftType.IA3):
            raise IA3Error(f"peft_type is {self.peft_type!r}, but this is an IA3 configuration; leave it out.")
        self.peft_type = PeftType.IA3
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        for name in ("inference_mode", "fan_in_fan_out", "init_ia3_weights"):
            if not isinstance(getattr(self, name), bool):
                raise IA3Error(f"{name} is {getattr(self, name)!r}; expected True or False: correct it.")
        self.target_modules = _as_names("target_modules", self.target_modules)
        self.exclude_modules = _as_names("exclude_modules", self.exclude_modules)
        self.feedforward_modules = _as_names("feedforward_modules", self.feedforward_modules)
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            self._check_pattern(name)
        self._check_modules_to_save()
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            outside = self.feedforward_modules - self.target_modules
            if outside:
                raise IA3Error(
                    f"feedforward_modules should be a subset of target_modules, but {_quoted(outside)} "
                    f"{'is' if len(outside) == 1 else 'are'} not among the targets {_quoted(self.target_modules)}; "
                    "add the names to target_modules or take them out of feedforward_modules."
                )

    def _check_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise IA3Error(
                    f"{name} is {pattern!r}, which is not a regular expression ({error}); correct it or pass a list of "
                    "names."
                ) from None

    def _check_modules_to_save(self) -> None:
        if self.modules_to_save is None:
            return
        names = _as_names("modules_to_save", self.modules_to_save)
        if isinstance(names, str):
            raise IA3Error(f"modules_to_save is {names!r}; expected a list of module names: write [{names!r}].")
        self.modules_to_save = list(self.modules_to_save)

    @property
    def is_prompt_learning(self) -> bool:
        """No; asked of every PEFT configuration by other libraries."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """No; as above."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as Python values (names are sets), unknown fields of a loaded file included."""
        content = asdict(self)
        unknown = content.pop("unknown_fields")
        return {**content, **unknown}

    def to_json(self) -> str:
        """The text of ``adapter_config.json`` as PEFT lays it out, sets as sorted lists."""
        content = {name: sorted(value) if isinstance(value, set) else value for name, value in self.to_dict().items()}
        return json.dumps(content, indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json`` into the folder, made where missing; raises :class:`IA3Error`."""
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise IA3Error(f"cannot save the configuration in {folder}: that is a file; name a folder.")
        atomic_write_text(folder / CONFIG_NAME, self.to_json())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **source: Any
    ) -> IA3Config:
        """Read ``adapter_config.json`` from a local folder or a hub's repository; raises :class:`IA3Error`.

        source: for a hub, ``revision``, ``token`` and ``cache_dir``.
        """
        path = source_folder(pretrained_model_name_or_path, subfolder, **source) / CONFIG_NAME
        if not path.is_file():
            raise IA3Error(f"there is no {CONFIG_NAME} in {path.parent}; name the local folder of a saved adapter.")
        try:
            content = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError) as error:
            raise IA3Error(f"{path} cannot be read as JSON ({error}); save the adapter again.") from None
        if not isinstance(content, dict):
            raise IA3Error(f"{path} holds a {type(content).__name__}; expected a JSON object: save the adapter again.")
        if content.get("peft_type") != PeftType.IA3.value:
            raise IA3Error(
                f"{path} has peft_type {content.get('peft_type')!r}; expected 'IA3': load this adapter with PEFT."
            )
        try:
            return cls.from_dict(content, str(path))
        except IA3Error as error:
            raise IA3Error(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "the configuration") -> IA3Config:
        """The configuration that :meth:`to_dict` describes, or that of PEFT's ``IA3Config``.

        Fields that this version does not know are kept in ``unknown_fields``, with a warning that names ``source``.
        Raises :class:`IA3Error`.
        """
        known = {entry.name for entry in fields(cls) if entry.init}
        unknown = {name: content[name] for name in sorted(content.keys() - known)}
        config = cls(**{name: value for name, value in content.items() if name in known})
        config.unknown_fields = unknown
        if unknown:
            warnings.warn(
                f"{source} has fields that this version does not know ({_quoted(list(unknown))}), probably from a "
                "newer PEFT; they are kept, but have no effect.",
                stacklevel=3,
            )
        return config
