"""An adapter's two files, made by somebody who means no good."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ia3
from ia3.merging.checkpoint import plan_merge

from .harness import NO_FILES, bounds, put, refused, tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
ESCAPE = "\x1b]0;owned\x07\x9b31m\u202e"
PATH = "model.layers.0.self_attn.k_proj"


def config(**fields: Any) -> bytes:
    """Return a configuration with these fields instead of its own."""
    own = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj", "v_proj", "down_proj"]}
    return json.dumps(own | {"feedforward_modules": ["down_proj"]} | fields).encode()


LOADS = ""  # in place of what is said

CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "as JSON"),
    "text": (b"hello", "as JSON"),
    "half": (b'{"peft_type": "IA3"', "as JSON"),
    "not-utf8": (b'{"peft_type": "\xff"}', "as JSON"),
    "utf16": ('{"peft_type": "IA3"}'.encode("utf-16"), "as JSON"),
    "zeros": (b"\0" * 1000, "as JSON"),
    "list": (b"[]", "holds a list"),
    "null": (b"null", "holds a NoneType"),
    "number": (b"3", "holds a int"),
    "nested-lists": (b"[" * 100_000, "nested too deeply"),
    "nested-objects": (b'{"a":' * 100_000, "nested too deeply"),
    "nested-inside": (b'{"peft_type": "IA3", "target_modules": ' + b"[" * 100_000, "nested too deeply"),
    "long-number": (b'{"peft_type": ' + b"1" * 5000 + b"}", "as JSON"),
    "no-type": (b"{}", "peft_type None"),
    "lora": (config(peft_type="LORA"), "peft_type 'LORA'; expected 'IA3'"),
    "type-list": (config(peft_type=["IA3"]), "expected 'IA3'"),
    "long-type": (config(peft_type="x" * 1_000_000), "expected 'IA3'"),
    "type-escape": (config(peft_type=ESCAPE), "expected 'IA3'"),
    "task": (config(task_type="CHAT" + ESCAPE), "task_type is .*expected one of"),
    "task-list": (config(task_type=[1]), "expected one of"),
    "task-object": (config(task_type={"a": 1}), "expected one of"),
    "flag-text": (config(fan_in_fan_out="yes"), "fan_in_fan_out is 'yes'"),
    "flag-number": (config(inference_mode=1), "inference_mode is 1"),
    "flag-list": (config(init_ia3_weights=[]), r"init_ia3_weights is \[\]"),
    "flag-long": (config(init_ia3_weights="x" * 100_000), "expected True or False"),
    "targets-number": (config(target_modules=3), "target_modules is 3"),
    "targets-true": (config(target_modules=True), "target_modules is True"),
    "targets-object": (config(target_modules={"a": 1}), "expected a list of module names"),
    "targets-numbers": (config(target_modules=[1]), r"target_modules is \[1\]"),
    "targets-null": (config(target_modules=[None]), "expected a list of module names"),
    "targets-nested": (config(target_modules=[["k_proj"]]), "expected a list of module names"),
    "targets-empty": (config(target_modules=[], feedforward_modules=[]), "target_modules is empty"),
    "targets-blank": (config(target_modules=""), "matches no module"),
    "targets-none": (config(target_modules=["nope"], feedforward_modules=[]), "'nope'"),
    "targets-escape": (config(target_modules=[ESCAPE], feedforward_modules=[]), r"\\x1b"),
    "targets-long": (config(target_modules=["x" * 1_000_000], feedforward_modules=[]), "x{100}"),
    "targets-many": (config(target_modules=[f"m{n}" for n in range(70_000)]), "70,000 names"),
    "targets-10000": (
        config(target_modules=[f"m{n}" for n in range(10_000)], feedforward_modules=[]),
        "target_modules names",
    ),
    "excluded-10000": (config(exclude_modules=[f"m{n}" for n in range(10_000)]), LOADS),
    "saved-10000": (config(modules_to_save=[f"m{n}" for n in range(10_000)] + ["layers"]), "take out all"),
    "feedforward-outside": (config(feedforward_modules=["o_proj"]), "should be a subset"),
    "feedforward-number": (config(feedforward_modules=5), "feedforward_modules is 5"),
    "excluded-number": (config(exclude_modules=7), "exclude_modules is 7"),
    "excluded-all": (config(exclude_modules=".*"), "nothing is left to scale"),
    "saved-text": (config(modules_to_save="lm_head"), "modules_to_save is 'lm_head'"),
    "saved-numbers": (config(modules_to_save=[1]), "modules_to_save"),
    "infinite": (config(task_type="CHAT").replace(b'"CHAT"', b"1e999"), "task_type is inf"),
}
# Fields that decide which tensors the file has to have; no merge on disk reads them.
_OF_A_MODEL = ("targets-empty", "targets-blank", "targets-none", "targets-escape", "targets-long", "targets-10000")
_OF_A_MODEL += ("excluded-10000", "saved-10000", "excluded-all")


def attack(made: Callable[[], object], said: str, seconds: float = 2.0, nbytes: int = 1 << 29) -> None:
    """Make an attack that is refused, or where nothing is to be said, loads in time."""
    if said:
        refused(made, said, seconds, nbytes)
    else:
        with bounds(seconds, nbytes):
            made()


def in_a_model(plain: nn.Module, adapter: Path) -> Callable[[], object]:
    before = [id(module) for module in plain.modules()]

    def load() -> None:
        try:
            ia3.PeftModel.from_pretrained(plain, adapter).unload()
        finally:
            assert [id(module) for module in plain.modules()] == before

    return load


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration(name: str, plain: nn.Module, folders: tuple[Path, Path]) -> None:
    content, said = CONFIGS[name]
    base, adapter = folders
    (adapter / CONFIG).write_bytes(content)
    before = tree(base.parent)
    attack(in_a_model(plain, adapter), said)
    if name not in _OF_A_MODEL:
        refused(lambda: plan_merge(base, adapter, base.parent / "out"), said)
    assert tree(base.parent) == before


# --- regular expressions ----------------------------------------------------------------------------------------------

PATTERNS: dict[str, tuple[str, str]] = {
    "alternatives": (r"(?:.|..|...)*[^\w.]", "too long"),
    "same": (r"(?:a|.|(?:.))*(?:[!]|\?)", "too long"),
    "counted": (r"(?:[a-z_.0-9]{1,12}){1,12}[!?]", "too long"),
    "nested-counted": (r"(?:(?:.{1,9}){1,9}){1,9}[!?]", "too long"),
    "nested": (r"(?:(?:[a-z_.0-9]+)+)+!", "matches no"),
    "overlapping": (r"(?:\w|\.|[a-z])*(?:\w|\.|[a-z])*(?:\w|\.|[a-z])*(?:\w|\.|[a-z])*!", "matches no"),
    "back": (r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6\7!", "matches no"),
    "lookahead": (r"(?:(?=(.+))(?:.|..)+)+!", "matches no"),
    "lazy": (r"(?:(?:.+?)+?)+?!", "matches no"),
    "dots": (r".*.*.*.*.*.*.*.*.*.*!", "matches no"),
    "optional": (r"(?:.?){60}" + "." * 30 + "!", "matches no"),
    "million": (r"(?:a?){1000000}!", "its length times its repetitions"),
    "nested-counts": (r"(?:(?:(?:a{9999}){9999}){9999})!", "its length times its repetitions"),
    "beyond": (r"a{99999999999999999999}", "its length times its repetitions"),
    "huge-count": (r"a{" + "9" * 5000 + "}", "its length times its repetitions"),
    "open-count": (r"(?:[a-z.]{5000,})*!", "its length times its repetitions"),
    "deep-groups": ("(" * 5000 + ")" * 5000, "is not a regular expression"),
    "deep-repeats": ("(?:" * 3000 + "a" + ")*" * 3000, "is not a regular expression"),
    "long": ("|".join(f"x{n}" for n in range(100_000)), "its length times its repetitions"),
    "open": ("(k_proj", "is not a regular expression"),
    "star": ("*k_proj", "is not a regular expression"),
    "escape": (ESCAPE + "(", r"\\x1b"),
    "surrogate": ("\ud800(", "is not a regular expression"),
    "lookbehind": (r"(?<=a+)b", "is not a regular expression"),
    "unknown-group": (r"(?P=none)", "is not a regular expression"),
}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "feedforward_modules"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern(name: str, field: str, plain: nn.Module, folders: tuple[Path, Path]) -> None:
    pattern, said = PATTERNS[name]
    base, adapter = folders
    (adapter / CONFIG).write_bytes(config(**{field: pattern}))
    if field != "target_modules" and said == "matches no":  # then it takes nothing out, or scales outputs
        said = LOADS if field == "exclude_modules" else "has shape"
    for _ in range(2):  # the second adapter with a pattern is refused at once
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack(in_a_model(plain, adapter), said)
    if field == "feedforward_modules":
        refused(lambda: plan_merge(base, adapter, base.parent / "out"), "too long|is not a regular|shape")


def test_patterns_that_people_write_match_as_in_re() -> None:
    from ia3.config import fullmatch

    patterns = [r".*\.(k|v)_proj", r"model\.layers\.\d{1,2}\..*", r"(?:.*?(?:language|text).*?)?(?:self_attn|mlp)\..*"]
    patterns += [r".*", r"(?!.*lm_head).*proj", r"[^.]+", PATH.replace(".", r"\."), r"\S+[05]\S*", ""]
    names = [PATH, "lm_head", "", "model.layers.15.mlp.down_proj", "encoder.block.0.layer.0.SelfAttention.k"]
    for pattern in patterns:
        for name in names:
            assert fullmatch(pattern, name) == bool(re.fullmatch(pattern, name))


# --- weights ----------------------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


def header(entries: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (16, 1), offsets: object = (0, 64)) -> dict[str, object]:
    return {KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DATA = b"\0" * 64
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "seven-bytes": b"\1" * 7,
    "length-2-63": struct.pack("<Q", 1 << 63),
    "length-beyond": struct.pack("<Q", 1 << 20) + b"{}",
    "length-zero": struct.pack("<Q", 0),
    "no-json": header(b"hello"),
    "not-utf8": header(b'{"\xff": 1}'),
    "list": header([]),
    "nested": header(b"[" * 100_000),
    "nested-objects": header(b'{"a":' * 100_000),
    "no-offsets": header({KEY: {"dtype": "F32", "shape": [16, 1]}}),
    "negative": header(entry(offsets=(-64, 0)), DATA),
    "reversed": header(entry(offsets=(64, 0)), DATA),
    "beyond": header(entry(offsets=(0, 1 << 40)), DATA),
    "overflow": header(entry(shape=(1 << 40, 1 << 40), offsets=(0, 64)), DATA),
    "shape-negative": header(entry(shape=(-16, 1)), DATA),
    "shape-infinite": header(b'{"%s":{"dtype":"F32","shape":[1e999],"data_offsets":[0,64]}}' % KEY.encode(), DATA),
    "shape-text": header(entry(shape=("16", 1)), DATA),
    "shape-null": header(entry(shape=None), DATA),
    "shape-other": header(entry(shape=(17, 1)), DATA),
    "overlap": header({**entry(), KEY + "2": entry()[KEY]}, DATA),
    "gap": header(entry(offsets=(4, 68)), DATA + b"\0" * 4),
    "more": header(entry(), DATA + b"more"),
    "less": header(entry(), DATA[:-1]),
    "dtype": header(entry(dtype="F33"), DATA),
    "dtype-list": header(entry(dtype=[]), DATA),  # type: ignore[arg-type]
    "metadata": header({"__metadata__": {"a": [1]}, **entry()}, DATA),
    "pickle": b"\x80\x04}q\x00.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "html": b"<!DOCTYPE html><html>404</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n",
}


@pytest.fixture(scope="session")
def bank_of(tiny_model: Path) -> Any:
    import transformers

    from .conftest import CONFIG as LAYERS

    return ia3.AdapterBank(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), LAYERS, 2)


def _with(value: Any, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    """Return what puts a value into the vector KEY, in this dtype."""

    def change(tensors: Tensors) -> Tensors:
        vector = tensors[KEY].to(dtype)
        vector.view(-1)[3] = value
        return tensors | {KEY: vector}

    return change


def _as(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {KEY: change(tensors[KEY])}


def _named(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(16, 1)}


FINITE, FLOATS = "not finite in '.*k_proj", "dtype|as torch"
# What changes the tensors; what is said in a model and in the bank; and on disk
CHANGED: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "nan": (_with(float("nan")), FINITE, FINITE),
    "infinite": (_with(float("inf")), FINITE, FINITE),
    "minus-infinite": (_with(float("-inf"), torch.float16), FINITE, FINITE),
    "nan-bf16": (_with(float("nan"), torch.bfloat16), FINITE, FINITE),
    "fp64-1e300": (_with(1e300, torch.float64), FINITE, FINITE),
    "nan-fp8": (_as(lambda vector: torch.full_like(vector, torch.nan).to(torch.float8_e4m3fn)), FINITE, FINITE),
    "int8": (_as(lambda vector: vector.to(torch.int8)), FLOATS, FLOATS),
    "int64": (_as(lambda vector: vector.long()), FLOATS, FLOATS),
    "bool": (_as(lambda vector: vector > 0), FLOATS, FLOATS),
    "complex": (_as(lambda vector: vector.to(torch.complex64)), FLOATS, FLOATS),
    "longer": (_as(lambda vector: vector.repeat(2, 1)), "shape", "shape"),
    "transposed": (_as(lambda vector: vector.t().contiguous()), "shape", "shape"),
    "flat": (_as(lambda vector: vector.reshape(-1)), "shape", "shape"),
    "one-number": (_as(lambda vector: vector[0, 0].clone()), "shape", "shape"),
    "no-numbers": (_as(lambda vector: vector[:0]), "shape", "shape"),
    "many-dimensions": (_as(lambda vector: vector.reshape(16, *(1,) * 60)), "shape", "shape"),
    "unknown-name": (_named("base_model.model.model.layers.9.self_attn.k_proj.ia3_l"), "no place|places", "finds no"),
    "escape-in-name": (_named(f"base_model.model.{ESCAPE}.ia3_l"), r"\\x1b", r"\\x1b"),
    "long-name": (_named("base_model.model." + "x" * 100_000 + ".ia3_l"), "x{100}", "x{100}"),
    "no-prefix": (_named("layers.0.self_attn.k_proj.ia3_l"), "no place", "no tensor of IA3"),
    "twice": (_named(KEY + ".default"), "two tensors for one place", "two tensors for one place"),
}


def _attacks(plain: nn.Module, bank: Any, base: Path, adapter: Path) -> Mapping[str, Callable[[], object]]:
    return {
        "model": in_a_model(plain, adapter),
        "bank": lambda: bank.load("a", adapter),
        "disk": lambda: plan_merge(base, adapter, base.parent / "out"),
    }


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file(name: str, plain: nn.Module, bank_of: Any, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    (adapter / WEIGHTS).write_bytes(DAMAGED[name])
    before = tree(base.parent)
    for made in _attacks(plain, bank_of, base, adapter).values():
        refused(made, f"{WEIGHTS} is damaged: .*again")
    assert tree(base.parent) == before
    assert len(bank_of) == 0


def test_300000_empty_tensors(plain: nn.Module, bank_of: Any, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = (f"base_model.model.model.layers.{number}.ia3_l" for number in range(300_000))
    (adapter / WEIGHTS).write_bytes(header(dict.fromkeys(names, empty)))
    for made in _attacks(plain, bank_of, base, adapter).values():
        refused(made, "a header of .* bytes")


@pytest.mark.parametrize("name", CHANGED)
def test_tensors_that_do_not_fit(name: str, plain: nn.Module, bank_of: Any, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    change, in_memory, on_disk = CHANGED[name]
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    before = tree(base.parent)
    for place, made in _attacks(plain, bank_of, base, adapter).items():
        refused(made, on_disk if place == "disk" else in_memory)
    assert tree(base.parent) == before
    assert len(bank_of) == 0


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file(what: str, file: str, plain: nn.Module, bank_of: Any, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    put(adapter / file, NO_FILES[what])
    before = tree(base.parent)
    for made in _attacks(plain, bank_of, base, adapter).values():
        refused(made, f"{file} (cannot be read|has .* bytes|is damaged)")
    assert tree(base.parent) == before


@pytest.mark.parametrize(
    "name", ["\0", "x" * 100_000, "a/" * 5000, ESCAPE, "\ud800", "..", "/dev/zero", "/proc/self/fd"]
)
def test_what_is_no_folder(name: str, plain: nn.Module, bank_of: Any, tmp_path: Path) -> None:
    for made in _attacks(plain, bank_of, tmp_path, Path(name)).values():
        refused(made, ".")
    assert list(tmp_path.iterdir()) == []
