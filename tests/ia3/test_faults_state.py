"""What a call leaves behind: after an error nothing, after a deletion, a full bank or another thread what it says."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import ia3
from ia3 import AdapterBank, IA3Error

IDS = torch.arange(3, 11).view(1, 8)
TARGETS: dict[str, Any] = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
    "init_ia3_weights": False,
}


def build(kind: Any = transformers.LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(num_key_value_heads=2, vocab_size=64, pad_token_id=0, **sizes, **options)
    return kind(config).eval()


def adapted(name: str = "default", **fields: Any) -> Any:
    return ia3.get_peft_model(build(), ia3.IA3Config(**{**TARGETS, **fields}), name)


def logits(model: Any, ids: torch.Tensor = IDS, **named: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, **named).logits
    return result


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_head_still_acts_after_its_adapter_could_not_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(transformers.LlamaForSequenceClassification, num_labels=3)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="SEQ_CLS", **TARGETS)).eval()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    before = logits(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", fail)
    with pytest.raises(RuntimeError, match="gone"), pytest.warns(UserWarning, match="unmerged"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)
    assert all(layer.merged for _, layer in model.base_model.scaled_layers())
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("weights", [["x", 1.0], [1.0, None]])
def test_a_sum_that_fails_leaves_no_adapter(weights: Any) -> None:
    model = adapted("a")
    model.add_adapter("b", ia3.IA3Config(**TARGETS))
    with pytest.raises((TypeError, ValueError)):
        model.add_weighted_adapter(["a", "b"], weights, "sum")
    assert list(model.peft_config) == ["a", "b"]
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_sums_of_all_linear_adapters() -> None:
    model = adapted("a", target_modules="all-linear", feedforward_modules=[])
    model.add_adapter("b", ia3.IA3Config(target_modules="all-linear", feedforward_modules=[]))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert model.peft_config["a"].target_modules == "all-linear"
    for _, layer in model.base_model.scaled_layers():
        torch.testing.assert_close(layer.ia3_l["sum"], 0.5 * layer.ia3_l["a"] + 0.5 * layer.ia3_l["b"])


@pytest.mark.parametrize("names", [[], None, 3, [3]])
def test_names_that_are_none_change_nothing(names: Any) -> None:
    model = adapted()
    with pytest.raises(IA3Error, match="name"):
        model.set_adapter(names)
    assert model.active_adapters == ["default"]
    assert model.active_adapter == "default"


@pytest.mark.parametrize("name", ["a.b", "keys", ""])
def test_injecting_under_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(IA3Error, match="adapter_name"):
        ia3.inject_adapter_in_model(ia3.IA3Config(**TARGETS), build(), name)
    with pytest.raises(IA3Error, match=r"expected an nn\.Module"):
        ia3.inject_adapter_in_model(ia3.IA3Config(**TARGETS), "model")


def test_arguments_that_python_would_refuse_are_refused() -> None:
    model = adapted(task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="multiple values"):
        model(IDS, None, input_ids=IDS)
    with pytest.raises(TypeError, match="positional"):
        model(*[None] * 20)


# --- what came before -----------------------------------------------------------------------------------------------


def test_a_model_whose_adapters_are_all_deleted_can_be_disabled() -> None:
    model, base = adapted(), logits(build())
    model.delete_adapter("default")
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)


def test_layers_agree_on_who_follows_a_deleted_adapter() -> None:
    model = adapted("a")
    model.add_adapter("b", ia3.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False))
    model.add_adapter("c", ia3.IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False))
    model.delete_adapter("a")
    after = logits(model)
    model.set_adapter(model.active_adapters)
    assert torch.equal(logits(model), after)


def test_what_is_added_to_a_decelerated_model_takes_part_in_mixed_batches() -> None:
    model = adapted("a", target_modules=["k_proj"], feedforward_modules=[])
    logits(model, adapter_names=["a"])
    ia3.decelerate(model)
    torch.manual_seed(3)
    fields = {"target_modules": ["v_proj"], "feedforward_modules": [], "init_ia3_weights": False}
    model.add_adapter("b", peft.IA3Config(**fields))
    ia3.accelerate(model)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    torch.testing.assert_close(logits(model, adapter_names=["b"]), expected)


def test_a_bank_keeps_its_model_accelerated() -> None:
    model = adapted()
    with AdapterBank(model, 2), pytest.raises(IA3Error, match="close the bank"):
        ia3.decelerate(model)
    ia3.decelerate(model)
    with pytest.raises(IA3Error, match="or a PeftModel of ia3"):
        AdapterBank(model, 2)


def test_the_class_that_loads_is_the_class_that_comes(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)  # no task is named
    assert type(ia3.PeftModelForCausalLM.from_pretrained(build(), tmp_path)) is ia3.PeftModelForCausalLM
    assert type(ia3.PeftModel.from_pretrained(build(), tmp_path)) is ia3.PeftModel


# --- queries that are left alone ------------------------------------------------------------------------------------


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).eval()


def test_queries_that_are_left_alone_stay_so_in_sums_and_in_pefts_hands() -> None:
    fields: dict[str, Any] = {"target_modules": ["c_attn"], "feedforward_modules": [], "init_ia3_weights": False}
    model = ia3.get_peft_model(gpt2(), ia3.IA3Config(scale_queries=False, **fields), "b")
    model.add_adapter("a", ia3.IA3Config(**fields))
    with torch.no_grad():  # as weight decay does to entries without a gradient
        for _, layer in model.base_model.scaled_layers():
            layer.ia3_l["b"].mul_(0.5)
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "sum")
    for _, layer in model.base_model.scaled_layers():
        queries = slice(0, 16)
        torch.testing.assert_close(layer.ia3_l["sum"][queries], 0.25 * layer.ia3_l["a"][queries] + 0.75)
    model.set_adapter("b")
    before = logits(model)
    torch.testing.assert_close(logits(ia3.decelerate(model)), before)


# --- banks ----------------------------------------------------------------------------------------------------------


def bank_of_two(**options: Any) -> tuple[AdapterBank, dict[str, torch.Tensor]]:
    bank = AdapterBank(build(), ia3.IA3Config(**TARGETS), 1, **options)
    vectors = {name: torch.rand_like(value) for name, value in peft.get_peft_model_state_dict(bank.model).items()}
    bank.load("x", vectors)
    bank.load("y", {name: value + 1 for name, value in vectors.items()})
    return bank, vectors


def test_a_full_bank_lets_adapters_change_places() -> None:
    size = sum(4 * value.numel() for value in peft.get_peft_model_state_dict(adapted()).values())
    bank, vectors = bank_of_two(host_limit=size)
    first = logits(bank.model, adapter_names=["x"])
    assert not torch.equal(first, logits(bank.model, adapter_names=["y"]))
    assert torch.equal(first, logits(bank.model, adapter_names=["x"]))
    bank.load("y", vectors, replace=True)  # y is outside
    assert torch.equal(first, logits(bank.model, adapter_names=["y"]))
    assert bank.report().host_bytes == size
    with pytest.raises(IA3Error, match="host_limit"):
        bank.load("z", vectors)
    assert torch.equal(first, logits(bank.model, adapter_names=["x"]))


def test_an_adapter_stays_outside_where_no_slot_can_be_had() -> None:
    bank, _ = bank_of_two()
    bank.pin("x")
    before = bank.report()
    with pytest.raises(IA3Error, match="no slot left"):
        logits(bank.model, adapter_names=["y"])
    bank.unpin("x")
    assert bank.report().host_bytes == before.host_bytes
    logits(bank.model, adapter_names=["y"])


def test_errors_of_a_bank_are_sentences(tmp_path: Path) -> None:
    bank, vectors = bank_of_two(folder=tmp_path / "kept")
    for wrong in ({"x": "s"}, {1: torch.ones(1)}, {"x": [1.0]}):
        with pytest.raises(IA3Error, match="expected tensors by their names"):
            bank.load("z", wrong)
    for path in (tmp_path / "kept").iterdir():
        path.rename(tmp_path / "elsewhere")
    with pytest.raises(IA3Error, match="cannot write an evicted adapter"):
        bank.load("z", vectors)
    bank.close()
    with pytest.raises(IA3Error, match="the bank is closed"):
        bank.load("z", vectors)
    with pytest.raises(IA3Error, match="this machine has"):
        AdapterBank(build(), ia3.IA3Config(**TARGETS), 10**12, folder=tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- batches that run -----------------------------------------------------------------------------------------------


def test_nobody_merges_or_unloads_while_rows_are_routed() -> None:
    model = adapted("a")
    with model.base_model.route(["a"]):
        for change in (model.merge_adapter, model.unload, model.merge_and_unload):
            with pytest.raises(IA3Error, match="leave the route first"):
                change()


def test_nobody_merges_while_a_continuous_batch_runs() -> None:
    model = adapted("a")
    outcome: list[BaseException | None] = []

    def merge(*_: Any) -> None:
        if not outcome:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()

    def attempt() -> None:
        try:
            model.merge_adapter(["a"])
            outcome.append(None)
        except IA3Error as error:
            outcome.append(error)

    model.get_base_model().model.layers[0].register_forward_pre_hook(merge)
    model.base_model.generate_batch([[3, 4, 5]], adapter_names=["a"], max_new_tokens=2)
    assert isinstance(outcome[0], IA3Error)


def test_rows_are_refused_where_positions_come_first() -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = ia3.get_peft_model(
        transformers.XLNetLMHeadModel(config).eval(),
        ia3.IA3Config(target_modules=["layer_1"], feedforward_modules=[]),
    )
    with pytest.raises(IA3Error, match="positions before sequences"):
        model(input_ids=IDS, adapter_names=["default"])
