"""Merging that fails or is interrupted, and weights that others share: everything or nothing."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ia3
from ia3.merging import layer as held
from ia3.merging import model as merging
from ia3_kernels import backends, exact, moves
from tests.ia3_kernels.helpers import interrupted

from .conftest import Family, perturb
from .test_merging import _assert_unchanged, _base, _one_layer, _set_vectors, _weights


def test_other_threads_merge_as_well() -> None:
    model = _one_layer(ia3, "linear", False)
    thread = threading.Thread(target=model.merge_adapter)
    thread.start()
    thread.join()
    assert model.get_base_model().layer.merged


# --- what does not work changes nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d", "grouped conv2d"])
@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_safe_merging_refuses_what_is_not_finite(kind: str, is_feedforward: bool, value: float, in_place: bool) -> None:
    model = _one_layer(ia3, kind, is_feedforward, torch.bfloat16, adapters=2)
    with torch.no_grad():
        next(iter(_base(model).parameters())).mul_(20)  # times 1e38 it overflows
        model.get_base_model().layer.ia3_l["default"].view(-1)[-1] = value
    model.merge_adapter(["a1"])
    before, merged = _weights(model), model.get_base_model().layer.merged_adapters
    with pytest.raises(
        ia3.IA3Error,
        match=r"NaNs detected in the merged weights. The adapter (a1, )?default seems .* bfloat16: .* 'layer'",
    ) as caught:
        (model.merge_and_unload if in_place else model.merge_adapter)(safe_merge=True)
    assert "\n" not in str(caught.value)
    _assert_unchanged(model, before)
    assert model.get_base_model().layer.merged_adapters == merged == ["a1"]
    model.merge_adapter()  # who does not ask for safety gets what the vectors say
    assert not bool(_base(model).weight.isfinite().all())
    model.unmerge_adapter()
    assert bool(_base(model).weight.isfinite().all())


def test_safe_merging_looks_at_the_bias_too() -> None:
    model = _one_layer(ia3, "linear", False)
    with torch.no_grad():
        _base(model).weight.zero_()
        _base(model).bias.fill_(1e30)
    _set_vectors(model, [1e20])
    before = _weights(model)
    with pytest.raises(ia3.IA3Error, match="not finite"):
        model.merge_adapter(safe_merge=True)
    _assert_unchanged(model, before)


def test_safe_merging_looks_at_the_products_only() -> None:
    # A huge element of the vector meets small weights; the largest weight is elsewhere.
    model = _one_layer(ia3, "linear", True)
    with torch.no_grad():
        _base(model).weight.fill_(1e-30)
        _base(model).weight[:, 0] = 1e30
    _set_vectors(model, [1.0, 1e30, 1.0, 1.0])
    model.merge_adapter(safe_merge=True)
    assert bool(_base(model).weight.isfinite().all())


def test_safe_merging_starts_from_the_weights_without_vectors() -> None:
    model = _one_layer(ia3, "linear", True, adapters=2)
    _set_vectors(model, [1e30])
    _set_vectors(model, [1e-10], "a1")
    model.merge_adapter()
    merged = model.merge_and_unload(adapter_names=["a1"], safe_merge=True)  # 1e20, but 1e50 on top of merged weights
    assert bool(merged.layer.weight.isfinite().all())


@pytest.fixture(params=[0, 1, 4, 11])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Once armed with a number (``append``), the weight after so many fails; after that everything works again."""
    armed = list[int]()

    def fail_once(operator: Callable[..., Any], *arguments: Any) -> Any:
        if armed:
            armed[0] -= 1
            if armed[0] < 0:
                armed.clear()
                raise MemoryError
        return operator(*arguments)

    running = backends.native.BACKEND if backends.prefers_native() else backends.reference.BACKEND
    operators = {
        name: functools.partial(fail_once, operator) if name.endswith("exact_") else operator
        for name, operator in running.operators.items()
    }
    failing = dataclasses.replace(running, operators=operators)
    monkeypatch.setattr(backends, "_BACKENDS", (failing, backends.reference.BACKEND))
    backends.choose.cache_clear()
    armed.append(request.param)
    yield armed
    monkeypatch.undo()
    backends.choose.cache_clear()


OPERATIONS: dict[str, Callable[[ia3.PeftModel], Any]] = {
    "merge": lambda model: model.merge_adapter(["default", "other"]),
    "merge safely": lambda model: model.merge_adapter(["default", "other"], safe_merge=True),
    "merge inexactly": lambda model: model.merge_adapter(["default", "other"], exact=False),
    "unmerge": lambda model: model.unmerge_adapter(),
    "swap": lambda model: model.swap_adapter("default", "other"),
    "unload": lambda model: model.merge_and_unload(adapter_names=["other"]),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
}


def _two_adapters(family: Family, adapted: Callable[..., ia3.PeftModel]) -> ia3.PeftModel:
    everything: dict[str, Any] = {"target_modules": "all-linear", "feedforward_modules": ["dense_4h_to_h"]}
    model = adapted(family, **everything)
    model.add_adapter("other", ia3.IA3Config(**everything))
    perturb(model, 8)
    return model


@pytest.mark.parametrize("is_merged_before", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failure_half_way_leaves_nothing_behind(
    operation: str,
    is_merged_before: bool,
    failing: list[int],
    families: dict[str, Family],
    adapted: Callable[..., ia3.PeftModel],
) -> None:
    if not is_merged_before and operation in ("unmerge", "swap", "disable"):
        pytest.skip("there is nothing to fail")
    family, after = families["gpt_neox"], failing.pop()
    model = _two_adapters(family, adapted)
    layers = model.base_model.scaled_layers()
    unmerged = _weights(model)
    if is_merged_before:
        model.merge_adapter()
    before, logits = _weights(model), model(**family.inputs()).logits
    parameters = list(model.parameters())
    failing.append(after)
    with pytest.raises(MemoryError):
        OPERATIONS[operation](model)
    _assert_unchanged(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [layer.merged_adapters for _, layer in layers] == [["default"] * is_merged_before] * len(layers)
    assert torch.equal(model(**family.inputs()).logits, logits)
    if is_merged_before:  # and what undoes it is whole
        with model.disable_adapter():
            _assert_unchanged(model, unmerged)
        model.unmerge_adapter()
        _assert_unchanged(model, unmerged)


_OWN = (merging.__file__, held.__file__, exact.__file__, moves.__file__)


@pytest.mark.parametrize("is_shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("operation", ["merge", "merge more", "unmerge", "swap", "disable"])
def test_an_interrupt_between_any_two_instructions_leaves_all_or_nothing(operation: str, is_shared: bool) -> None:
    model = _one_layer(ia3, "linear", False, torch.bfloat16, adapters=2)
    base, layer = _base(model), model.get_base_model().layer
    if is_shared:
        layer.register_module("twin", nn.Linear(1, 1))
        layer.twin.weight = base.weight
    unmerged = base.weight.detach().clone()

    def start() -> None:
        if operation != "merge":
            model.merge_adapter(["default"])

    run: dict[str, Callable[[], Any]] = {
        "merge": lambda: model.merge_adapter(["default"]),
        "merge more": lambda: model.merge_adapter(["a1"]),
        "unmerge": model.unmerge_adapter,
        "swap": lambda: model.swap_adapter("default", "a1"),
        "disable": model.base_model.disable_adapter_layers,
    }
    start()
    before, names = base.weight.detach().clone(), list(layer.merged_adapters)
    run[operation]()
    after, names_after = base.weight.detach().clone(), list(layer.merged_adapters)
    model.base_model.enable_adapter_layers()
    model.unmerge_adapter()
    outcomes = set()
    for instructions in range(0, 100_000, 3):
        start()
        was_interrupted = interrupted(run[operation], instructions, _OWN)
        is_done = not torch.equal(base.weight, before)
        assert torch.equal(base.weight, after if is_done else before)
        if operation != "disable":  # the names stay
            assert layer.merged_adapters == (names_after if is_done else names)
        outcomes.add((was_interrupted, is_done))
        torch.set_grad_enabled(True)  # torch's own blocks may be left by half
        model.base_model.enable_adapter_layers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nothing to do
            model.unmerge_adapter()
        assert torch.equal(base.weight, unmerged)
        if not was_interrupted:
            break
    assert outcomes >= {(True, False), (False, True)}


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", _Doubled()),
        lambda layer: layer.register_forward_hook(lambda *arguments: 2 * arguments[2]),
    ],
    ids=["parametrized", "hooked"],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_weight_that_is_not_what_the_layer_computes_with_is_refused(
    kind: str, spoil: Callable[[nn.Module], object], in_place: bool
) -> None:
    model = _one_layer(ia3, kind, False)
    spoil(_base(model))
    before = _weights(model)
    with pytest.raises(ia3.IA3Error, match="cannot merge into 'layer'"):
        (model.merge_and_unload if in_place else model.merge_adapter)()
    _assert_unchanged(model, before)


# --- ties ---------------------------------------------------------------------------------------------------------


def _tied(family: Family) -> tuple[ia3.PeftModel, Any]:
    config = ia3.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    model = ia3.get_peft_model(family.build(tie_word_embeddings=True), config)
    model.add_adapter("other", config)
    perturb(model)
    base: Any = model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    return model, base


@pytest.mark.parametrize("is_merged_before", [False, True])
def test_tied_weights_merge_where_they_are_scaled_and_are_tied_again(
    is_merged_before: bool, families: dict[str, Family], batch: dict[str, Tensor]
) -> None:
    model, base = _tied(families["llama"])
    embeddings = base.model.embed_tokens.weight
    before, expected = embeddings.detach().clone(), model(**batch).logits
    model.merge_adapter()
    assert base.lm_head.base_layer.weight is not embeddings
    assert torch.equal(embeddings, before)
    torch.testing.assert_close(model(**batch).logits, expected)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is embeddings is base.model.embed_tokens.weight
    assert torch.equal(model(**batch).logits, expected)

    model.base_model.set_adapter(["default", "other"])
    expected = model(**batch).logits
    if is_merged_before:
        model.merge_adapter(["other"])
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, before)
    torch.testing.assert_close(merged(**batch).logits, expected)


def test_two_targets_that_share_a_weight_are_scaled_each() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    model = ia3.get_peft_model(base, ia3.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    perturb(model)
    x = torch.randn(3, 4)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert base[1].base_layer.weight is base[0].base_layer.weight
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_parameters_that_share_their_memory_are_tied_too() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = nn.Parameter(base[0].weight.data)
    model = ia3.get_peft_model(base, ia3.IA3Config(target_modules=["0"], feedforward_modules=[]))
    perturb(model)
    before = _weights(model)
    x = torch.randn(3, 4)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(base[1].weight, before["base_model.model.1.weight"])
    model.unmerge_adapter()
    _assert_unchanged(model, before)
    assert base[0].base_layer.weight.data_ptr() == base[1].weight.data_ptr()


def test_the_progress_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    _one_layer(ia3, "linear", False).merge_and_unload()
    assert capsys.readouterr().err == ""
    _one_layer(ia3, "linear", False).merge_and_unload(progressbar=True)
    assert "1/1" in capsys.readouterr().err


def test_nothing_warns_of_inexactness() -> None:
    model = _one_layer(ia3, "linear", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()


def test_loading_over_a_merged_adapter_unmerges_it_first(llama: nn.Module, tmp_path: Path) -> None:
    model = ia3.get_peft_model(llama, ia3.IA3Config(init_ia3_weights=False))
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged before vectors are replaced"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    state = ia3.get_peft_model_state_dict(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged before vectors are replaced"):
        ia3.set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in state.items()})
    assert not any(layer.merged for _, layer in model.base_model.scaled_layers())


# --- merged, a model says what it cannot do ----------------------------------------------------------------------


def test_a_merged_weight_that_is_written_to_cannot_be_unmerged() -> None:
    model = _one_layer(ia3, "linear", False, adapters=2)
    state = _weights(model)
    model.merge_adapter()
    model.load_state_dict(state)
    before = _weights(model)
    for operation in (
        model.unmerge_adapter,
        lambda: model.swap_adapter("default", "a1"),
        lambda: model.merge_adapter(["a1"]),
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(ia3.IA3Error, match=r"the weight of 'layer' was written to while default was merged"):
            operation()
        _assert_unchanged(model, before)


def test_training_a_merged_model_says_what_is_wrong() -> None:
    model, x = _one_layer(ia3, "linear", False).train(), torch.randn(2, 4, requires_grad=True)
    model.merge_adapter()
    loss = model(x).square().sum()
    with pytest.raises(ia3.IA3Error, match="default is merged into the weights, where its vectors get no gradient"):
        loss.backward()
    model.eval()(x).sum().backward()  # whose gradient asks for inputs alone
    assert x.grad is not None
    with model.disable_adapter():
        model.train()(x).sum().backward()
    model.unmerge_adapter()
    model(x).sum().backward()
    assert model.get_base_model().layer.ia3_l["default"].grad is not None


def test_merging_while_disabled_is_refused() -> None:
    model = _one_layer(ia3, "linear", False, adapters=2)
    before = _weights(model)
    model.merge_adapter()
    merged = _weights(model)
    with model.disable_adapter():
        for operation in (
            lambda: model.merge_adapter(["a1"]),
            lambda: model.swap_adapter("default", "a1"),
            model.merge_and_unload,
        ):
            with pytest.raises(ia3.IA3Error, match=r"the adapters of 'layer' are disabled; leave"):
                operation()
            _assert_unchanged(model, before)
        with model.disable_adapter():
            _assert_unchanged(model, before)
        _assert_unchanged(model, before)
    _assert_unchanged(model, merged)
    with model.disable_adapter():
        model.unmerge_adapter()
    _assert_unchanged(model, before)
    assert not model.get_base_model().layer.merged


def test_weights_that_are_not_there_are_refused() -> None:
    model = _one_layer(ia3, "linear", False).to("meta")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ia3.IA3Error, match=r"cannot merge into 'layer', whose weight is on the meta device"):
            merge()


def test_merged_embeddings_are_not_saved(
    families: dict[str, Family], adapted: Callable[..., ia3.PeftModel], tmp_path: Path
) -> None:
    model = adapted(families["llama"], target_modules=["lm_head"], feedforward_modules=[])
    model.merge_adapter()
    with pytest.raises(ia3.IA3Error, match="default is merged into the embeddings, which were to be saved"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(tmp_path / "adapter")
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
