"""The bank: what is in it when, what it refuses, and that no traffic ever changes what a batch computes."""

from __future__ import annotations

import copy
import json
import pickle
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import ia3
from ia3 import AdapterBank, BankReport, IA3Error

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(llama: nn.Module) -> ia3.PeftModel:
    return ia3.get_peft_model(llama, ia3.IA3Config(task_type="CAUSAL_LM")).eval()


def vectors(model: ia3.PeftModel, seed: int) -> dict[str, Tensor]:
    """The tensors of an adapter of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: vector.shape for name, vector in ia3.get_peft_model_state_dict(model).items()}
    return {name: 1 + 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def expected(model: ia3.PeftModel, adapter: Mapping[str, Tensor]) -> Tensor:
    """The logits of IDS with this adapter, which the model itself carries for it."""
    ia3.set_peft_model_state_dict(model, dict(adapter))
    logits: Tensor = model(IDS).logits
    return logits


@torch.no_grad()
def computed(model: ia3.PeftModel, name: str) -> Tensor:
    logits: Tensor = model(IDS, adapter_names=[name] * len(IDS)).logits
    return logits


def facts(bank: AdapterBank) -> tuple[Any, ...]:
    """What a failed call must not have changed."""
    return list(bank), bank.report(), [matrix.clone() for matrix in bank._slots.matrices]


def unchanged(bank: AdapterBank, before: tuple[Any, ...]) -> bool:
    names, report, matrices = facts(bank)
    same = all(torch.equal(a, b) for a, b in zip(matrices, before[2], strict=True))
    return (names, report) == before[:2] and same


# --- loading ------------------------------------------------------------------------------------------------------


def test_folders_of_ours_and_of_peft_load_as_they_are(model: ia3.PeftModel, tmp_path: Path) -> None:
    ours, theirs = vectors(model, 1), vectors(model, 2)
    ia3.set_peft_model_state_dict(model, ours)
    model.save_pretrained(tmp_path / "ours")
    other = peft.get_peft_model(copy.deepcopy(model).unload(), peft.IA3Config(task_type="CAUSAL_LM"))
    peft.set_peft_model_state_dict(other, theirs)
    other.save_pretrained(tmp_path / "theirs")
    want = [expected(model, ours), expected(model, theirs)]
    with AdapterBank(model, 2) as bank:
        bank.load("ours", tmp_path / "ours")
        bank.load("theirs", str(tmp_path / "theirs"))
        assert "ours" in bank
        assert [*bank] == ["ours", "theirs"]
        assert torch.equal(computed(model, "ours"), want[0])
        assert torch.equal(computed(model, "theirs"), want[1])


def test_missing_vectors_are_ones_and_16_bits_are_widened(model: ia3.PeftModel) -> None:
    full = vectors(model, 1)
    some = {name: tensor.bfloat16() for name, tensor in full.items() if "down_proj" in name}
    with AdapterBank(model, 1) as bank:
        bank.load("full", full)
        bank.load("some", some)  # into the slot that held all of them
        want = {name: some[name].float() if name in some else torch.ones_like(full[name]) for name in full}
        assert torch.equal(computed(model, "some"), expected(model, want))


def test_layers_that_come_later_are_not_scaled_by_what_came_before(model: ia3.PeftModel) -> None:
    early, evicted = vectors(model, 1), vectors(model, 2)
    want = [expected(model, early), expected(model, evicted)]
    bank = AdapterBank(model, 1)
    bank.load("evicted", evicted)
    bank.load("early", early)
    config = ia3.IA3Config(target_modules=["o_proj"], feedforward_modules=[], init_ia3_weights=False)
    model.add_adapter("later", config)
    for name, logits in zip(("early", "evicted"), want, strict=True):
        torch.testing.assert_close(computed(model, name), logits, rtol=0, atol=0)
    bank.load("late", ia3.get_peft_model_state_dict(model, adapter_name="later"))
    model.set_adapter("later")
    # One formula, fused or not: the feed-forward blocks of "later" have no vector, those of the bank have ones.
    torch.testing.assert_close(computed(model, "late"), model(IDS).logits, rtol=0, atol=64 * 2**-23)


def _without(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.ia3_l"] = torch.ones(32, 1)


def _shape(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].reshape(-1)


def _dtype(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key] = tensors[key].int()


def _infinite(tensors: dict[str, Tensor]) -> None:
    list(tensors.values())[-1].view(-1)[3] = float("inf")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without, "holds no vectors"),
        (_extra, "q_proj.ia3_l', which the bank has no place for"),
        (_shape, r"of shape \[16\] and dtype torch.float32, and the bank takes floating-point vectors of shape"),
        (_dtype, "dtype torch.int32"),
        (_infinite, r"not finite in '.*layers.1"),
    ],
)
def test_an_adapter_that_does_not_fit_is_a_sentence(
    model: ia3.PeftModel, damage: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    bank = AdapterBank(model, 2)
    bank.load("good", vectors(model, 1))
    before, bad = facts(bank), vectors(model, 2)
    damage(bad)
    for options in ({"name": "bad"}, {"name": "good", "replace": True}):
        with pytest.raises(IA3Error, match=said):
            bank.load(source=bad, **options)
    assert unchanged(bank, before)


def test_other_mistakes_are_sentences(model: ia3.PeftModel, tmp_path: Path) -> None:
    bank = AdapterBank(model, 2)
    bank.load("good", vectors(model, 1))
    before = facts(bank)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for call, said in (
        (lambda: bank.load("good", vectors(model, 2)), "has an adapter 'good' already"),
        (lambda: bank.load("", vectors(model, 2)), "the adapter's name is ''"),
        (lambda: bank.load("__base__", vectors(model, 2)), "other than '__base__'"),
        (lambda: bank.load("lora", tmp_path / "lora"), "peft_type 'LORA'"),
        (lambda: bank.load("x", tmp_path), "no adapter_config.json"),
        (lambda: bank.load("x", 3), "source is a int"),  # type: ignore[arg-type]
        (lambda: bank.unload("god"), "no adapter 'god'; the bank has 'good'"),
        (lambda: bank.pin("nobody"), "no adapter 'nobody'"),
        (lambda: bank.unpin("nobody"), "no adapter 'nobody'"),
        (lambda: AdapterBank(model, 2), "has a bank already"),
        (lambda: AdapterBank(model.get_base_model(), 2), "model is a LlamaForCausalLM, whose layers do not tell"),  # type: ignore[arg-type]
        (lambda: AdapterBank(copy.deepcopy(model), 0), "capacity is 0"),
        (lambda: AdapterBank(copy.deepcopy(model), 2, host_limit=-1), "host_limit is -1"),
    ):
        with pytest.raises(IA3Error, match=said):
            call()
    assert unchanged(bank, before)


# --- slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_files", [False, True], ids=["host memory", "files"])
def test_evicted_adapters_come_back_as_they_were(model: ia3.PeftModel, tmp_path: Path, in_files: bool) -> None:
    adapters = {f"{seed}": vectors(model, seed) for seed in range(5)}
    want = {name: expected(model, adapter) for name, adapter in adapters.items()}
    bank = AdapterBank(model, 2, folder=tmp_path if in_files else None)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    for name in ("0", "3", "0", "4", "2", "1"):
        assert torch.equal(computed(model, name), want[name])
    size = 4 * sum(tensor.numel() for tensor in adapters["0"].values())
    files = len(list(tmp_path.rglob("evicted-*/*")))
    assert bank.report() == BankReport(
        capacity=2,
        resident=2,
        evicted=3,
        pinned=0,
        in_use=0,
        slot_bytes=2 * size,
        host_bytes=0 if in_files else 3 * size,
        file_bytes=files * size,
        hits=1,
        misses=5,
        evictions=3 + 5,
    )
    assert files == (5 if in_files else 0)
    bank.close()
    assert list(tmp_path.iterdir()) == []
    assert model.base_model.bank is None


def test_the_least_recently_used_leaves_and_the_pinned_stays(model: ia3.PeftModel) -> None:
    bank = AdapterBank(model, 3)
    for name in "abc":
        bank.load(name, vectors(model, ord(name)), pin=name == "a")
    computed(model, "b")
    bank.load("d", vectors(model, 4))

    def outside() -> set[str]:
        return {name for name, adapter in bank._adapters.items() if adapter.slot is None}

    assert outside() == {"c"}
    bank.pin("c")  # brings it back, in place of b
    assert outside() == {"b"}
    bank.pin("d")
    before = facts(bank)
    for call in (lambda: bank.load("e", vectors(model, 5)), lambda: bank.pin("b"), lambda: computed(model, "b")):
        with pytest.raises(IA3Error, match="no slot left: of its 3, 3 are pinned"):
            call()
    assert unchanged(bank, before)
    bank.unpin("a")
    assert torch.equal(computed(model, "b"), expected(model, vectors(model, ord("b"))))
    assert outside() == {"a"}


def test_a_batch_of_more_adapters_than_slots_is_a_sentence(model: ia3.PeftModel) -> None:
    bank = AdapterBank(model, 2)
    for name in "abc":
        bank.load(name, vectors(model, ord(name)))
    with pytest.raises(IA3Error, match="no slot left: of its 2, 0 are pinned and the others in use"):
        model(IDS, adapter_names=["a", "b", "c", "a"])
    assert bank.report().in_use == 0
    assert torch.equal(computed(model, "c"), expected(model, vectors(model, ord("c"))))


def test_what_a_running_batch_uses_stays_what_it_is(model: ia3.PeftModel) -> None:
    old, new = vectors(model, 1), vectors(model, 2)
    want = [expected(model, old), expected(model, new)]
    bank = AdapterBank(model, 2)
    bank.load("a", old)
    with torch.no_grad(), model.route(["a"] * len(IDS)):
        with pytest.raises(IA3Error, match="'a' is used by a running batch; unload it when"):
            bank.unload("a")
        with pytest.raises(IA3Error, match="'a' is used by a running batch; close the bank"):
            bank.close()
        bank.load("a", new, replace=True)
        assert bank.report().in_use == 0  # the new one is not; the old one is not listed any more
        bank.pin("a")
        with pytest.raises(IA3Error, match="no slot left"):
            bank.load("b", new)
        assert torch.equal(model(IDS).logits, want[0])
    bank.load("b", old)  # into the slot that the block has left
    assert torch.equal(computed(model, "a"), want[1])
    assert torch.equal(computed(model, "b"), want[0])


def test_an_assigned_route_lets_go_of_what_it_had(model: ia3.PeftModel) -> None:
    bank = AdapterBank(model, 3)
    for name in "abc":
        bank.load(name, vectors(model, ord(name)))
    with model.route(["a", "b"]) as route:
        route.assign(["b", "c"])
        assert bank.report().in_use == 2
        bank.unload("a")
        with pytest.raises(IA3Error, match="no adapter 'a'"):
            route.assign(["c", "a"])
        with pytest.raises(IA3Error, match="'b' is used by a running batch"):
            bank.unload("b")
    assert bank.report().in_use == 0


def test_host_memory_is_limited(model: ia3.PeftModel) -> None:
    size = 4 * sum(tensor.numel() for tensor in vectors(model, 0).values())
    bank = AdapterBank(model, 1, host_limit=size)
    for name in "ab":
        bank.load(name, vectors(model, 0))
    before = facts(bank)
    with pytest.raises(IA3Error, match=f"take {size} bytes of host memory, and {size} more are above host_limit"):
        bank.load("c", vectors(model, 0))
    assert unchanged(bank, before)
    bank.unload("a")
    bank.load("c", vectors(model, 0))


def test_a_lost_file_is_a_sentence(model: ia3.PeftModel, tmp_path: Path) -> None:
    bank = AdapterBank(model, 1, folder=tmp_path)
    for name in "ab":
        bank.load(name, vectors(model, 0))
    next(tmp_path.rglob("evicted-*/*")).unlink()
    before = facts(bank)
    with pytest.raises(IA3Error, match="cannot be read"):
        computed(model, "a")
    assert unchanged(bank, before)


def test_a_load_between_forward_and_backward_is_harmless(model: ia3.PeftModel) -> None:
    bank = AdapterBank(model, 2)
    bank.load("a", vectors(model, 1))
    embeds = torch.randn(2, 5, 32, requires_grad=True)
    loss = model(inputs_embeds=embeds, adapter_names=["a", "__base__"]).logits.square().mean()
    bank.load("b", vectors(model, 2))
    loss.backward()
    assert embeds.grad is not None


def test_a_copy_has_no_bank(model: ia3.PeftModel) -> None:
    with AdapterBank(model, 2) as bank:
        bank.load("a", vectors(model, 1))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.base_model.bank is None
            with pytest.raises(IA3Error, match="no adapter 'a'"):
                computed(twin, "a")


# --- traffic ------------------------------------------------------------------------------------------------------


def test_threads_that_load_unload_and_generate(
    model: ia3.PeftModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Eight threads over many more adapters than slots; every result is that of the request run alone.

    Some adapters are evicted to files and come back, some are replaced under their name by others.
    """
    adapters = [vectors(model, seed) for seed in range(20)]
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = []
    for adapter in adapters:
        ia3.set_peft_model_state_dict(model, adapter)
        alone.append([model.generate(IDS[row : row + 1], **settings)[0].tolist() for row in range(len(IDS))])
    with model.disable_adapter():
        base = [model.generate(IDS[row : row + 1], **settings)[0].tolist() for row in range(len(IDS))]
    assert len({str(result) for result in (*alone, base)}) > 10

    bank = AdapterBank(model, 17, folder=tmp_path)  # eight batches of two, and one to load
    for number in range(60):
        bank.load(f"shared {number}", adapters[number % 20])
    deadline = time.monotonic() + request.config.getoption("--stress-seconds")
    failures: list[BaseException] = []
    rounds = [0] * 8

    def work(thread: int) -> None:
        choose = random.Random(thread)
        try:
            while time.monotonic() < deadline and not failures:
                mine, shared, row = choose.randrange(20), choose.randrange(60), choose.randrange(len(IDS))
                # Some batches hold their slots for much longer than the others take to use all that are left.
                tokens = {"max_new_tokens": 60, "min_new_tokens": 60} if choose.random() < 0.1 else {}
                bank.load(f"of {thread}", adapters[mine], replace=True)
                names = [f"of {thread}", "__base__", f"shared {shared}"]
                ids = IDS[row].expand(3, -1)
                results = model.generate(
                    ids, attention_mask=torch.ones_like(ids), adapter_names=names, **settings | tokens
                )
                length = len(base[row])
                assert results[:, :length].tolist() == [alone[mine][row], base[row], alone[shared % 20][row]]
                if choose.random() < 0.5:
                    bank.unload(f"of {thread}")
                rounds[thread] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    report = bank.report()
    assert min(rounds) > 0
    assert report.evictions > 0
    assert report.misses > 0
    assert report.in_use == 0
    assert report.resident + len(bank._slots._free) == 17


# --- beside the model's own -----------------------------------------------------------------------------------------


def test_a_bank_is_made_of_a_base_model_and_a_configuration(families: dict[str, Any], model: ia3.PeftModel) -> None:
    family = families["llama"]
    bank = AdapterBank(family.build(), ia3.IA3Config(task_type="CAUSAL_LM"), 2)
    bank.load("one", vectors(model, 1))
    inputs = {name: tensor for name, tensor in family.inputs().items() if name == "input_ids"}
    with torch.no_grad():
        got = bank.model(**inputs, adapter_names=["one", "__base__"]).logits
        base = family.build()(**inputs).logits
    torch.testing.assert_close(got[1], base[1])
    assert not torch.allclose(got[0], base[0])
    with pytest.raises(IA3Error, match="capacity is None"):
        AdapterBank(family.build(), ia3.IA3Config(task_type="CAUSAL_LM"))


def test_adapters_of_the_model_and_of_its_bank_share_a_batch(families: dict[str, Any], model: ia3.PeftModel) -> None:
    family = families["llama"]
    bank = AdapterBank(model, 2)
    bank.load("one", vectors(model, 1))
    ids = family.inputs()["input_ids"]
    with torch.no_grad():
        alone = [model(input_ids=ids, adapter_names=[name] * 2).logits for name in ("default", "one")]
        before = bank.report()
        together = model(input_ids=ids, adapter_names=["default", "one"]).logits
        torch.testing.assert_close(together[0], alone[0][0])
        torch.testing.assert_close(together[1], alone[1][1])
        assert not torch.allclose(alone[0], alone[1])
        model.get_base_model().model.layers[0].mlp.down_proj.ia3_l["default"].mul_(2)  # as it is at each batch
        again = model(input_ids=ids, adapter_names=["default", "one"]).logits
    assert not torch.allclose(again[0], together[0])
    torch.testing.assert_close(again[1], together[1])
    assert (bank.report().resident, len(bank)) == (before.resident, 1)  # the slot was lent for the batch
    with pytest.raises(IA3Error, match="is trained, and gradients do not reach it"):
        model(input_ids=ids, adapter_names=["default", "one"])
