"""`ia3 merge`: checkpoints merged on disk give the merged model, and whatever does not fit changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ia3
from ia3.cli import main
from ia3.cli.app import ENVIRONMENT
from ia3.streaming import folder as folders
from ia3.streaming import patch
from ia3.streaming.layout import read_checkpoint, read_shard
from ia3.streaming.plan import plan_merge

from .conftest import BY_NAME, Family, perturb


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def save_pair(
    where: Path, family: Family, dtype: torch.dtype = torch.float32, shard: str = "5GB", **config: Any
) -> tuple[Path, Path, ia3.PeftModel]:
    """Folders of a base and of an adapter on it, and the model with the adapter."""
    base = family.build().to(dtype)
    base.save_pretrained(where / "base", max_shard_size=shard)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type=family.task, **(family.targets | config)))
    perturb(model)
    with torch.no_grad():  # a head that was trained, too
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(where / "adapter")
    return where / "base", where / "adapter", model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def merge(base: Path, adapter: Path, out: Path, *options: str) -> int:
    return main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *options])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence by which a command refuses."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line]
    return line


def logits(model: nn.Module, family: Family) -> Tensor:
    with torch.inference_mode():
        return model(**family.inputs()).logits


# --- the merged model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_is_the_merged_model(
    family: Family, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "BLOCK_BYTES", 1000)  # several blocks a tensor
    base, adapter, _ = save_pair(tmp_path, family, dtype)
    out = tmp_path / "out"
    assert merge(base, adapter, out, "--verify") == 0
    kind = getattr(transformers, family.architecture)
    loaded, info = kind.from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    # Loaded as well: what is cast to bf16 as a whole has its rotary frequencies in bf16, too.
    merged = ia3.PeftModel.from_pretrained(kind.from_pretrained(base, dtype=dtype), str(adapter)).merge_and_unload()
    assert torch.equal(logits(loaded.eval(), family), logits(merged.eval(), family))
    expected = merged.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    before, after = contents(base), contents(out)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_shards_keep_their_layout_and_metadata(tmp_path: Path) -> None:
    base, adapter, model = save_pair(tmp_path, BY_NAME["llama"], shard="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    assert merge(base, adapter, tmp_path / "out", "--verify") == 0
    expected = model.merge_and_unload().state_dict()
    for path in base.glob("*.safetensors"):
        one, other = read_shard(path), read_shard(tmp_path / "out" / path.name)
        assert (one.size, one.header_checksum, one.tensors) == (other.size, other.header_checksum, other.tensors)
        with safe_open(tmp_path / "out" / path.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(8, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.deep = nn.Conv3d(4, 6, 2)
        self.fed = nn.Conv3d(6, 4, 2)


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Convolutions()
    base, names = tmp_path / "base", ["plain", "grouped", "deep", "fed"]
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({name: value.clone() for name, value in model.state_dict().items()}, base / "model.safetensors")
    for feedforward in (["grouped", "fed"], ["plain", "deep"], []):
        adapted = ia3.get_peft_model(_copy(model), ia3.IA3Config(target_modules=names, feedforward_modules=feedforward))
        perturb(adapted)
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        adapted.save_pretrained(tmp_path / "adapter")
        assert merge(base, tmp_path / "adapter", tmp_path / "out", "--verify") == 0
        expected = adapted.merge_and_unload().state_dict()
        found = tensors_of(tmp_path / "out")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def _copy(model: nn.Module) -> nn.Module:
    made = type(model)()
    made.load_state_dict(model.state_dict())
    return made


# --- names -------------------------------------------------------------------------------------------------------


def rewrite(base: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = base / "model.safetensors"
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("bert", "bert.")])
def test_a_checkpoint_of_the_base_model_without_its_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    base, adapter, model = save_pair(tmp_path, BY_NAME[name])
    rewrite(base, lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()})
    assert merge(base, adapter, tmp_path / "out", "--verify") == 0
    loaded = getattr(transformers, BY_NAME[name].architecture).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded.eval(), BY_NAME[name]), logits(model.merge_and_unload(), BY_NAME[name]))


def test_an_adapter_of_the_base_model_on_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    base, adapter, model = save_pair(tmp_path, BY_NAME["gpt2"])
    bare = adapter / "adapter_model.safetensors"
    save_file({key.replace(".transformer.", "."): value for key, value in load_file(bare).items()}, bare)
    assert merge(base, adapter, tmp_path / "out") == 0
    expected, found = model.merge_and_unload().state_dict(), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("target", ["lm_head", "stored"])
def test_tied_weights_are_refused(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vector on the output layer would scale the embedding too, whichever of the two names the checkpoint has."""
    family = BY_NAME["opt"]
    base, adapter, _ = save_pair(tmp_path, family, target_modules=["k_proj"], feedforward_modules=[])
    vectors = load_file(adapter / "adapter_model.safetensors")
    vectors["base_model.model.lm_head.ia3_l"] = torch.full((64, 1), 2.0)
    save_file(vectors, adapter / "adapter_model.safetensors")
    if target == "stored":
        rewrite(
            base,
            lambda tensors: {
                "lm_head.weight" if "embed_tokens" in key else key: value for key, value in tensors.items()
            },
        )
    said = refusal(capsys, "merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert "'lm_head'" in said
    assert "tied" in said
    assert not (tmp_path / "out").exists()


# --- orientation -------------------------------------------------------------------------------------------------


def _square_gpt2(where: Path, targets: list[str]) -> tuple[Path, Path, ia3.PeftModel]:
    return save_pair(where, BY_NAME["gpt2"], target_modules=targets, feedforward_modules=["mlp.c_proj"])


def test_square_matrices_are_stored_as_the_configuration_says(tmp_path: Path) -> None:
    base, adapter, model = _square_gpt2(tmp_path, ["attn.c_proj", "mlp.c_proj", "c_attn"])
    assert merge(base, adapter, tmp_path / "out") == 0
    expected, found = model.merge_and_unload().state_dict(), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_square_matrix_and_a_wrong_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = _square_gpt2(tmp_path, ["attn.c_proj", "mlp.c_proj", "c_attn"])
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=False)
    said = refusal(capsys, "merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert "'transformer.h.0.attn.c_proj.weight' is square" in said
    assert "fan_in_fan_out" in said


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what does not fit -------------------------------------------------------------------------------------------


def _wrong_shape(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.ia3_l"
    save_file(tensors | {name: torch.ones(15, 1)}, adapter / "adapter_model.safetensors")


def _no_place(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.7.self_attn.v_proj.ia3_l"
    save_file(tensors | {name: torch.ones(16, 1)}, adapter / "adapter_model.safetensors")


def _not_finite(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.ia3_l"
    save_file(tensors | {name: torch.full((16, 1), float("nan"))}, adapter / "adapter_model.safetensors")


def _head_without_place(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.score.weight": torch.ones(3, 32)}, adapter / "adapter_model.safetensors")


def _integers(base: Path, adapter: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(base, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})


def _float8(base: Path, adapter: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(
        base,
        lambda tensors: tensors | {f"{name}_scale_inv": torch.ones(1), name: tensors[name].to(torch.float8_e4m3fn)},
    )


def _truncated(base: Path, adapter: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _missing_shard(base: Path, adapter: Path) -> None:
    path = base / "model.safetensors"
    path.rename(base / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(load_file(base / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    places["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "wrong shape": (_wrong_shape, "'model.layers.1.self_attn.v_proj' has 15 values"),
    "no place": (_no_place, "'model.layers.7.self_attn.v_proj' finds no"),
    "not finite": (_not_finite, "not finite"),
    "head without a place": (_head_without_place, "'score.weight'"),
    "quantized": (
        lambda base, adapter: edit_json(base / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantized (gptq)",
    ),
    "integers": (_integers, "stored as I8"),
    "float8": (_float8, "it has weight_scale_inv"),
    "truncated": (_truncated, "inside the tensor"),
    "missing shard": (_missing_shard, "lacks model-00002-of-00002.safetensors"),
    "other method": (
        lambda base, adapter: edit_json(adapter / "adapter_config.json", peft_type="LORA"),
        "peft_type 'LORA'",
    ),
    "other side": (
        lambda base, adapter: edit_json(
            adapter / "adapter_config.json", feedforward_modules=["k_proj"], target_modules=["k_proj", "v_proj"]
        ),
        "save the adapter again",
    ),
    "no adapter": (lambda base, adapter: shutil.rmtree(adapter), "does not exist"),
    "no model": (lambda base, adapter: (base / "config.json").unlink(), "no config.json"),
    "no weights": (
        lambda base, adapter: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "its weights are in pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("how", ["--out", "--in-place"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_sentence(
    wrong: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    change, part = WRONG[wrong]
    change(base, adapter)
    before = contents(base)
    where = (how, tmp_path / "out") if how == "--out" else (how,)
    assert part in refusal(capsys, "merge", "--base", base, "--adapter", adapter, *where)
    assert contents(base) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter"}


def test_where_the_copy_may_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    command = ("merge", "--base", base, "--adapter", adapter)
    (tmp_path / "there").mkdir()
    assert "exists" in refusal(capsys, *command, "--out", tmp_path / "there")
    assert "inside the base" in refusal(capsys, *command, "--out", base / "merged")
    assert "give either --out" in refusal(capsys, *command)
    assert "give either --out" in refusal(capsys, *command, "--out", tmp_path / "out", "--in-place")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1,000 free" in refusal(capsys, *command, "--out", tmp_path / "out")
    assert "1,000 are free" in refusal(capsys, *command, "--in-place")


def test_weights_in_other_formats_are_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They hold the weights unmerged, and an adapter in a model's folder would be applied a second time."""
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    (base / "original").mkdir()
    (base / "original" / "consolidated.pth").write_bytes(b"weights")
    (base / "original" / "params.json").write_text("{}")
    (base / "model.fp16.safetensors").write_bytes(b"weights")
    shutil.copy(adapter / "adapter_config.json", base)
    assert merge(base, adapter, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "adapter_config.json, model.fp16.safetensors, original/consolidated.pth" in out
    assert set(contents(tmp_path / "out")) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "original/params.json",
    }


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    checkpoint, plan = folders.prepare(base, adapter, tmp_path / "out")

    def fail(count: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ia3.IA3Error, match="No space left on device"):
        folders.merge_folder(checkpoint, plan, tmp_path / "out", fail)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_verify_sees_a_changed_bit(tmp_path: Path) -> None:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    checkpoint, plan = folders.prepare(base, adapter, tmp_path / "out")
    folders.merge_folder(checkpoint, plan, tmp_path / "out")
    folders.verify_folder(checkpoint, plan, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    scaled = plan.blocks[0]
    for place, named in ((scaled.start + 5, scaled.tensor), (-1, "what stands at byte")):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(ia3.IA3Error, match=named):
            folders.verify_folder(checkpoint, plan, tmp_path / "out")
        data[place] ^= 1
        path.write_bytes(data)


def test_memory_stays_low(tmp_path: Path) -> None:
    """Peak memory above what the imports take, in a process of its own: less than the largest tensor."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    wide = 24 << 20  # elements of a matrix of 48 MiB
    save_file(
        {f"layers.{index}.w.weight": torch.ones(1024, wide // 1024, dtype=torch.bfloat16) for index in range(2)},
        base / "model.safetensors",
    )
    config = ia3.IA3Config(target_modules=["w"], feedforward_modules=[])
    (adapter / "adapter_config.json").write_text(config.to_json())
    vectors = {f"base_model.model.layers.{index}.w.ia3_l": torch.full((1024, 1), 1.5) for index in range(2)}
    save_file(vectors, adapter / "adapter_model.safetensors")
    script = f"""
import resource, sys, pathlib, torch
from ia3.streaming import folder, patch
folder.prepare(pathlib.Path({str(base)!r}), pathlib.Path({str(adapter)!r}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint, plan = folder.prepare(pathlib.Path({str(base)!r}), pathlib.Path({str(adapter)!r}))
folder.merge_folder(checkpoint, plan, pathlib.Path({str(tmp_path / "out")!r}))
copied = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
patch.merge_in_place(pathlib.Path({str(base)!r}), pathlib.Path({str(adapter)!r}))
patched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((copied - before) / 1024, (patched - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copied, patched = map(float, done.stdout.split())
    assert copied < 48
    assert patched < 2 * 48
    assert set(load_file(base / "model.safetensors")["layers.1.w.weight"].unique().tolist()) == {1.5}


# --- in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in ("gpt2", "opt", "t5", "bert")]
    + [("llama", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)],
    ids=str,
)
def test_in_place_is_the_copy_and_unmerging_restores_every_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = BY_NAME[name]
    base, adapter, _ = save_pair(tmp_path, family, dtype, shard="20KB")
    before = contents(base)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert main(["merge", "--base", str(base), "--adapter", str(adapter), "--in-place", "--verify"]) == 0
    after = contents(base)
    assert after.pop("ia3_merged.residual")
    assert after == contents(tmp_path / "out")
    assert main(["unmerge", str(base)]) == 0
    assert contents(base) == before


def test_what_is_kept_is_about_a_bit_a_weight(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator).to(torch.bfloat16)
    save_file({"layers.0.w.weight": weight}, base / "model.safetensors")
    config = ia3.IA3Config(target_modules=["w"], feedforward_modules=[])
    (adapter / "adapter_config.json").write_text(config.to_json())
    vector = 1 + 0.2 * torch.randn(512, 1, generator=generator)
    save_file({"base_model.model.layers.0.w.ia3_l": vector}, adapter / "adapter_model.safetensors")
    patch.merge_in_place(base, adapter)
    assert (base / "ia3_merged.residual").stat().st_size < weight.numel() / 8 * 1.02 + 8192
    patch.unmerge(base)
    assert torch.equal(load_file(base / "model.safetensors")["layers.0.w.weight"], weight)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"], torch.bfloat16)
    return base, adapter


def in_place(pair: tuple[Path, Path]) -> tuple[object, ...]:
    return ("merge", "--base", pair[0], "--adapter", pair[1], "--in-place")


def test_a_merged_folder_takes_no_second_adapter(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    patch.merge_in_place(base, adapter)
    before = contents(base)
    assert "unmerge" in refusal(capsys, *in_place(pair))
    said = refusal(capsys, "merge", "--base", base, "--adapter", adapter, "--out", base.parent / "out")
    assert "unmerge" in said
    assert contents(base) == before


def test_nothing_to_unmerge(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no adapter is merged" in refusal(capsys, "unmerge", pair[0])
    assert "no folder" in refusal(capsys, "unmerge", pair[0] / "config.json")


@pytest.mark.parametrize("how", ["scaled byte", "header", "another file"])
def test_files_that_changed_since_are_not_unmerged(
    how: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    plan = plan_merge(read_checkpoint(base), adapter)
    patch.merge_in_place(base, adapter)
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    if how == "scaled byte":
        data[plan.blocks[-1].start + 3] ^= 1
    elif how == "header":
        data = bytearray(data.replace(b'"pt"', b'"tp"', 1))
    else:
        data = data.replace(b"lm_head.weight", b"lm_hood.weight", 1)
    path.write_bytes(data)
    before = contents(base)
    said = refusal(capsys, "unmerge", base)
    assert "was changed since" in said if how == "scaled byte" else "is another file" in said
    assert contents(base) == before


def test_bytes_that_no_vector_scales_may_change_meanwhile(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    path = base / "model.safetensors"
    before = bytearray(path.read_bytes())
    start = read_shard(path).tensors["lm_head.weight"].start
    patch.merge_in_place(base, adapter)
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    before[start] ^= 1
    path.write_bytes(data)
    patch.unmerge(base)
    assert path.read_bytes() == bytes(before)


def test_a_damaged_residual_is_refused(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    patch.merge_in_place(base, adapter)
    path = base / "ia3_merged.residual"
    path.write_bytes(path.read_bytes()[:50])
    assert "is damaged" in refusal(capsys, "unmerge", base)


def test_files_that_are_not_the_folders_own(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A hub's cache links to blobs that other revisions share; a merge there would change them all."""
    base, _ = pair
    path = base / "model.safetensors"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    before = (tmp_path / "blob").read_bytes()
    assert "is a link" in refusal(capsys, *in_place(pair))
    assert merge(base, pair[1], tmp_path / "out", "--verify") == 0  # a copy follows links
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    path.unlink()
    os.link(tmp_path / "blob", path)
    assert "hard links" in refusal(capsys, *in_place(pair))
    path.unlink()
    shutil.copy(tmp_path / "blob", path)
    path.chmod(0o444)
    assert "is read-only" in refusal(capsys, *in_place(pair))
    assert path.read_bytes() == (tmp_path / "blob").read_bytes() == before


def test_an_adapter_in_the_models_own_folder(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = pair
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, base)
    assert "again" in refusal(capsys, "merge", "--base", base, "--adapter", base, "--in-place")
