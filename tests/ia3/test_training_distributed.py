"""Two processes against one: DDP, FSDP2 and ``accelerate launch``. Starting processes takes most of the half minute."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ia3

from .scripts import distributed_cases as cases
from .scripts import train_with_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]
KINDS = ("ours", "accelerated")
ROOT = Path(__file__).parents[2]


def start(*command: str) -> None:
    """Run a launcher's module in a process of its own."""
    # One thread each: the machine's cores are shared by two processes, and the launcher of torch would say so.
    environment = dict(os.environ, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cases put their files: they run once, all of them."""
    path = tmp_path_factory.mktemp("distributed")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    start(*launch, "-m", "tests.ia3.scripts.distributed_cases", str(path))
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    loaded: dict[tuple[str, str], dict[str, Any]] = torch.load(folder / "results.pt", weights_only=True)
    return loaded


class Run:
    """Losses and trained vectors of one process on the whole batches."""

    def __init__(self, model: nn.Module) -> None:
        self.losses = cases.train(model, cases.optimizer_of(model), range(cases.STEPS))
        self.vectors = cases.vectors(model)


@pytest.fixture(scope="module")
def alone() -> dict[Any, Run]:
    """By kind and dtype; ``"oracle"`` is PEFT in fp64."""
    runs: dict[Any, Run] = {"oracle": Run(cases.make("peft", torch.float64).double())}
    for kind in (*KINDS, "peft"):
        runs[kind] = Run(cases.make(kind))
    return runs


def _losses(run: dict[str, Any]) -> Tensor:
    return torch.tensor(run["losses"], dtype=torch.float64)


def _vectors(run: dict[str, Any]) -> Tensor:
    return torch.cat([run["vectors"][name].double().flatten() for name in sorted(run["vectors"])])


def assert_within_rounding(result: Any, floor: dict[str, Any] | Run, oracle: Run, dtype: torch.dtype) -> None:
    """``result`` is at most twice as far from fp64 as ``floor``: two processes only add in another order.

    The floors are what one rounding does to a vector, and to a mean of as many losses as a batch has tokens.
    """
    eps = torch.finfo(dtype).eps
    tokens = cases.batch(0).numel()
    reference = floor if isinstance(floor, dict) else vars(floor)
    for pick, length in ((_losses, tokens), (_vectors, 1)):
        true = pick(vars(oracle))
        error, allowed = ((pick(run) - true).norm() for run in (result, reference))
        assert error <= 2 * allowed + eps * length**0.5 * true.norm()


@pytest.mark.parametrize("case", ["data_parallel", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(
    results: dict[tuple[str, str], dict[str, Any]], alone: dict[Any, Run], kind: str, case: str
) -> None:
    result = results[case, kind]
    assert_within_rounding(result, alone[kind], alone["oracle"], torch.float32)
    assert result["losses"][-1] < result["losses"][0]
    # Two layers, three steps; of each layer keys and values, and the block as one.
    assert result["counts"] == {"gated_mlp": 6, "scaled_linear": 12}
    assert result.get("is_sharded", True)


@pytest.mark.parametrize("case", ["sharded_mixed_dtypes", "sharded_mixed_precision"])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_are_as_exact_as_with_peft(
    results: dict[tuple[str, str], dict[str, Any]], alone: dict[Any, Run], kind: str, case: str
) -> None:
    """A bf16 base with fp32 vectors needs nothing special: FSDP2 wants one dtype among trained parameters only.

    Its own mixed precision casts the vectors to bf16 as well, in PEFT's models too.
    """
    result = results[case, kind]
    assert_within_rounding(result, results[case, "peft"], alone["oracle"], torch.bfloat16)
    assert result["counts"]["gated_mlp"] == 6
    assert {vector.dtype for vector in result["vectors"].values()} == {torch.float32}
    assert results["sharded_mixed_dtypes", kind]["dtypes"] == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_of_a_sharded_model_tells_what_runs(
    results: dict[tuple[str, str], dict[str, Any]], kind: str
) -> None:
    sharded, whole = results["sharded", kind]["report"], results["data_parallel", kind]["report"]
    assert "fused into LlamaMLP" in sharded
    assert sharded.count("sharded, whole while its block runs; ") == 2
    assert sharded.replace("sharded, whole while its block runs; ", "").split() == whole.split()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_resumes_to_the_same_bits(results: dict[tuple[str, str], dict[str, Any]], kind: str) -> None:
    result = results["sharded_and_resumed", kind]
    assert result["saved_names"] == sorted(cases.vectors(cases.make(kind)))
    (losses, whole), (resumed_losses, resumed) = result["whole"], result["resumed"]
    assert losses == resumed_losses
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(vector, resumed[name]) for name, vector in whole.items())
    # Each case trains the same steps, so the last of them is that of the run that was never interrupted.
    assert losses == results["sharded", kind]["losses"][-1:]


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_saves_every_vector_of_a_sharded_model(
    results: dict[tuple[str, str], dict[str, Any]], kind: str
) -> None:
    """It asks PEFT's functions for the adapter, which must know the model."""
    result = results["saved_by_accelerate", kind]
    trained = {f"model.{name.replace('.default', '')}" for name in result["whole"]}
    assert set(result["written"]) == trained == set(results["saved_by_accelerate", "peft"]["written"])
    fresh = cases.vectors(cases.make(kind))
    assert not any(torch.equal(vector, fresh[name]) for name, vector in result["whole"].items())
    assert all(torch.equal(result["resumed"][name], vector) for name, vector in result["whole"].items())


def test_a_sharded_model_saves_one_whole_adapter(
    folder: Path, results: dict[tuple[str, str], dict[str, Any]], alone: dict[Any, Run]
) -> None:
    for name in ("ours-shards", "ours-state", "accelerated-state"):
        saved = load_file(folder / name / "adapter_model.safetensors")
        vectors = {key.replace("ia3_l", "ia3_l.default"): vector for key, vector in saved.items()}
        kind = name.partition("-")[0]
        trained = results["sharded", kind]["vectors"]
        assert vectors.keys() == trained.keys()
        assert all(torch.equal(vector, trained[key]) for key, vector in vectors.items())
        model = ia3.PeftModel.from_pretrained(cases.make("ours").unload(), folder / name, is_trainable=True)
        loaded = {"losses": alone[kind].losses, "vectors": cases.vectors(model)}
        assert_within_rounding(loaded, alone[kind], alone["oracle"], torch.float32)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_launch(kind: str, tmp_path: Path) -> None:
    """A script around Trainer, started plainly and by ``accelerate launch`` on two processes."""
    launch = f"--multi_gpu --num_processes 2 --num_machines 1 --main_process_port {_free_port()}"
    defaults = " --mixed_precision no --dynamo_backend no"
    script = ("-m", "tests.ia3.scripts.train_with_trainer", kind, str(tmp_path / "launched"))
    start("accelerate.commands.launch", *(launch + defaults).split(), *script)
    train_with_trainer.main(kind, tmp_path / "alone")
    train_with_trainer.main("peft", tmp_path / "oracle", dtype=torch.float64)

    names = {path.name for path in (tmp_path / "launched" / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names  # two processes took part
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    launched, single, true = (
        _vectors({"vectors": load_file(tmp_path / name / "checkpoint-3" / "adapter_model.safetensors")})
        for name in ("launched", "alone", "oracle")
    )
    assert (true - 1).norm() > 0.1
    eps = torch.finfo(torch.float32).eps
    assert (launched - true).norm() <= 2 * (single - true).norm() + eps * true.norm()
