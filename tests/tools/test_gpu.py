"""What runs before and on a GPU that is rented by the minute, as far as it can be tried without one."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.records import Recorder
from tools import gpu_bundle, gpu_check, probe_cublaslt

ROOT = Path(__file__).resolve().parents[2]
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# --- the bundle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), [("sm_90a", 90), ("90", 90), ("sm_120", 120), ("80", 80)])
def test_an_architecture_by_any_of_its_names(name: str, number: int) -> None:
    assert gpu_bundle.capability(name) == number


@pytest.mark.parametrize("name", ["hopper", "sm_75", "9.0", "sm_90b", ""])
def test_what_is_no_architecture_is_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="expected one such as sm_90a"):
        gpu_bundle.capability(name)


def test_a_bundle_without_nvcc_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu_bundle.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gpu_bundle"])
    assert gpu_bundle.main() == 2
    assert "nvcc was not found" in capsys.readouterr().out


def test_a_bundle_is_the_library_and_what_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def build(architecture: int, folder: Path) -> list[str]:
        folder.mkdir()
        (folder / "libia3_cuda.so").write_bytes(bytes(1_500_000))
        (folder / "cuda_sources.txt").write_text("0123456789abcdef")
        return ["the Hopper matmul is left out: CUTLASS was not found"]

    monkeypatch.setattr(gpu_bundle, "build", build)
    monkeypatch.setattr(gpu_bundle.shutil, "which", lambda tool: tool)
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "of an earlier run").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_bundle", "--output", str(folder), "--build", str(tmp_path / "objects")])
    assert gpu_bundle.main() == 0
    assert {path.name for path in folder.iterdir()} == {"libia3_cuda.so", "cuda_sources.txt", "architecture.txt"}
    assert (folder / "architecture.txt").read_text() == "90\n"
    out = capsys.readouterr().out
    assert "gpu-bundle: the Hopper matmul is left out: CUTLASS was not found\n" in out
    assert "libia3_cuda.so for sm_90a: 1.5 MB, " in out


# --- the probe ----------------------------------------------------------------------------------------------------


def test_structures_are_as_large_as_the_librarys() -> None:
    assert ctypes.sizeof(probe_cublaslt.Algorithm) == 64
    assert ctypes.sizeof(probe_cublaslt.HeuristicResult) == 96
    assert probe_cublaslt.HeuristicResult.workspace.offset == 64
    assert probe_cublaslt.HeuristicResult.state.offset == 72


def test_numbers_are_those_of_the_header() -> None:
    packages = Path(torch.__file__).parents[1] / "nvidia"
    headers = [*packages.glob("*/include/cublasLt.h"), *Path("/usr/local").glob("cuda*/include/cublasLt.h")]
    if not headers:
        pytest.skip("cublasLt.h is not here")
    header = headers[0].read_text("utf-8", errors="replace")
    expected = {f"CUBLASLT_POINTER_MODE_{name}": mode for name, mode in probe_cublaslt.MODES.items()}
    expected["CUBLASLT_MATMUL_DESC_POINTER_MODE"] = probe_cublaslt.DESC_POINTER_MODE
    expected["CUBLASLT_MATMUL_DESC_TRANSA"] = probe_cublaslt.DESC_TRANSA
    expected["CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES"] = probe_cublaslt.PREF_MAX_WORKSPACE_BYTES
    expected["CUBLASLT_ALGO_CAP_POINTER_MODE_MASK"] = probe_cublaslt.CAP_POINTER_MODE_MASK
    for name, number in expected.items():
        assert int(re.findall(rf"\b{name} = (\d+)", header)[0]) == number, name


def test_a_library_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(
        probe_cublaslt.Unavailable, match=r"libcublasLt could not be loaded .*; run this with the torch"
    ):
        probe_cublaslt.load(["/no/such/libcublasLt.so"])


@without_a_gpu
def test_a_probe_without_a_gpu_is_a_sentence(capsys: pytest.CaptureFixture) -> None:
    assert probe_cublaslt.main([]) == 2
    assert capsys.readouterr().out.startswith("probe_cublaslt: torch finds no NVIDIA GPU here")


def test_a_mode_that_gives_wrong_numbers_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    right = probe_cublaslt.StandIn.candidates

    def candidates(self: probe_cublaslt.StandIn, mode: int, *sizes: int) -> list[Callable[..., Tensor]]:
        if mode != probe_cublaslt.MODES["DEVICE_VECTOR"]:
            return right(self, mode, *sizes)
        # By columns instead of by rows: right where the vector is one number
        return [lambda x, weight, scale, y: y.copy_((x.float() @ weight.float().t()) * scale.mean())]

    monkeypatch.setattr(probe_cublaslt.StandIn, "candidates", candidates)
    assert probe_cublaslt.main(["--dry-run", "--json", str(tmp_path / "probe.json")]) == 0
    lines = capsys.readouterr().out
    assert re.search(r"DEVICE_VECTOR: WRONG NUMBERS", lines)
    assert re.search(r"ALPHA_DEVICE_VECTOR_BETA_ZERO: \d+\.\d{3}; ", lines)
    assert {row["impl"] for row in json.loads((tmp_path / "probe.json").read_text())} == {
        "linear",
        "plain",
        "ALPHA_DEVICE_VECTOR_BETA_ZERO",
    }


# --- the check ----------------------------------------------------------------------------------------------------


@without_a_gpu
def test_a_check_without_a_gpu_is_a_sentence() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "gpu_check.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check: torch finds no GPU here")


def test_a_command_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    run = gpu_check.Run(tmp_path, is_dry=True)
    child = "import time; print('begun', flush=True); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    problem, lines = run.command([sys.executable, "-c", program], 3)
    assert problem == "stopped after 3 s"
    assert lines == ["begun"]
    assert run.command([sys.executable, "-c", "raise SystemExit(3)"], 60) == ("exit status 3", [])
    assert "begun" in (tmp_path / "log.txt").read_text()


def test_a_part_that_fails_is_in_the_summary_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parts = {"probe": lambda run, seconds: ("exit status 1", ["told"]), "host": lambda run, seconds: ("", ["measured"])}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main(["--dry-run", "--part", "probe", "host", "--output", str(tmp_path)]) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert re.search(r"== probe: FAILED, exit status 1, 0 s\ntold\n\n== host: done, 0 s\nmeasured\n", summary)
    assert summary.endswith("failed: probe\n")
    assert capsys.readouterr().out.endswith(summary)
    assert len(list(tmp_path.iterdir())) <= 8


def test_tables_say_what_the_project_is_held_to() -> None:
    recorder = Recorder(torch.device("cpu"))
    case = "llama, batch 4x512, default"
    recorder.add_times("protocol", case, "bf16", {"ours": [0.5], "frozen_base": [1.0]}, {"ours": ("frozen_base",)})
    ratios = {"frozen_base": 1.5, "launches": 3164.0}
    recorder.add("protocol", f"{case}, kernels", "bf16", "ours", times=[0.25], ratios=ratios)
    recorder.add("protocol", f"{case}, peak memory beside the weights", "bf16", "ours", nbytes=8_300_000_000)
    rows = [re.split(r"\s{2,}", line) for line in gpu_check.protocol_table(recorder.records)]
    assert rows[1] == [f"{case}: ours", "500.00", "0.500", "250.00", "3164", "8.3"]
    for impl, ratio in (("ours", 1.0), ("ours", 4.0), ("triton", 2.0)):
        recorder.add("operators", f"scaled_linear output side, {ratio}", "bf16", impl, ratios={"linear": ratio})
    recorder.add("operators", "scale_weight_ dim 0", "bf16", "ours", ratios={"copy bandwidth": 0.925})
    table = "\n".join(gpu_check.operators_table(recorder.records))
    assert re.search(r"scale_weight_ dim 0: ours +92\.5% of copy", table)
    assert re.search(r"/ F\.linear: ours +2\.000; 4\.000 \(scaled_linear output side, 4\.0\)", table)
