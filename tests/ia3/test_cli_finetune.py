"""`ia3 finetune`: what it writes, how it goes on, and that nothing it learned is lost."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.integrations import integration_utils

from ia3 import AutoPeftModelForCausalLM
from ia3.cli import plot, training
from ia3.cli.app import main
from ia3.cli.checkpoints import pick_dtype

from .commands import QUICK, TEXT, finetune, process, sentence

pytestmark = pytest.mark.usefixtures("command_environment")


def losses(metrics: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in metrics["log"] if name in entry]


def test_finetune_writes_adapter_curve_and_metrics(tiny_model: Path, trained: Path) -> None:
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json"}
    assert {path.name for path in trained.iterdir()} == {*files, "checkpoint-10", "checkpoint-12"}
    assert {path.name for path in trained.parent.iterdir()} == {"out", "text.txt"}
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert len(losses(metrics, "loss")) == 12
    held_out = losses(metrics, "eval_loss")
    steps = [entry["step"] for entry in metrics["log"] if "eval_loss" in entry]
    assert steps == [0, 3, 6, 9, 12]
    assert held_out[-1] < held_out[0]
    assert losses(metrics, "eval_perplexity")[0] == pytest.approx(math.exp(held_out[0]))
    assert metrics["train_tokens"] + metrics["held_out_tokens"] == 32 * (len(TEXT) // 32)


def test_the_adapter_names_its_base_by_where_it_lies(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that from anywhere both packages find it, and compute the same."""
    monkeypatch.chdir(tiny_model)
    assert finetune(Path("."), text, tmp_path / "out", "--lr", 0.1) == 0
    monkeypatch.chdir(tmp_path)
    tokens = torch.tensor([[5, 6, 7, 8]])
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained("out")
    ours = AutoPeftModelForCausalLM.from_pretrained("out")
    plain = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.inference_mode():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected)
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-2)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"base_model: {tiny_model}" in card
    assert "AutoPeftModelForCausalLM.from_pretrained" in card


def test_the_same_seed_gives_the_same_adapter(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command = ["finetune", tiny_model, text, "-o", tmp_path / name, *QUICK, "--seed", seed]
        assert main([*map(str, command)]) == 0
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_names_are_no_markup(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither rich's nor matplotlib's, which would fail on these."""
    data = tmp_path / "[a]$\\frac$[/b].txt"
    data.parent.mkdir()
    data.write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", str(tiny_model), str(data), "-o", "[red]", *QUICK]) == 0
    assert "[red]" in capsys.readouterr().out
    assert (tmp_path / "[red]" / "loss.png").is_file()


def test_pairs_and_adapter_options_reach_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(20)]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["finetune", tiny_model, data, "-o", tmp_path / "out", *QUICK, "--held-out", "0"]
    targets = ["--target-modules", "re:.*layers\\.0\\..*(q|down)_proj", "--feedforward-modules", "re:.*down_proj"]
    assert main([*map(str, command), *targets, "--random-init"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ".*layers\\.0\\..*(q|down)_proj"
    assert config["init_ia3_weights"] is False
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["trainable_parameters"] == 32 + 64
    assert losses(metrics, "eval_loss") == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target-modules", "no_such_proj"], "no_such_proj"),
        (["--target-modules", "k_proj", "--feedforward-modules", "down_proj"], "down_proj"),
        (["--target-modules", "re:(", "--feedforward-modules", "re:("], "("),
        (["--block-size", "100000"], "too few for one sequence"),
        (["--block-size", "200"], "the model takes at most 128"),
        (["--lr", "3e38"], "--learning-rate"),
        (["--weight-dekay", "1"], "there is no option --weight-dekay"),
        (["--lr-scheduler-type", "steep"], "invalid choice: 'steep'"),
        (["--warmup-steps", "-1"], "Trainer refuses its options"),
        (["--report-to", "nobody"], "nobody is not supported"),
        (["--resume"], "no checkpoint in"),
    ],
)
def test_finetune_says_what_does_not_fit_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    assert said in sentence(capsys, ["finetune", tiny_model, text, "-o", tmp_path / "out", *QUICK, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_output_that_exists_is_kept(capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path) -> None:
    assert "is not empty" in sentence(capsys, ["finetune", tiny_model, text, "-o", text.parent])
    assert "is a file" in sentence(capsys, ["finetune", tiny_model, text, "-o", text])
    assert "is a file" in sentence(capsys, ["finetune", tiny_model, text, "-o", text / "out"])


def test_finetune_names_all_that_is_missing_at_once(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["finetune", tiny_model, tmp_path / "rows.parquet", "-o", tmp_path / "out", "--load-in-4bit"]
    assert "does not exist" in sentence(capsys, command)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert "`pip install accelerate matplotlib datasets bitsandbytes`" in sentence(capsys, command)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_end_leaves_the_checkpoints(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """The signal comes at the worst moment: while the output is being written."""

    def interrupt(_: object) -> str:
        signal.raise_signal(number)
        return ""

    monkeypatch.setattr("ia3.cli.finetune._usage", interrupt)
    command = [*map(str, ["finetune", tiny_model, text, "-o", tmp_path / "out", *QUICK])]
    assert main(command) == code
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_goes_on(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """To what it would have learned in one go, bit for bit."""
    options = ("--steps", 6, "--lr", 0.1)
    assert finetune(tiny_model, text, tmp_path / "whole", *options) == 0
    begin = training.Watch.on_step_begin

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            signal.raise_signal(number)
        begin(self, args, state, control)

    monkeypatch.setattr(training.Watch, "on_step_begin", interrupt)
    before = signal.getsignal(number)
    assert finetune(tiny_model, text, tmp_path / "out", *options) == 128 + number
    assert signal.getsignal(number) == before
    assert "step 4 is kept; the same command with --resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    assert "add --resume" in sentence(capsys, ["finetune", tiny_model, text, "-o", tmp_path / "out"])
    assert finetune(tiny_model, text, tmp_path / "out", *options, "--resume") == 0
    whole, resumed = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "out")]
    assert losses(metrics[0], "loss") == losses(metrics[1], "loss")


def test_a_second_signal_ends_the_step(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Watch, "on_step_begin", interrupt)
    assert finetune(tiny_model, text, tmp_path / "out") == 130
    assert "nothing of this step was kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_full_disk_at_the_end_costs_the_end_alone(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ia3.cli.finetune.atomic_folder", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    command = ["finetune", tiny_model, text, "-o", tmp_path / "out", *QUICK]
    sentence(capsys, command, code=1)
    monkeypatch.undo()
    monkeypatch.setattr(training.Watch, "on_step_begin", full)  # no step is left to do
    for name, state in (("checkpoint-7", '{"global_step": '), ("checkpoint-8", None)):  # cut short
        (tmp_path / "out" / name).mkdir()
        if state is not None:
            (tmp_path / "out" / name / "trainer_state.json").write_text(state)
    assert main([*map(str, command), "--resume"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_is_not_finite_is_no_checkpoint(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before stays, and training goes on from it."""
    begin = training.Watch.on_step_begin

    def poison(self: Any, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        begin(self, args, state, control)
        if state.global_step == 2:
            with torch.no_grad():
                next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(math.inf)

    monkeypatch.setattr(training.Watch, "on_step_begin", poison)
    said = sentence(capsys, ["finetune", tiny_model, text, "-o", tmp_path / "out", *QUICK])
    assert "at step 3; try a smaller --learning-rate" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    monkeypatch.undo()
    assert finetune(tiny_model, text, tmp_path / "out", "--resume") == 0


def test_options_of_the_trainer_reach_it(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Board(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            seen.setdefault("args", args)
            seen.setdefault("logs", []).append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "board", Board)
    options = ("--warmup-steps", 2, "--weight-decay", 0.25, "--max-grad-norm", 0.5, "--gradient-accumulation-steps", 3)
    assert finetune(tiny_model, text, tmp_path / "out", *options, "--report-to", "board", "--lr", 0.1) == 0
    args = seen["args"]
    assert (args.weight_decay, args.max_grad_norm, args.gradient_accumulation_steps) == (0.25, 0.5, 3)
    assert any("eval_perplexity" in logs for logs in seen["logs"])
    rates = [logs["learning_rate"] for logs in seen["logs"] if "loss" in logs]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1])


def test_the_held_out_loss_is_a_mean_over_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Of batches of unlike lengths too: what each of them weighs is its tokens."""
    rows = [{"prompt": "a", "completion": "b" * (1 if number % 2 else 30)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for batch in (1, 6):
        options = ("--held-out", 0.5, "--batch-size", batch, "--steps", 1)
        assert finetune(tiny_model, tmp_path / "rows.jsonl", tmp_path / str(batch), *options) == 0
        metrics = json.loads((tmp_path / str(batch) / "metrics.json").read_text())
        found.append(losses(metrics, "eval_loss")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_four_bits(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=128, intermediate_size=256, head_dim=32)
    shutil.copytree(tiny_model, tmp_path / "model")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    assert finetune(tmp_path / "model", text, tmp_path / "out", "--load-in-4bit", "--lr", 0.1) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert losses(metrics, "eval_loss")[-1] < losses(metrics, "eval_loss")[0]
    assert metrics["parameters"] > metrics["trainable_parameters"]


def test_a_pipe_gets_a_line_a_step_and_what_to_try_next(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    done = process("finetune", tiny_model, text, "-o", tmp_path / "an adapter", *QUICK)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("step 1/4, loss ")
    assert last.startswith("step 4/4, loss ")
    assert " s a step, 0:00:0" in last
    assert f"Try it: ia3 generate {tiny_model} --adapter '{tmp_path}/an adapter'" in done.stdout


def test_the_dtype_of_choice_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ia3_kernels

    def slow(x: torch.Tensor, *_: Any) -> torch.Tensor:
        time.sleep(0.4 if x.dtype == slow_dtype else 0)  # more than the rest takes on a busy machine
        return x * 1.0

    monkeypatch.setattr(ia3_kernels, "scaled_linear", slow)
    slow_dtype = torch.bfloat16
    assert pick_dtype("auto", "cpu") == torch.float32
    slow_dtype = torch.float32
    assert pick_dtype("auto", "cpu") == torch.bfloat16
    assert pick_dtype("float16", "cpu") == torch.float16


def test_a_checkpoint_that_was_merged_warns(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    """In `ia3 generate`, and where training goes on from it."""
    merged = tmp_path / "merged"
    assert main(["merge", "--base", str(tiny_model), "--adapter", str(trained), "--out", str(merged)]) == 0
    capsys.readouterr()
    for model, count in ((tiny_model, 0), (merged, 1)):
        assert main(["generate", str(model), "--prompt", "a", "--max-new-tokens", "1", "--adapter", str(trained)]) == 0
        assert capsys.readouterr().err.count("in this model's weights already") == count
    shutil.copytree(trained, tmp_path / "out")
    assert finetune(merged, trained.parent / "text.txt", tmp_path / "out", "--resume", "--steps", 13) == 0
    assert capsys.readouterr().err.count("in this model's weights already") == 1


@pytest.mark.parametrize(("steps", "has_mean"), [(99, False), (200, True)])
def test_the_curve_has_a_mean_where_it_does_not_mislead(
    monkeypatch: pytest.MonkeyPatch, steps: int, has_mean: bool
) -> None:
    from matplotlib.figure import Figure

    axes: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: axes.extend(self.axes))
    log = [{"step": step, "loss": 3.0 - step / steps} for step in range(1, steps + 1)]
    plot.loss_curve([*log, {"step": 0, "eval_loss": 3.25}, {"step": steps, "eval_loss": 2.125}], "title")
    lines = {line.get_label(): line for line in axes[0].lines}
    assert "held out: 3.250 to 2.125" in lines
    assert not axes[0].texts[1:]  # nothing is printed over the curves
    (right,) = axes[0].child_axes
    assert right.get_ylabel() == "perplexity"
    means = [line for label, line in lines.items() if "mean" in str(label)]
    assert bool(means) == has_mean
    for mean in means:  # of a straight line: the line itself, without a lag
        steps_of, losses = mean.get_data()
        assert losses == pytest.approx(3.0 - (steps_of - 0.5) / steps, abs=0.01)


def test_the_adapter_of_a_gguf_file_names_it(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder, which `from_pretrained` wants, and by its name in the card. Its tokenizer is none of this test."""
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    file = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    config = base.config
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in base.state_dict().items():
        file.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Could not find a config file")  # which a GGUF file's folder need not have
        assert finetune(Path("m.gguf"), text, tmp_path / "out", "--lr", 0.1) == 0
    assert f"base_model: {tmp_path}\n" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert 'from_pretrained("path/to/this/folder", gguf_file="m.gguf")' in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir("/")
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        theirs, ours = (
            kind.from_pretrained(str(tmp_path / "out"), gguf_file="m.gguf", dtype=torch.float32)(tokens).logits
            for kind in (peft.AutoPeftModelForCausalLM, AutoPeftModelForCausalLM)
        )
    torch.testing.assert_close(ours, theirs)
