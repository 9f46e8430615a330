"""Batches whose rows name their adapters: each row is what it is alone, whoever else is in the batch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import ia3
from ia3 import IA3Error
from ia3.serving.mixed import BASE_NAME

from .test_compile import Counter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

OWN = ("first", "second", "third")
MIX = ["second", BASE_NAME, "first", "second"]


def adapted(family: Any, names: Sequence[str] = OWN, **changes: Any) -> ia3.PeftModel:
    """A model with adapters whose vectors differ."""
    config = ia3.IA3Config(task_type=family.task, init_ia3_weights=False, **family.targets)
    torch.manual_seed(4)
    model = ia3.get_peft_model(family.build(**changes), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def banked(model: ia3.PeftModel, capacity: int = 8) -> ia3.AdapterBank:
    """A bank with the model's own adapters, by names of its own."""
    bank = ia3.AdapterBank(model, capacity)
    for name in model.peft_config:
        bank.load(f"bank/{name}", ia3.get_peft_model_state_dict(model, adapter_name=name))
    return bank


def in_bank(names: Sequence[str]) -> list[str]:
    return [name if name == BASE_NAME else f"bank/{name}" for name in names]


def alone(model: ia3.PeftModel, name: str, call: Callable[..., Any], **inputs: Any) -> Any:
    """What a call gives with one adapter active, or with none."""
    if name == BASE_NAME:
        with model.disable_adapter():
            return call(**inputs)
    model.set_adapter(name)
    return call(**inputs)


def assert_close(a: Tensor, b: Tensor) -> None:
    """Within the rounding of fp32 sums of up to 64 terms, over the layers of a tiny model."""
    torch.testing.assert_close(a, b, rtol=0, atol=64 * 2**-23 * float(b.abs().max()))


@pytest.fixture(params=["own", "bank"])
def named(request: pytest.FixtureRequest) -> Callable[[ia3.PeftModel, Sequence[str]], list[str]]:
    """The adapters of a mix as the model's own, or out of a bank."""

    def names(model: ia3.PeftModel, mix: Sequence[str]) -> list[str]:
        if request.param == "own":
            return list(mix)
        if model.base_model.bank is None:
            banked(model)
        return in_bank(mix)

    return names


# --- forward ------------------------------------------------------------------------------------------------------


def _batch(family: Any, rows: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (rows, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


@torch.no_grad()
def test_each_row_is_what_it_is_alone(any_family: Any, named: Callable[..., list[str]]) -> None:
    model = adapted(any_family)
    inputs = _batch(any_family, len(MIX))
    if any_family.task in ("SEQ_CLS", "TOKEN_CLS"):
        with pytest.raises(IA3Error, match=r"'classifier' whole, which cannot differ|'base_model.model.classifier"):
            model(**inputs, adapter_names=named(model, MIX))
        return
    mixed = model(**inputs, adapter_names=named(model, MIX)).logits
    for row, name in enumerate(MIX):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert_close(mixed[row : row + 1], alone(model, name, model, **one).logits)
    assert not torch.allclose(mixed[0], mixed[2])


@torch.no_grad()
@pytest.mark.parametrize("mix", [["second"] * 3, [BASE_NAME] * 3], ids=["one adapter", "base"])
def test_rows_of_one_kind_take_the_plain_path(
    families: dict[str, Any], named: Callable[..., list[str]], mix: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No index reaches the operators, which is bit for bit what the active adapter computes."""
    model = adapted(families["llama"])
    inputs = _batch(families["llama"], 3)
    expected = alone(model, mix[0], model, **inputs).logits
    model.set_adapter("third")
    assert torch.equal(model(**inputs, adapter_names=named(model, mix)).logits, expected)


@torch.no_grad()
def test_convolutions_and_flattened_rows(named: Callable[..., list[str]]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in, self.conv_out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.flat, self.pooled = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv_out(self.conv_in(x)).flatten(2).transpose(1, 2)  # [N, positions, 4]
            y: Tensor = self.flat(x.reshape(-1, 4)).unflatten(0, x.shape[:2])
            return self.pooled(y.mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    config = ia3.IA3Config(
        target_modules=["conv_in", "conv_out", "flat", "pooled"],
        feedforward_modules=["conv_out", "pooled"],
        init_ia3_weights=False,
    )
    model = ia3.get_peft_model(Net(), config, "first")
    model.add_adapter("second", config)
    x = torch.randn(4, 3, 6, 6)
    mixed = model(x, adapter_names=named(model, MIX))
    for row, name in enumerate(MIX):
        assert_close(mixed[row : row + 1], alone(model, name, lambda x: model(x), x=x[row : row + 1]))


def test_an_adapter_without_a_vector_scales_by_ones(families: dict[str, Any]) -> None:
    family = families["llama"]
    model = adapted(family, ("first",))
    model.add_adapter(
        "narrow", ia3.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    )
    bank = banked(model)
    inputs = _batch(family, 2)
    for names in (["narrow", "first"], ["bank/narrow", "bank/first"]):
        mixed = model(**inputs, adapter_names=names).logits
        model.set_adapter("narrow")
        assert_close(mixed[:1], model(input_ids=inputs["input_ids"][:1]).logits)
    assert len(bank) == 2


# --- training -----------------------------------------------------------------------------------------------------


def test_gradients_reach_the_adapters_of_the_rows_and_no_others(families: dict[str, Any]) -> None:
    family = families["llama"]
    model = adapted(family)
    model.train()
    model.set_requires_grad(list(OWN))
    ids = _batch(family, 3)["input_ids"]

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    model(input_ids=ids, labels=ids, adapter_names=["second", BASE_NAME, "first"]).loss.backward()
    together = gradients()
    expected: dict[str, Tensor] = {}
    for row, name in ((0, "second"), (2, "first")):
        model.set_adapter(name)
        (model(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss / 3).backward()
        expected |= gradients()
    assert together.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(together[name], gradient)
    assert not any(name.endswith("third") for name in together)


def test_the_same_mixed_step_gives_the_same_bits(families: dict[str, Any]) -> None:
    model = adapted(families["llama"])
    model.set_requires_grad(list(OWN))
    ids = _batch(families["llama"], 4)["input_ids"]
    runs = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, adapter_names=MIX).loss.backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- generate -----------------------------------------------------------------------------------------------------

DECODING = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "returned beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize(
    ("family_name", "decoding"),
    [*(("llama", decoding) for decoding in DECODING), ("t5", "greedy"), ("t5", "beams"), ("gpt2", "greedy")],
)
def test_generated_rows_are_those_of_their_adapter(
    families: dict[str, Any], named: Callable[..., list[str]], family_name: str, decoding: str
) -> None:
    family = families[family_name]
    model = adapted(family)
    inputs = {key: value for key, value in _batch(family, len(MIX)).items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **DECODING[decoding]}
    copies = settings.get("num_return_sequences", 1)
    mixed = model.generate(**inputs, **settings, adapter_names=named(model, MIX))
    for row, name in enumerate(MIX):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = alone(model, name, model.generate, **one, **settings)
        assert mixed[row * copies : (row + 1) * copies].tolist() == expected.tolist()


def test_sampled_copies_take_their_prompts_adapter(families: dict[str, Any]) -> None:
    """An adapter that leaves one token possible, beside the base model, which is random."""
    model = adapted(families["llama"])
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    ids = _batch(families["llama"], 2)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    torch.manual_seed(0)
    mixed = model.generate(**inputs, **settings, adapter_names=["second", "second"])
    model.set_adapter("second")
    torch.manual_seed(0)
    assert mixed.tolist() == model.generate(**inputs, **settings).tolist()
    configured = copy.deepcopy(model.generation_config)
    configured.update(num_return_sequences=3, max_new_tokens=4, do_sample=True, pad_token_id=0)
    assert model.generate(ids, configured, adapter_names=["second", BASE_NAME]).shape[0] == 6


def test_a_route_is_assigned_in_place(families: dict[str, Any], named: Callable[..., list[str]]) -> None:
    model = adapted(families["llama"])
    inputs = _batch(families["llama"], 2)
    mixes = [["first", "second"], ["second", "third"], [BASE_NAME, "first"], ["first", "first"]]
    with torch.no_grad():
        expected = [model(**inputs, adapter_names=named(model, mix)).logits for mix in mixes]
        with model.route(named(model, mixes[0])) as route:
            index, memory = route.index, route.index.data_ptr()
            for mix, logits in zip(mixes, expected, strict=True):
                route.assign(named(model, mix))
                assert torch.equal(model(**inputs).logits, logits)
            assert route.index is index
            assert index.data_ptr() == memory
            with pytest.raises(IA3Error, match="has 3 names, and this route is for 2"):
                route.assign(named(model, ["first"] * 3))
            assert torch.equal(model(**inputs).logits, expected[-1])
    with pytest.raises(IA3Error, match="not entered"):
        route.assign(named(model, mixes[0]))


@pytest.mark.parametrize("beams", [1, 2])
def test_accelerated_models_of_peft_take_names(families: dict[str, Any], beams: int) -> None:
    """Which PEFT itself ignores for IA3."""
    family = families["llama"]
    config = peft.IA3Config(task_type=family.task, init_ia3_weights=False)
    model = peft.get_peft_model(family.build(), config, OWN[0])
    for name in OWN[1:]:
        model.add_adapter(name, config)
    ia3.accelerate(model).eval()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    inputs = _batch(family, len(MIX))
    logits = model(**inputs, adapter_names=MIX).logits
    tokens = model.generate(**inputs, **settings, adapter_names=MIX)
    for row, name in enumerate(MIX):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert_close(logits[row : row + 1], alone(model, name, model, **one).logits)
        assert tokens[row].tolist() == alone(model, name, model.generate, **one, **settings)[0].tolist()
    with pytest.raises(IA3Error, match="has 1 name, and the batch has 4 sequences"):
        model(**inputs, adapter_names=["first"])


def test_an_assistant_model_keeps_its_own_adapter(families: dict[str, Any]) -> None:
    """A route is for one model: another one that runs inside it is not touched."""
    model, other = adapted(families["llama"]), adapted(families["llama"])
    inputs = _batch(families["llama"], 2)
    with torch.no_grad():
        expected = other(**inputs).logits
        with model.route(["second", "third"]):
            assert torch.equal(other(**inputs).logits, expected)
            with other.route(["first", BASE_NAME]):
                mixed = model(**inputs).logits
        assert torch.equal(mixed, model(**inputs, adapter_names=["second", "third"]).logits)


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("what", ["the model", "its base model"])
def test_another_mix_does_not_compile_again(
    families: dict[str, Any], named: Callable[..., list[str]], what: str
) -> None:
    model = adapted(families["llama"], num_hidden_layers=1)
    mixes = [MIX, ["third"] * 4, [BASE_NAME] * 4, ["first", "second", "third", BASE_NAME], MIX]
    inputs = {**_batch(families["llama"], 4), "use_cache": False}
    with torch.no_grad():
        expected = [model(**inputs, adapter_names=named(model, mix)).logits for mix in mixes]
        backend = Counter()
        if what == "the model":
            compiled: Any = torch.compile(model, backend=backend)
        else:
            model.get_base_model().compile(backend=backend, fullgraph=True)
            compiled = model
        for mix, logits in zip(mixes, expected, strict=True):
            assert_close(compiled(**inputs, adapter_names=named(model, mix)).logits, logits)
        assert len(backend) == 1
        assert backend.operators() == {}
        model.set_adapter("first")
        assert_close(compiled(**inputs).logits, model.get_base_model().forward(**inputs).logits)
        assert len(backend) == 2  # without names it is another computation
        assert_close(compiled(**inputs, adapter_names=named(model, MIX)).logits, expected[0])
        assert len(backend) == 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_step_trains_every_mix(families: dict[str, Any]) -> None:
    model = adapted(families["llama"], num_hidden_layers=1)
    model.get_base_model().loss_type = "ForCausalLM"
    model.set_requires_grad(list(OWN))
    twin = copy.deepcopy(model)
    backend = Counter("aot_eager")
    model.get_base_model().compile(backend=backend, fullgraph=True)
    ids = _batch(families["llama"], 3)["input_ids"]
    for mix in (["first", "second", "first"], ["third", BASE_NAME, "third"]):
        for each in (model, twin):
            each.zero_grad(set_to_none=True)
            each(input_ids=ids, labels=ids, use_cache=False, adapter_names=mix).loss.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None and p.grad is not None:
                assert_close(p.grad, q.grad)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_graph_runs_each_threads_own_mix(families: dict[str, Any]) -> None:
    """The first thread compiles without names, the second with: neither may get the other's graph."""
    model = adapted(families["llama"], num_hidden_layers=1)
    inputs = {**_batch(families["llama"], 2), "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).logits
        mixed = {name: model(**inputs, adapter_names=[name, BASE_NAME]).logits for name in OWN}
    model.get_base_model().compile(backend=Counter(), fullgraph=True)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with torch.no_grad():
                for _ in range(2):
                    assert_close(model(**inputs).logits, plain)
                    assert_close(model(**inputs, adapter_names=[name, BASE_NAME]).logits, mixed[name])
        except BaseException as error:
            failures.append(error)

    for name in OWN:  # one after the other: Dynamo compiles under a lock of its own anyway
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        thread.join()
    assert not failures, failures


# --- what is refused ----------------------------------------------------------------------------------------------


def _merge(model: ia3.PeftModel) -> None:
    model.merge_adapter()


def _disable(model: ia3.PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def _several(model: ia3.PeftModel) -> None:
    model.set_adapter(["first", "second"])


def _checkpoint(model: ia3.PeftModel) -> None:
    model.train()
    model.get_base_model().gradient_checkpointing_enable()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["first"], r"has 1 name, and the batch has 2 sequences"),
        (["first"] * 3, r"has 3 names, and the batch has 2 sequences"),
        (["first", "secnd"], r"no adapter 'secnd'; the model has 'second'"),
        ("first", r"adapter_names is 'first'; expected a list"),
        (["first", None], r"expected a list"),
        ([], r"adapter_names is empty"),
    ],
)
def test_wrong_names_are_a_sentence(
    families: dict[str, Any], snapshot: Callable[[nn.Module], Any], names: Any, said: str
) -> None:
    model = adapted(families["llama"])
    inputs = _batch(families["llama"], 2)
    before = snapshot(model)
    for call in (model, model.generate):
        with pytest.raises(IA3Error, match=said):
            call(**inputs, adapter_names=names)
    assert snapshot(model) == before
    assert model(**inputs, adapter_names=["first", "second"]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_merge, r"have first merged into their weights; unmerge_adapter first"),
        (_disable, r"adapters are disabled"),
        (_several, r"first, second are active together"),
        (_checkpoint, r"gradient checkpointing computes the layers again"),
    ],
)
def test_states_that_rows_cannot_choose_in_are_a_sentence(
    families: dict[str, Any], change: Callable[[ia3.PeftModel], None], said: str
) -> None:
    model = adapted(families["llama"])
    change(model)
    with pytest.raises(IA3Error, match=said):
        model(**_batch(families["llama"], 2), adapter_names=["first", "second"])


def test_experts_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    model = ia3.get_peft_model(Experts(), ia3.IA3Config(target_modules=r"experts\.0", feedforward_modules=[]), "first")
    with pytest.raises(IA3Error, match=r"'experts.0' is part of an expert"), model.route(["first"]):
        pass


def test_rows_that_no_name_fits_are_refused_in_the_layer(families: dict[str, Any]) -> None:
    model = adapted(families["llama"])
    ids = _batch(families["llama"], 4)["input_ids"]
    with pytest.raises(IA3Error, match=r"batch shape \[4, 7\].*by the 3 adapter_names"), model.route(MIX[:3]):
        model(input_ids=ids)
    with pytest.raises(IA3Error, match="the model with its bank has"), banked(model):
        model(input_ids=ids, adapter_names=["nobody"] * 4)
    banked(model)
    with pytest.raises(IA3Error, match="'paged', which runs in a thread of its own"):
        model.generate(input_ids=ids, adapter_names=MIX, cache_implementation="paged")
