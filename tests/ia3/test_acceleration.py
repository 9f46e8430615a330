"""``ia3.accelerate``: PEFT's models on our kernels, the same for everybody who looks at them."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn

import ia3

from .conftest import Family, perturb


def _peft_model(family: Family, dtype: torch.dtype = torch.float32, **config: Any) -> peft.PeftModel:
    model = peft.get_peft_model(
        family.build().to(dtype), peft.IA3Config(task_type=family.task, **(family.targets | config))
    )
    perturb(model)
    return model


def _pair(family: Family, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[peft.PeftModel, peft.PeftModel]:
    """PEFT's model, and the same accelerated; in evaluation mode."""
    return _peft_model(family, dtype, **config).eval(), ia3.accelerate(_peft_model(family, dtype, **config)).eval()


def _gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _sides(model: nn.Module) -> set[str]:
    return {row.runs.split()[0] for row in ia3.report(model).rows}


def test_every_family_computes_the_same_through_our_kernels(family: Family) -> None:
    plain, fast = _pair(family)
    batch = family.inputs()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    expected, got = _gradients(plain, batch), _gradients(fast, batch)
    assert got.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert _sides(plain) == {"peft"}
    assert _sides(fast) <= {"scaled_linear", "gated_activation", "scaled_activation"}


def test_everybody_else_sees_what_they_saw(family: Family) -> None:
    plain, fast = _pair(family)
    assert repr(fast) == repr(plain)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [p.requires_grad for p in fast.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert fast.get_model_status() == plain.get_model_status()
    assert fast.get_layer_status() == plain.get_layer_status()
    for (_, theirs), (_, ours) in zip(plain.named_modules(), fast.named_modules(), strict=True):
        assert isinstance(ours, type(theirs))
    assert isinstance(fast.base_model, peft.tuners.IA3Model)


def test_it_is_the_same_object_and_says_what_it_fused(
    families: dict[str, Family], caplog: pytest.LogCaptureFixture
) -> None:
    model = _peft_model(families["llama"])
    parameters = list(map(id, model.parameters()))
    with caplog.at_level("INFO", logger="ia3"):
        assert ia3.accelerate(model) is model
    assert list(map(id, model.parameters())) == parameters
    assert "fused into LlamaMLP" in caplog.text
    assert ia3.accelerate(model) is model  # once more changes nothing
    fused = [row for row in ia3.report(model).rows if row.runs.startswith("gated_activation")]
    assert [row.module for row in fused] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_decelerate_leaves_nothing_behind(family: Family) -> None:
    plain, fast = _pair(family)
    batch = family.inputs()
    ia3.decelerate(fast)
    for (_, theirs), (_, ours) in zip(plain.named_modules(), fast.named_modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
    with torch.no_grad():
        assert torch.equal(fast(**batch).logits, plain(**batch).logits)


def test_adapters_that_come_later_are_accelerated_too(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["llama"]
    plain, fast = _pair(family, target_modules=["v_proj"], feedforward_modules=[])
    donor = _peft_model(family, target_modules=["down_proj", "k_proj"], feedforward_modules=["down_proj"])
    donor.save_pretrained(tmp_path)
    other = peft.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False)
    batch = family.inputs()
    for model in (plain, fast):
        torch.manual_seed(3)
        model.add_adapter("other", other)
        model.load_adapter(tmp_path, "loaded")
        model.eval()
    for active in ("other", "loaded", "default"):
        for model in (plain, fast):
            model.set_adapter(active)
        with torch.no_grad():
            torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    for model in (plain, fast):
        model.base_model.set_adapter(["other", "loaded"])
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    assert _sides(fast) == {"scaled_linear", "gated_activation"}
    for model in (plain, fast):
        model.delete_adapter("loaded")
    assert fast.active_adapters == plain.active_adapters
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)


def test_disabling_merging_and_unloading_work_as_in_peft(family: Family) -> None:
    plain, fast = _pair(family)
    batch = family.inputs()

    def compare() -> None:
        with torch.no_grad():
            torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)

    with plain.disable_adapter(), fast.disable_adapter(), torch.no_grad():
        assert torch.equal(fast(**batch).logits, plain(**batch).logits)
    compare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warning that its unmerging is inexact
        for model in (plain, fast):
            model.merge_adapter(safe_merge=True)
        compare()
    merged = fast.merge_and_unload()
    assert not [module for module in merged.modules() if "forward" in module.__dict__ or isinstance(module, IA3Layer)]
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)
    unloaded = ia3.accelerate(_peft_model(family)).unload()
    with torch.no_grad():
        assert torch.equal(unloaded(**batch).logits, family.build()(**batch).logits)


def test_disabling_a_merged_model_takes_vectors_out_of_the_weights_for_that_time(families: dict[str, Family]) -> None:
    _, fast = _pair(families["llama"])
    batch = families["llama"].inputs()
    base = families["llama"].build().requires_grad_(False)
    fast.eval()
    with torch.no_grad():
        fast.merge_adapter()
        merged = fast(**batch).logits
        with fast.disable_adapter():
            assert torch.equal(fast(**batch).logits, base(**batch).logits)
        assert torch.equal(fast(**batch).logits, merged)
    assert all(layer.merged for layer in fast.modules() if isinstance(layer, IA3Layer))


def test_what_peft_merged_before_is_peft_s_to_unmerge(families: dict[str, Family]) -> None:
    plain, fast = _peft_model(families["llama"]), _peft_model(families["llama"])
    batch = families["llama"].inputs()
    for model in (plain, fast):
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.data.abs_().add_(0.5)  # PEFT's unmerging divides
        model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for model in (plain, fast):
            model.add_adapter("other", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
            model.merge_adapter()
        ia3.accelerate(fast)
        assert torch.equal(fast(**batch).logits, plain(**batch).logits)
        with pytest.raises(ia3.IA3Error, match="before the model was accelerated"):
            fast.merge_adapter(["other"])
        for model in (plain, fast):
            model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True))
    assert not any(layer.merged for layer in fast.modules() if isinstance(layer, IA3Layer))


def test_files_are_the_same(family: Family, tmp_path: Path) -> None:
    plain, fast = _pair(family)
    plain.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_transformers_model_with_its_own_adapters(families: dict[str, Family]) -> None:
    family = families["llama"]
    plain, fast = family.build(), family.build()
    batch = family.inputs()
    config = peft.IA3Config(init_ia3_weights=False, **_LLAMA)
    for model in (plain, fast):
        torch.manual_seed(2)
        model.add_adapter(config, "first")
    assert ia3.accelerate(fast) is fast
    for model in (plain, fast):
        torch.manual_seed(4)
        model.add_adapter(
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False), "second"
        )
    for active in ("first", "second", ["first", "second"]):
        for model in (plain, fast):
            model.set_adapter(active)
        with torch.no_grad():
            torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    assert _sides(fast) == {"scaled_linear", "gated_activation"}
    assert fast.active_adapters() == plain.active_adapters()
    for model in (plain, fast):
        model.disable_adapters()
    with torch.no_grad():
        assert torch.equal(fast(**batch).logits, plain(**batch).logits)
    for model in (plain, fast):
        model.enable_adapters()
    for model in (plain, fast):
        model.delete_adapter("first")
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    ia3.decelerate(fast)
    assert fast.__dict__.keys() == plain.__dict__.keys()


_LLAMA: dict[str, Any] = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def test_a_transformers_model_saves_and_loads_its_adapter(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["llama"]
    fast = family.build()
    fast.add_adapter(peft.IA3Config(init_ia3_weights=False, **_LLAMA))
    ia3.accelerate(fast).save_pretrained(tmp_path)
    plain, again = family.build(), family.build()
    again.add_adapter(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "old")
    ia3.accelerate(again)
    plain.load_adapter(str(tmp_path))
    again.load_adapter(str(tmp_path), "loaded")
    batch = family.inputs()
    with torch.no_grad():
        expected = plain(**batch).logits
        torch.testing.assert_close(fast(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert "gated_activation" in _sides(again)


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent_and_accelerated(families: dict[str, Family], twin: Any) -> None:
    fast = ia3.accelerate(_peft_model(families["llama"])).eval()
    batch = families["llama"].inputs()
    other = twin(fast)
    with torch.no_grad():
        before = fast(**batch).logits
        assert torch.equal(other(**batch).logits, before)
        for name, parameter in other.named_parameters():
            if "ia3_l" in name:
                parameter.zero_()
        assert torch.equal(fast(**batch).logits, before)
        assert not torch.equal(other(**batch).logits, before)
    assert _sides(other) == _sides(fast)


def test_hooks_on_a_layer_still_run(families: dict[str, Family]) -> None:
    fast = ia3.accelerate(_peft_model(families["llama"])).eval()
    batch = families["llama"].inputs()
    down = fast.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    seen: list[Any] = []
    handle = down.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        hooked = fast(**batch).logits
        assert len(seen) == 1
        handle.remove()
        torch.testing.assert_close(fast(**batch).logits, hooked, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_what_cannot_be_accelerated_is_told(llama: nn.Module) -> None:
    with pytest.raises(ia3.IA3Error, match=r"LlamaForCausalLM has no IA3 layers.*get_peft_model"):
        ia3.accelerate(llama)
    with pytest.raises(ia3.IA3Error, match="model is a str"):
        ia3.accelerate("llama")  # type: ignore[type-var]
    lora = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ia3.IA3Error, match="no IA3 layers"):
        ia3.accelerate(lora)
