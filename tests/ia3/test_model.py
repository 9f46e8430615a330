"""A model with adapters in use: training, compiling, checkpointing, merging, and giving the base model back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.ia3 import IA3Model as IA3Tuner
from peft.tuners.ia3.layer import Linear
from torch import Tensor, nn

import ia3
from ia3 import mlp
from ia3.layers import effective_scale
from ia3.mlp import unfuse


def test_one_adapter_starts_as_the_base_model(family: Any) -> None:
    base = family.build()
    expected = base(**family.inputs()).logits
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type=family.task, **family.targets))
    torch.testing.assert_close(model(**family.inputs()).logits, expected)


def test_only_vectors_and_heads_are_trained(families: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = ia3.get_peft_model(families["bert"].build(), ia3.IA3Config(task_type="SEQ_CLS"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("ia3_l.default" in name or "classifier.modules_to_save.default." in name for name in trained)
    assert any("classifier" in name for name in trained)
    trainable, everything = model.get_nb_trainable_parameters()
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"{trainable:,}" in printed
    assert f"{everything:,}" in printed


def test_attributes_and_generate_are_those_of_the_base_model(llama: nn.Module, batch: dict[str, Tensor]) -> None:
    model = ia3.get_peft_model(llama, ia3.IA3Config(task_type="CAUSAL_LM"))
    assert model.config is llama.config
    assert model.device == llama.device
    assert model.get_base_model() is llama
    assert (model.active_adapter, model.active_adapters, list(model.peft_config)) == (
        "default",
        ["default"],
        ["default"],
    )
    prompt = batch["input_ids"][:, :3]
    assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape == (2, 5)
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_disabled_it_is_the_base_model(family: Any, adapted: Callable[..., ia3.PeftModel]) -> None:
    model, inputs = adapted(family), family.inputs()
    # Frozen: torch multiplies some shapes in another order where weights require gradients.
    expected = family.build().requires_grad_(False)(**inputs).logits
    scaled = model(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, scaled)
    assert not torch.equal(scaled, expected)


@pytest.mark.parametrize("stage", ["replacing", "vectors", "fusing"])
def test_a_failure_in_the_middle_changes_nothing(
    families: dict[str, Any], snapshot: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    calls = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise MemoryError(stage)
            return function(*args, **kwargs)

        return call

    if stage == "replacing":
        monkeypatch.setattr(IA3Tuner, "_replace_module", failing(IA3Tuner._replace_module))
    elif stage == "vectors":
        monkeypatch.setattr(Linear, "update_layer", failing(Linear.update_layer))
    else:
        calls = 2
        monkeypatch.setattr(mlp, "fuse", failing(mlp.fuse))
    family = families["bert"]
    model = family.build()
    before, expected = snapshot(model), model(**family.inputs()).logits
    with pytest.raises(MemoryError):
        ia3.get_peft_model(model, ia3.IA3Config(task_type="SEQ_CLS"))
    assert snapshot(model) == before
    assert torch.equal(model(**family.inputs()).logits, expected)


def test_a_second_adapter_multiplies_and_a_failed_one_leaves_the_first(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families["llama"]
    model, inputs = adapted(family), family.inputs()
    model.base_model.set_adapter(["default"], inference_mode=True)
    facts = [(name, p.requires_grad) for name, p in model.named_parameters()]
    first = model(**inputs).logits
    config = ia3.IA3Config(target_modules=["q_proj", "down_proj"])
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "fuse", _raise_once(mlp.fuse))
        with pytest.raises(MemoryError):
            model.add_adapter("second", config)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == facts
    assert torch.equal(model(**inputs).logits, first)
    assert list(model.peft_config) == ["default"]

    model.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ia3_l.second"):
                parameter.fill_(2.0)
    model.base_model.set_adapter(["default", "second"])
    down = model.get_base_model().model.layers[0].mlp.down_proj
    scale, index = effective_scale(down, torch.zeros(1, down.in_features))
    assert scale is not None
    assert index is None
    torch.testing.assert_close(scale.reshape(-1), 2 * down.ia3_l["default"].flatten())
    both = model(**inputs).logits
    unfuse(model)
    torch.testing.assert_close(model(**inputs).logits, both)
    with pytest.raises(ia3.IA3Error, match="already has an adapter 'second'"):
        model.add_adapter("second", config)
    with pytest.raises(ia3.IA3Error, match="no adapter 'third'"):
        model.base_model.set_adapter(["third"])


def _raise_once(function: Callable[..., Any]) -> Callable[..., Any]:
    errors = [MemoryError()]

    def call(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*args)

    return call


@pytest.mark.parametrize("name", ["", "a.b", "keys", "ia3_x", "a/b"])
def test_a_name_that_torch_or_a_path_cannot_hold_is_refused(llama: nn.Module, name: str) -> None:
    with pytest.raises(ia3.IA3Error, match="adapter_name"):
        ia3.get_peft_model(llama, ia3.IA3Config(), adapter_name=name)


def test_wrong_arguments_are_one_sentence(llama: nn.Module) -> None:
    with pytest.raises(ia3.IA3Error, match="dict"):
        ia3.get_peft_model(llama, {})  # type: ignore[arg-type]
    with pytest.raises(ia3.IA3Error, match="str"):
        ia3.get_peft_model("llama", ia3.IA3Config())  # type: ignore[arg-type]
    model = ia3.get_peft_model(llama, ia3.IA3Config())
    for again in (model, llama):
        with pytest.raises(ia3.IA3Error, match="already carries"):
            ia3.get_peft_model(again, ia3.IA3Config())


def test_merging_keeps_the_results(family: Any, adapted: Callable[..., ia3.PeftModel]) -> None:
    model, inputs = adapted(family), family.inputs()
    expected = model(**inputs).logits
    names = [name for name, _ in family.build().named_modules()]
    merged = model.merge_and_unload()
    assert [name for name, _ in merged.named_modules()] == names
    assert not any(
        "forward" in module.__dict__ or "feed_forward_chunk" in module.__dict__ for module in merged.modules()
    )
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_merging_leaves_tied_weights_alone(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    family = families["llama"]
    model = adapted(family, target_modules=["lm_head"], feedforward_modules=[])
    base = model.get_base_model()
    base.lm_head.base_layer.weight = base.model.embed_tokens.weight
    expected = model(**family.inputs()).logits
    before = base.model.embed_tokens.weight.clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, before)
    torch.testing.assert_close(merged(**family.inputs()).logits, expected)


def test_merging_what_cannot_be_merged_changes_nothing(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], snapshot: Callable[[nn.Module], Any]
) -> None:
    model = adapted(families["llama"])
    nn.utils.parametrizations.weight_norm(model.get_base_model().model.layers[1].mlp.down_proj.base_layer)
    before = snapshot(model)
    with pytest.raises(ia3.IA3Error, match=r"layers\.1\.mlp\.down_proj"):
        model.merge_and_unload()
    assert snapshot(model) == before


def test_unloading_gives_the_base_model_back(family: Any, adapted: Callable[..., ia3.PeftModel]) -> None:
    base = family.build().requires_grad_(False)
    bare = adapted(family).unload()
    assert [(name, type(module)) for name, module in bare.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    assert torch.equal(bare(**family.inputs()).logits, base(**family.inputs()).logits)


def test_the_state_dict_goes_round(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    family = families["t5_gated"]
    model = adapted(family)
    fresh = ia3.get_peft_model(family.build(seed=9), ia3.IA3Config(task_type=family.task)).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**family.inputs()).logits, model(**family.inputs()).logits)


def test_copies_and_pickles_work(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    family = families["bert"]
    model = adapted(family)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_base_model() is not model.get_base_model()
        assert torch.equal(twin(**family.inputs()).logits, model(**family.inputs()).logits)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5_gated", "bert"])
def test_it_compiles_without_a_graph_break(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], name: str
) -> None:
    family = families[name]
    model, inputs = adapted(family), family.inputs()
    if family.task == "CAUSAL_LM":
        del inputs["labels"]  # transformers' loss for them may log, which is a graph break of its own
    eager = model(**inputs)
    eager.logits.square().mean().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    # aot_eager traces forward and backward as inductor does, and generates no code.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)
    compiled.logits.square().mean().backward()
    torch.testing.assert_close(compiled.logits, eager.logits)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its name changes
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(
    families: dict[str, Any], adapted: Callable[..., ia3.PeftModel], name: str, use_reentrant: bool
) -> None:
    family = families[name]
    gradients = []
    for is_checkpointed in (False, True):
        model = adapted(family).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(4)  # the same dropout
        model(**family.inputs()).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected)


def test_trainer_trains_and_evaluates(families: dict[str, Any], tmp_path: Path, batch: dict[str, Tensor]) -> None:
    model = ia3.get_peft_model(families["llama"].build(), ia3.IA3Config(task_type="CAUSAL_LM"))
    rows = [{"input_ids": ids, "labels": ids, "line": 1} for ids in batch["input_ids"].repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, bf16=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss_before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("ia3_l" in name), name


def test_autocast_and_no_grad(families: dict[str, Any], adapted: Callable[..., ia3.PeftModel]) -> None:
    family = families["llama"]
    model = adapted(family)
    expected = model(**family.inputs()).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(**family.inputs()).logits
    assert not logits.requires_grad
    torch.testing.assert_close(logits.float(), expected, rtol=5e-2, atol=5e-2)
