"""Result files: written and read back whole, shown in tables, and made by the command."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import records, report
from ia3_kernels import target

ROOT = Path(__file__).resolve().parents[2]

FIELDS = "suite,case,dtype,impl,median_s,iqr_s,ratio_to,ratio,bytes,device,torch,commit"


def _recorder() -> records.Recorder:
    recorder = records.Recorder(torch.device("cpu"))
    times = {"ours": [1e-3, 2e-3, 3e-3], "peft": [2e-3, 4e-3, 2e-3], "frozen_base": [1e-3, 1e-3, 1e-3]}
    baselines = {"ours": ("frozen_base", "peft", "absent"), "peft": ("frozen_base",)}
    recorder.add_times("train_step", "tiny", "bf16", times, baselines)
    return recorder


def test_ratios_are_paired_and_absent_baselines_left_out() -> None:
    found = {(record.impl, record.ratio_to): record.ratio for record in _recorder().records}
    assert found == {
        ("ours", "frozen_base"): pytest.approx(2.0),
        ("ours", "peft"): pytest.approx(0.5),
        ("peft", "frozen_base"): pytest.approx(2.0),
        ("frozen_base", None): None,
    }


def test_a_result_file_is_a_flat_list_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    written = _recorder().records
    records.write(path, written)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [",".join(row) for row in rows] == [FIELDS] * 4
    assert records.read(path) == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("content", ["", "{}", '[{"suite": "decode"}]'])
def test_another_file_is_refused_with_a_sentence(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path)])
    assert stopped.value.code == 2
    assert "give a file that `python -m bench --json` wrote" in capsys.readouterr().err


def test_markdown_has_one_row_for_each_implementation() -> None:
    text = report.markdown(_recorder().records, Path("folder/result.json"))
    assert "python -m bench train_step --json result.json --dtype bf16\n" in text
    assert "| tiny | bf16 | ours | 2 ms | 1 ms | 2.000x frozen_base; 0.500x peft |" in text
    assert text.count("| tiny |") == 3


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "accuracy.json"
    assert command.main(["accuracy", "--quick", "--dtype", "bf16", "--json", str(path)]) == 0
    measured = records.read(path)
    assert {record.dtype for record in measured} == {"bf16", "fp16"}
    assert all(record.ratio is not None and record.median_s is None for record in measured)
    assert "gradient of scale" in capsys.readouterr().out


def test_a_folder_for_a_file_stops_the_command_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["decode", "--json", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is a folder; expected the name of a file" in capsys.readouterr().err


def test_results_of_gpus_are_of_these_kernels() -> None:
    """A warning, no failure: a change of the kernels comes before a GPU to measure it on."""
    kernels = getattr(target.native_library(), "cuda", None)
    if kernels is None or not kernels.is_loaded():
        pytest.skip("the CUDA kernels, which the hash is of as well, are not built here")
    for path in (ROOT / "bench" / "results").glob("*.environment.json"):
        measured = json.loads(path.read_text("utf-8"))["kernel sources"]
        if measured != records.kernel_sources():
            warnings.warn(f"{path.name} is of other kernel sources; run make gpu-check on that GPU again", stacklevel=1)
