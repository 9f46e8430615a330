"""What people train with, around our models and around accelerated PEFT models: transformers' Trainer, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import ia3
from ia3 import mlp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

KINDS = ("ours", "accelerated")
SCRIPTS = Path(__file__).parent / "scripts"


def make(kind: str, base: nn.Module, task: str = "CAUSAL_LM", adapter: str = "default") -> Any:
    """``base`` with an adapter: ours, PEFT's, or PEFT's on our kernels."""
    if kind == "ours":
        return ia3.get_peft_model(base, ia3.IA3Config(task_type=task), adapter)
    model = peft.get_peft_model(base, peft.IA3Config(task_type=task), adapter)
    return model if kind == "peft" else ia3.accelerate(model)


def dataset(count: int = 16, length: int = 10) -> list[dict[str, list[int]]]:
    """Sequences of which a different number of tokens counts for the loss: micro-batches must not be averaged."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, 64, (count, length), generator=generator).tolist()
    return [
        {"input_ids": row, "labels": [-100 if place < index % 7 else token for place, token in enumerate(row)]}
        for index, row in enumerate(rows)
    ]


def train(model: Any, folder: Path, resume: Path | None = None, **arguments: Any) -> transformers.Trainer:
    """Four steps with Trainer's AdamW, at a rate that moves the vectors well beyond rounding."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 11,
    }
    data = arguments.pop("data", None) or dataset()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**(settings | arguments)),
        train_dataset=data,
        eval_dataset=data[:6],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def vectors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that was trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def patched(model: nn.Module) -> int:
    return sum(mlp.patch_of(block) is not None for block in model.modules())


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the inputs of blocks that ran as one operator."""
    calls: list[tuple[int, ...]] = []
    kernel = mlp.gated_mlp

    def counted(x: Tensor, *args: Any) -> Tensor:
        calls.append(tuple(x.shape))  # ahead: checkpointing stops a block once it has what it recomputes
        return kernel(x, *args)

    monkeypatch.setattr(mlp, "gated_mlp", counted)
    return calls


# --- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_goes_where_peft_goes(
    families: dict[str, Any], kind: str, precision: str, tmp_path: Path, fused_calls: list[tuple[int, ...]]
) -> None:
    """bf16 is autocast, as Trainer does it: an fp32 model, whose matmuls run in bf16."""

    def final(who: str, oracle: bool = False) -> dict[str, Tensor]:
        model = make(who, families["llama"].build().to(torch.float64 if oracle else torch.float32))
        if oracle:
            model.double()
        train(model, tmp_path / f"{who}{oracle}", bf16=precision == "bf16" and not oracle)
        trained = vectors(model)
        assert {tensor.dtype for tensor in trained.values()} == {torch.float64 if oracle else torch.float32}
        return trained

    true, theirs = final("peft", oracle=True), final("peft")
    assert not fused_calls
    ours = final(kind)
    assert fused_calls == [(4, 10, 32)] * 4 * 2  # each step, each layer
    assert ours.keys() == theirs.keys()
    moved = float((flat(true) - 1).norm())
    assert moved > 1.0
    # PEFT's own distance from fp64 is what rounding does to this run.
    eps = torch.finfo(torch.float32).eps
    error, allowed = ((flat(run) - flat(true)).norm() for run in (ours, theirs))
    assert error <= 2 * allowed + eps * moved


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_is_the_big_batch(families: dict[str, Any], kind: str, tmp_path: Path) -> None:
    def final(who: str, dtype: torch.dtype, steps: int) -> Tensor:
        model = make(who, families["llama"].build().to(dtype)).to(dtype)
        sizes: dict[str, Any] = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        train(model, tmp_path / f"{dtype}{steps}", max_steps=2, **sizes)
        return flat(vectors(model))

    true = final("peft", torch.float64, 1)
    together, apart = final(kind, torch.float32, 1), final(kind, torch.float32, 4)
    # Both round the same sums in another order; one's distance from fp64 says what that does here.
    eps = torch.finfo(torch.float32).eps
    assert (apart - true).norm() <= 2 * (together - true).norm() + eps * true.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_bit(
    families: dict[str, Any], kind: str, use_reentrant: bool, tmp_path: Path, fused_calls: list[tuple[int, ...]]
) -> None:
    plain, checkpointed = (make(kind, families["llama"].build()) for _ in range(2))
    train(plain, tmp_path / "plain")
    count = len(fused_calls)
    train(
        checkpointed,
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert len(fused_calls) == 3 * count  # as many again, and the recomputation
    assert equal(vectors(plain), vectors(checkpointed))


@pytest.mark.parametrize("adapter", ["default", "french"])
@pytest.mark.parametrize("family_name", ["llama", "bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_adapter_and_resumes_to_the_same_bits(
    families: dict[str, Any], kind: str, family_name: str, adapter: str, tmp_path: Path
) -> None:
    """bert has a head in ``modules_to_save``, which is trained and saved too."""
    family = families[family_name]
    data = dataset()
    if family.task == "SEQ_CLS":
        data = [{"input_ids": row["input_ids"], "labels": index % 3} for index, row in enumerate(data)]  # type: ignore[dict-item]
    deterministic = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0} if family_name == "bert" else {}

    def fresh() -> Any:
        torch.manual_seed(3)  # the head's copy
        return make(kind, family.build(**deterministic), family.task, adapter)

    whole = fresh()
    train(whole, tmp_path / "whole", save_strategy="steps", save_steps=2, data=data)
    folder = tmp_path / "whole" / "checkpoint-2"
    adapter_folder = folder if adapter == "default" else folder / adapter
    names = {path.name for path in folder.rglob("*")}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}
    saved = load_file(adapter_folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == flat(vectors(whole)).numel()

    resumed = fresh()
    train(resumed, tmp_path / "resumed", resume=folder, data=data)
    assert equal(vectors(whole), vectors(resumed))
    stopped = fresh()
    train(stopped, tmp_path / "stopped", max_steps=2, data=data)
    assert not equal(vectors(whole), vectors(stopped))


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(families: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model = make(kind, families["llama"].build())
    trainer = train(
        model,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the worst loss, so that the best model is not the last one
    )
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(max(losses)) + 1
    assert best < len(losses) == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    state = model.state_dict()
    assert saved
    assert all(torch.equal(state[name.replace("ia3_l", "ia3_l.default")], saved[name]) for name in saved)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_save_model_after_training_loads_in_peft_and_ours(families: dict[str, Any], kind: str, tmp_path: Path) -> None:
    family = families["llama"]
    model = make(kind, family.build())
    train(model, tmp_path / "run").save_model(str(tmp_path / "trainer"))
    model.save_pretrained(tmp_path / "direct")
    expected = model.eval()(**family.inputs())
    for folder in ("trainer", "direct"):
        loaded = ia3.PeftModel.from_pretrained(family.build(), tmp_path / folder)
        assert torch.equal(loaded(**family.inputs()).logits, expected.logits)
        theirs = peft.PeftModel.from_pretrained(family.build(), str(tmp_path / folder)).eval()
        torch.testing.assert_close(theirs(**family.inputs()).logits, expected.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_labels_and_predicts(families: dict[str, Any], kind: str, tmp_path: Path) -> None:
    family = families["llama"]
    model = make(kind, family.build())
    trainer = train(model, tmp_path, max_steps=1)
    assert trainer.label_names == ["labels"]
    result = trainer.predict(dataset()[:6])
    batch = {name: torch.tensor([row[name] for row in dataset()[:6]]) for name in ("input_ids", "labels")}
    direct = model.eval()(**batch)
    # Trainer evaluates these six in one batch of eight: the same call.
    assert result.metrics["test_loss"] == pytest.approx(float(direct.loss), rel=1e-6)
    assert torch.equal(torch.as_tensor(result.predictions), direct.logits.detach())
    assert (torch.as_tensor(result.label_ids) == batch["labels"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_question_answering_is_evaluated_with_its_own_labels(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=64, **sizes))
    model = make(kind, base, "QUESTION_ANS")
    data = [
        {"input_ids": row["input_ids"], "start_positions": index % 5, "end_positions": 5 + index % 4}
        for index, row in enumerate(dataset())
    ]
    trainer = train(model, tmp_path, data=data, label_names=None)
    assert set(trainer.label_names) == {"start_positions", "end_positions"}
    assert trainer.evaluate()["eval_loss"] > 0
    start, end = trainer.predict(data[:6]).predictions
    assert start.shape == end.shape == (6, 10)
    assert patched(model) == 2


# --- copies -----------------------------------------------------------------------------------------------------------


def _saved_and_loaded(model: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_and_loaded,
}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Plain gradient descent, far enough to change every result."""
    _, gradients = loss_and_gradients(model, inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter.sub_(100.0 * gradients[name])


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_another_model_that_trains_fused(families: dict[str, Any], kind: str, how: str) -> None:
    family = families["llama"]
    model = make(kind, family.build())
    model.add_adapter("second", model.peft_config["default"])
    step(model, family.inputs())
    expected = loss_and_gradients(model, family.inputs())

    twin = COPIES[how](model)
    assert type(twin) is type(model)
    assert patched(twin) == patched(model) == 2
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert isinstance(twin, peft.PeftModel)
    loss, gradients = loss_and_gradients(twin, family.inputs())
    assert torch.equal(loss, expected[0])
    assert equal(gradients, expected[1])

    before = vectors(model)
    step(twin, family.inputs())
    assert equal(vectors(model), before)
    assert not equal(vectors(twin), before)
    assert torch.equal(loss_and_gradients(model, family.inputs())[0], expected[0])
    assert loss_and_gradients(twin, family.inputs())[0] < expected[0]
    twin.set_adapter("second")
    step(twin, family.inputs())
    assert all(".second" in name for name in vectors(twin))
    assert model.active_adapter == "default"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_round(families: dict[str, Any], kind: str, assign: bool) -> None:
    family = families["llama"]
    model, other = (make(kind, family.build(seed)) for seed in (0, 1))
    step(model, family.inputs())
    expected = loss_and_gradients(model, family.inputs())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    result = other.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert all(p.requires_grad == ("ia3_l" in name) for name, p in other.named_parameters())
    loss, gradients = loss_and_gradients(other, family.inputs())
    assert torch.equal(loss, expected[0])
    assert equal(gradients, expected[1])
    state.pop(next(name for name in state if "ia3_l" in name))
    with pytest.raises(RuntimeError, match="ia3_l"):
        other.load_state_dict(state, strict=True, assign=assign)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_given_vectors(families: dict[str, Any], kind: str) -> None:
    family = families["llama"]
    model, trained = (make(kind, family.build()) for _ in range(2))
    step(trained, family.inputs())
    expected = loss_and_gradients(trained, family.inputs())
    given = {name: tensor.requires_grad_() for name, tensor in vectors(trained).items()}
    loss = torch.func.functional_call(model, given, kwargs=family.inputs()).loss
    gradients = torch.autograd.grad(loss, list(given.values()))
    assert torch.equal(loss, expected[0])
    assert equal(dict(zip(given, gradients, strict=True)), expected[1])
    assert loss_and_gradients(model, family.inputs())[0] != expected[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_to_meta_and_comes_back(families: dict[str, Any], kind: str) -> None:
    family = families["llama"]
    model = make(kind, family.build())
    step(model, family.inputs())
    expected = loss_and_gradients(model, family.inputs())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # not in the state: rotary frequencies

    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(input_ids=torch.zeros(2, 7, dtype=torch.long, device="meta")).logits.shape == (2, 7, 64)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    assert patched(model) == 2
    loss, gradients = loss_and_gradients(model, family.inputs())
    assert torch.equal(loss, expected[0])
    assert equal(gradients, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_changes_its_dtype(families: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    """``model.to(dtype)`` takes the vectors along, as it does in PEFT."""
    family = families["llama"]
    model, theirs, true = (make(who, family.build()) for who in (kind, "peft", "peft"))
    for each in (theirs, true):
        each.load_state_dict(model.state_dict())
    for each, precision in ((model, dtype), (theirs, dtype), (true, torch.float64)):
        each.to(precision)
        assert {p.dtype for p in each.parameters()} == {precision}
    assert patched(model) == 2
    results = [flat(loss_and_gradients(each, family.inputs())[1]) for each in (model, theirs, true)]
    error, allowed = ((gradient - results[2]).norm() for gradient in results[:2])
    assert error <= 2 * allowed + torch.finfo(dtype).eps * results[2].norm()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_model_and_train_their_copies(families: dict[str, Any], kind: str) -> None:
    family = families["llama"]
    model = make(kind, family.build()).eval()
    step(model, family.inputs())
    batches = [
        {"input_ids": ids, "labels": ids}
        for ids in (torch.randint(3, 64, (2, 5 + n), generator=torch.Generator().manual_seed(n)) for n in range(4))
    ]

    def infer(batch: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [model(**batch).logits for _ in range(20)]

    def fit(batch: dict[str, Tensor]) -> list[Tensor]:
        own = copy.deepcopy(model)
        for _ in range(5):
            step(own, batch)
        return list(vectors(own).values())

    for work in (infer, fit):
        serial = [work(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, batches))
        assert all(torch.equal(a, b) for x, y in zip(serial, together, strict=True) for a, b in zip(x, y, strict=True))
