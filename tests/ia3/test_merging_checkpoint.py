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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ia3
from ia3.cli.app import ENVIRONMENT, main
from ia3.merging import shards
from ia3.merging.checkpoint import merged_adapters

from .conftest import BY_NAME, Family, perturb


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def save_adapter(where: Path, base: nn.Module, **config: Any) -> ia3.IA3Model:
    """The model with an adapter, which is saved."""
    model = ia3.get_peft_model(base, ia3.IA3Config(**config))
    perturb(model)
    with torch.no_grad():  # a head that was trained, too
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(where)
    return model.eval()


def save_pair(
    where: Path, family: Family, dtype: torch.dtype = torch.float32, shard: str = "5GB", **config: Any
) -> tuple[Path, Path, ia3.IA3Model]:
    """Folders of a base and of an adapter on it, and the model with the adapter."""
    base = family.build().to(dtype)
    with torch.no_grad():  # biases are zeros at first
        for parameter in base.parameters():
            parameter.add_(0.01)
    base.save_pretrained(where / "base", max_shard_size=shard)
    model = save_adapter(where / "adapter", base, task_type=family.task, **(family.targets | config))
    return where / "base", where / "adapter", model


def save_plain(where: Path, model: nn.Module) -> Path:
    """The folder of a model that is none of transformers'."""
    where.mkdir()
    (where / "config.json").write_text('{"tie_word_embeddings": false}')
    save_file({name: value.clone() for name, value in model.state_dict().items()}, where / "model.safetensors")
    return where


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


def refusal(capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, out: Path) -> str:
    """The one sentence by which the command refuses."""
    capsys.readouterr()
    assert merge(base, adapter, out) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line]
    return line


def rewrite(base: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = next(base.glob("*.safetensors"))
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_merged(out: Path, model: ia3.IA3Model) -> None:
    """What was merged on disk is bit for bit what merging in memory gives."""
    merged = model.merge_and_unload()
    loaded, info = type(merged).from_pretrained(out, dtype=next(merged.parameters()).dtype, output_loading_info=True)
    assert not any(info.values()), info
    found = loaded.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(found[name], value), name


# --- the merged model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_is_the_merged_model(
    family: Family, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)  # several blocks a tensor
    base, adapter, model = save_pair(tmp_path, family, dtype)
    before = contents(base)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)
    after = contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors", "config.json"}
    assert contents(base) == before


def test_shards_keep_their_layout_and_metadata(tmp_path: Path) -> None:
    base, adapter, model = save_pair(tmp_path, BY_NAME["gpt2"], torch.bfloat16, shard="20KB")
    files = list(base.glob("*.safetensors"))
    assert len(files) > 2
    assert merge(base, adapter, tmp_path / "out") == 0
    for path in files:
        one, other = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        header = 8 + int.from_bytes(one[:8], "little")
        assert len(one) == len(other)
        assert one[:header] == other[:header]
        assert b'"format":"pt"' in other[:header]
    assert_merged(tmp_path / "out", model)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(8, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.deep = nn.Conv3d(4, 6, 2)
        self.fed = nn.Conv3d(6, 4, 2)


@pytest.mark.parametrize("feedforward", [["grouped", "fed"], ["plain", "deep"], []], ids=str)
def test_convolutions(feedforward: list[str], tmp_path: Path) -> None:
    base, names = save_plain(tmp_path / "base", _Convolutions()), ["plain", "grouped", "deep", "fed"]
    model = save_adapter(tmp_path / "adapter", _Convolutions(), target_modules=names, feedforward_modules=feedforward)
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    expected, found = model.merge_and_unload().state_dict(), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_stays_low(tmp_path: Path) -> None:
    """Peak memory beyond what the process holds after a tiny merge: a sixth of the largest tensor at most."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, width in ((base, 24 << 10), (tmp_path / "tiny", 2)):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        ones = torch.ones(1024, width, dtype=torch.bfloat16)  # of 48 MiB each
        save_file({f"layers.{i}.w.weight": ones.clone() for i in range(2)}, folder / "model.safetensors")
    config = ia3.IA3Config(target_modules=["w"], feedforward_modules=[])
    config.save_pretrained(adapter)
    vectors = {f"base_model.model.layers.{i}.w.ia3_l": torch.full((1024, 1), 1.5) for i in range(2)}
    save_file(vectors, adapter / "adapter_model.safetensors")
    script = f"""
import pathlib
from ia3.merging.checkpoint import plan_merge, write_merged
def held(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
where = pathlib.Path({str(tmp_path)!r})
for name in ("tiny", "base"):
    before = held("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    write_merged(plan_merge(where / name, where / "adapter", where / f"out-{{name}}"), where / f"out-{{name}}")
print((held("VmHWM") - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8
    assert set(load_file(tmp_path / "out-base" / "model.safetensors")["layers.1.w.weight"].unique().tolist()) == {1.5}


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("bert", "bert.")])
def test_a_checkpoint_of_the_base_model_without_its_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    base, adapter, model = save_pair(tmp_path, BY_NAME[name])
    rewrite(base, lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()})
    assert merge(base, adapter, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)


def test_an_adapter_of_the_base_model_on_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    base, adapter, model = save_pair(tmp_path, BY_NAME["gpt2"])
    bare = adapter / "adapter_model.safetensors"
    save_file({key.replace(".transformer.", "."): value for key, value in load_file(bare).items()}, bare)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)


_TEXT: dict[str, Any] = dict(BY_NAME["llama"].sizes, model_type="llama")
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llava() -> nn.Module:
    vision = dict(_VISION, model_type="clip_vision_model", image_size=8, patch_size=4, projection_dim=32)
    config = transformers.LlavaConfig(text_config=dict(_TEXT), vision_config=vision, image_token_index=3)
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    text = dict(_TEXT, model_type="qwen2_vl_text", rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


VISION = {"llava": (_llava, "language_model.model."), "qwen2_vl": (_qwen2_vl, "model.")}


@pytest.mark.parametrize("has_old_names", [False, True], ids=["module names", "stored names"])
@pytest.mark.parametrize("name", VISION)
def test_stored_names_that_are_not_the_models(name: str, has_old_names: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, stored = VISION[name]
    built, base, adapter = build(), tmp_path / "base", tmp_path / "adapter"
    built.save_pretrained(base)
    assert f"{stored}layers.0.mlp.down_proj.weight" in tensors_of(base)  # else there is nothing to find out
    names = ["k_proj", "v_proj", "down_proj"]
    model = save_adapter(
        adapter, type(built).from_pretrained(base), target_modules=names, feedforward_modules=["down_proj"]
    )
    vectors = load_file(adapter / "adapter_model.safetensors")
    assert any(".model.language_model.layers.0." in key for key in vectors)
    if has_old_names:  # of an adapter from an older transformers
        vectors = {key.replace(".model.language_model.", f".{stored}"): value for key, value in vectors.items()}
        save_file(vectors, adapter / "adapter_model.safetensors")
    assert merge(base, adapter, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)


def test_tensors_that_loading_makes_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture's experts are stored one by one, and are one parameter in the model; its attention merges."""
    config = transformers.MixtralConfig(**BY_NAME["llama"].sizes, num_local_experts=2, num_experts_per_tok=1)
    built = transformers.MixtralForCausalLM(config)
    built.save_pretrained(tmp_path / "base")
    model = save_adapter(tmp_path / "adapter", built, target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)
    expert = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.ia3_l"
    save_file({expert: torch.ones(48, 1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert "no vector for expert 1" in refusal(capsys, tmp_path / "base", tmp_path / "adapter", tmp_path / "out2")


@pytest.mark.parametrize("stored", ["model.decoder.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_refused(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vector on the output layer would scale the embedding too, whichever of the two names the checkpoint has."""
    base, adapter, _ = save_pair(tmp_path, BY_NAME["opt"], target_modules=["k_proj"], feedforward_modules=[])
    vectors = load_file(adapter / "adapter_model.safetensors")
    vectors["base_model.model.lm_head.ia3_l"] = torch.full((64, 1), 2.0)
    save_file(vectors, adapter / "adapter_model.safetensors")
    rewrite(base, lambda tensors: {stored if "embed_tokens" in key else key: tensors[key] for key in tensors})
    said = refusal(capsys, base, adapter, tmp_path / "out")
    assert "'lm_head.weight', which is tied to 'model.decoder.embed_tokens.weight'" in said


def test_embeddings_in_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved beside the vectors they take the base's place; trained on their own they would break the tie."""
    base, adapter, model = save_pair(tmp_path, BY_NAME["opt"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(adapter, save_embedding_layers=True)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)
    edit_json(adapter / "adapter_config.json", modules_to_save=["embed_tokens"])
    assert "tied to 'lm_head.weight'" in refusal(capsys, base, adapter, tmp_path / "out2")


def test_square_matrices_are_stored_as_the_models_layers_are(tmp_path: Path) -> None:
    """Also where the configuration says otherwise, which loading corrects."""
    names = ["attn.c_proj", "mlp.c_proj", "c_attn"]
    base, adapter, model = save_pair(
        tmp_path, BY_NAME["gpt2"], target_modules=names, feedforward_modules=["mlp.c_proj"]
    )
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=False)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", model)


# --- what does not fit -------------------------------------------------------------------------------------------

V_PROJ = "base_model.model.model.layers.1.self_attn.v_proj.ia3_l"
K_WEIGHT = "model.layers.0.self_attn.k_proj.weight"


def _with(name: str, tensor: Tensor) -> Callable[[Path, Path], None]:
    return lambda base, adapter: rewrite(adapter, lambda tensors: tensors | {name: tensor})


def _cast(dtype: torch.dtype) -> Callable[[Path, Path], None]:
    return lambda base, adapter: rewrite(base, lambda tensors: tensors | {K_WEIGHT: tensors[K_WEIGHT].to(dtype)})


def _damaged(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    path = "model.safetensors"
    return lambda base, adapter: (base / path).write_bytes(change((base / path).read_bytes()))


def _indexed(name: str) -> Callable[[Path, Path], None]:
    """The one file under another name, and an index that puts a tensor into the file ``name``."""

    def change(base: Path, adapter: Path) -> None:
        (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
        places = dict.fromkeys(tensors_of(base), "model-00001-of-00002.safetensors") | {"lm_head.weight": name}
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return change


def _added(name: str, tensor: Tensor) -> Callable[[Path, Path], None]:
    """A tensor that the model does not have, in both."""

    def change(base: Path, adapter: Path) -> None:
        rewrite(base, lambda tensors: tensors | {f"{name}.weight": tensor})
        rewrite(adapter, lambda tensors: tensors | {f"base_model.model.{name}.ia3_l": tensor[:, :1].clone()})

    return change


def _moved(folder: int, file: str, change: Callable[[Path], object]) -> Callable[..., object]:
    """A change of one file of the base (0) or the adapter (1)."""
    return lambda *pair: change(pair[folder] / file)


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "wrong length": (_with(V_PROJ, torch.ones(15, 1)), "'model.layers.1.self_attn.v_proj' has shape [15, 1], but"),
    "wrong side": (_with(V_PROJ, torch.ones(1, 16)), "says that its outputs are scaled"),
    "no place": (_with(V_PROJ.replace("1", "7"), torch.ones(16, 1)), "'model.layers.7.self_attn.v_proj' finds no"),
    "not in the model": (_added("visual.proj", torch.ones(4, 4)), "finds no 'visual.proj.weight'"),
    "not finite": (_with(V_PROJ, torch.full((16, 1), float("nan"))), "not finite"),
    "not finite in fp32": (_with(V_PROJ, torch.full((16, 1), 1e300, dtype=torch.float64)), "not finite"),
    "whole numbers": (_with(V_PROJ, torch.ones(16, 1, dtype=torch.int8)), "torch.int8"),
    "not an adapter's": (_with("lm_head.weight", torch.ones(64, 32)), "'lm_head.weight' as torch.float32"),
    "no vectors": (lambda base, adapter: rewrite(adapter, lambda _: {"x": torch.ones(1)}), "holds no IA3 vectors"),
    "head without a place": (_with("base_model.model.score.weight", torch.ones(3, 32)), "'score.weight'"),
    "head of another size": (_with("base_model.model.lm_head.weight", torch.ones(3, 32)), "shape [3, 32]"),
    "packed": (
        lambda base, adapter: rewrite(base, lambda tensors: {n.replace("j.w", "j.qw"): tensors[n] for n in tensors}),
        "fused, quantized or named otherwise",
    ),
    "integers": (_cast(torch.int8), "stored as I8"),
    "float8": (_cast(torch.float8_e4m3fn), "stored as F8_E4M3"),
    "twice": (
        lambda base, adapter: rewrite(base, lambda tensors: tensors | {K_WEIGHT[6:]: tensors[K_WEIGHT].clone()}),
        f"holds '{K_WEIGHT}' twice",
    ),
    "cut short": (_damaged(lambda data: data[:-100]), "model.safetensors is damaged or cut short"),
    "too long": (_damaged(lambda data: data + b"more"), "model.safetensors is damaged or cut short"),
    "damaged header": (_damaged(lambda data: data[:8] + b"?" + data[9:]), "model.safetensors is damaged or cut short"),
    "header of 2**60 bytes": (_damaged(lambda data: (1 << 60).to_bytes(8, "little") + data[8:]), "is damaged"),
    "missing shard": (_indexed("model-00002-of-00002.safetensors"), "lacks model-00002-of-00002.safetensors"),
    "forged shard": (_indexed("../secret.safetensors"), "names the file '../secret.safetensors'"),
    "forged shard, absolute": (_indexed("/secret.safetensors"), "names the file '/secret.safetensors'"),
    "deep configuration": (_moved(0, "config.json", lambda path: path.write_text("[" * 100_000)), "be read as JSON"),
    "impossible configuration": (
        _moved(0, "config.json", lambda path: edit_json(path, num_attention_heads="many")),
        "describes no LlamaForCausalLM",
    ),
    "a pipe": (_moved(0, "vocab.txt", os.mkfifo), "is neither a file nor a folder"),
    "a broken link": (_moved(0, "vocab.txt", lambda path: path.symlink_to("nowhere")), "is neither a file nor a"),
    "a circle": (_moved(0, "more", lambda path: path.symlink_to(path.parent)), "is neither a file nor a folder"),
    "other method": (
        _moved(1, "adapter_config.json", lambda path: edit_json(path, peft_type="LORA")),
        "peft_type 'LORA'",
    ),
    "no adapter": (_moved(1, "", shutil.rmtree), "is no folder"),
    "no model": (_moved(0, "config.json", Path.unlink), "no config.json"),
    "no weights": (
        _moved(0, "model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin"))),
        "its weights are in pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_sentence(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    change, part = WRONG[wrong]
    change(base, adapter)
    before = contents(base)
    assert part in refusal(capsys, base, adapter, tmp_path / "out")
    assert contents(base) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter"}


# --- what a merged checkpoint says of itself ---------------------------------------------------------------------


def test_a_merged_checkpoint_says_which_adapter_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    assert merged_adapters(base) == merged_adapters(tmp_path / "nowhere") == {}
    assert merge(base, adapter, tmp_path / "once") == 0
    assert list(merged_adapters(tmp_path / "once").values()) == ["adapter"]
    shutil.copytree(adapter, tmp_path / "again")  # known by its tensors, not by its name
    assert "Warning" not in capsys.readouterr().err
    assert merge(tmp_path / "once", tmp_path / "again", tmp_path / "twice") == 0
    assert "was merged into" in capsys.readouterr().err
    rewrite(adapter, lambda tensors: {name: 2 * value for name, value in tensors.items()})
    assert merge(tmp_path / "once", adapter, tmp_path / "both") == 0
    assert "was merged into" not in capsys.readouterr().err
    assert list(merged_adapters(tmp_path / "both").values()) == ["adapter", "adapter"]
    # What loads it and saves it again keeps the note.
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "both").save_pretrained(tmp_path / "saved")
    assert merged_adapters(tmp_path / "saved") == merged_adapters(tmp_path / "both")
