"""Whole models on the device that ``IA3_TEST_DEVICE`` names (default: cpu): a minute's worth of what users do.

``make gpu-check`` runs it on a GPU. Everything else that is known of this package is tested on the CPU, with the same
models; here it is what another device could break, so each test goes all the way down to its kernels.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ia3
from ia3_kernels import backends, target

from .conftest import FAMILIES, MORE_FAMILIES, Family, perturb

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

DEVICE = torch.device(os.environ.get("IA3_TEST_DEVICE", "cpu"))
DTYPES = [torch.float32, torch.bfloat16]
_NAMES = ("llama", "mistral", "qwen2", "gemma", "phi", "gpt2", "opt", "t5", "t5_gated", "bert")
SOME = [family for family in FAMILIES + MORE_FAMILIES if family.name in _NAMES]
LLAMA = next(family for family in SOME if family.name == "llama")
MIX = ["first", "second", "__base__", "second"]


def _inputs(family: Family = LLAMA) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in family.inputs().items()}


def _peft(family: Family, dtype: torch.dtype, **changes: Any) -> Any:
    base = family.build(**changes).to(DEVICE, dtype)
    model = peft.get_peft_model(base, peft.IA3Config(task_type=family.task, **family.targets)).eval()
    perturb(model.cpu())
    return model.to(DEVICE)


def _make(kind: str, family: Family = LLAMA, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with vectors far from ones, the same ones whoever made it: ``ours``, ``accelerated`` or ``peft``."""
    theirs = _peft(family, dtype, **changes)
    if kind != "ours":
        return ia3.accelerate(theirs) if kind == "accelerated" else theirs
    config = ia3.IA3Config(task_type=family.task, **family.targets)
    model = ia3.get_peft_model(family.build(**changes).to(DEVICE, dtype), config)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def _run(call: Any, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradient of everything that got one."""
    model.zero_grad(set_to_none=True)
    result = call(**inputs)
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": result.logits.detach().clone()} | gradients


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """One formula in two orders of rounding: sums of up to 64 terms in fp32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = 64 * 2**-24 * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=limit, msg=lambda text, n=name: f"{n}: {text}")


def _named(names: tuple[str, ...] = ("first", "second", "third")) -> ia3.IA3Model:
    """A small Llama with several adapters whose vectors differ."""
    config = ia3.IA3Config(task_type=LLAMA.task, init_ia3_weights=False)
    torch.manual_seed(4)
    model = ia3.get_peft_model(LLAMA.build(), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.to(DEVICE).eval()


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("of", SOME, ids=lambda family: family.name)
@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_models_are_as_exact_as_those_of_peft(kind: str, of: Family, dtype: torch.dtype) -> None:
    inputs = _inputs(of)
    theirs = _peft(of, dtype)
    oracle = copy.deepcopy(theirs).double()
    expected, true = _run(theirs, theirs, inputs), _run(oracle, oracle, inputs)
    model = _make(kind, of, dtype)
    found = _run(model, model, inputs)
    assert found.keys() == expected.keys() == true.keys()
    # PEFT's own distance from fp64 is what rounding does to this model; twice that allows for another order.
    for name, value in true.items():
        allowed = 2 * float((expected[name].double() - value).norm()) + torch.finfo(dtype).eps * float(value.norm())
        assert float((found[name].double() - value).norm()) <= allowed + 1e-9, name
    again = _run(model, model, inputs)
    assert all(torch.equal(again[name], value) for name, value in found.items()), "two runs differ"


@pytest.mark.parametrize("backend", [status.name for status in backends.report() if status.available])
def test_a_backend_that_is_asked_for_runs_a_whole_model(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend in ("native", "triton", "cuda") and (backend == "native") != (DEVICE.type == "cpu"):
        pytest.skip(f"{backend} runs on another device")
    expected = _make("peft")
    monkeypatch.setenv(target.BACKEND_VARIABLE, backend)
    backends.refresh()
    try:
        model = _make("ours")
        _assert_close(_run(model, model, _inputs()), _run(expected, expected, _inputs()))
        model.merge_adapter()
        model.unmerge_adapter()
    finally:
        monkeypatch.undo()
        backends.refresh()


# --- several adapters ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("where", ["own", "bank"])
def test_each_row_of_a_mixed_batch_is_what_it_is_alone(where: str) -> None:
    model = _named()
    ids = torch.randint(3, 64, (len(MIX), 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    alone = []
    for row, name in enumerate(MIX):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(input_ids=ids[row : row + 1]).logits)
        else:
            model.set_adapter(name)
            alone.append(model(input_ids=ids[row : row + 1]).logits)
    names = MIX
    if where == "bank":
        bank = ia3.AdapterBank(model, 4)
        for name in ("first", "second"):
            bank.load(f"bank/{name}", ia3.get_peft_model_state_dict(model, adapter_name=name))
        names = [name if name == "__base__" else f"bank/{name}" for name in MIX]
    mixed = model(input_ids=ids, adapter_names=names).logits
    _assert_close({"logits": mixed}, {"logits": torch.cat(alone)})
    assert not torch.allclose(mixed[0], model(input_ids=ids, adapter_names=names[1:] + names[:1]).logits[0])


@torch.no_grad()
def test_captured_decoding_runs_the_adapters_that_are_assigned() -> None:
    """A graph that was captured with one mix decodes with others; on a CPU the same loop without a graph.

    The names of each call, without a route or a graph, say what it should have computed.
    """
    model = _named()
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mixes = [["first", "second", "__base__"], ["third", "__base__", "first"], ["second"] * 3, ["third"] * 3]

    def decoder() -> Callable[..., Tensor]:
        cache = transformers.StaticCache(model.config, max_cache_len=16)

        def forward(tokens: Tensor, **names: Any) -> Tensor:
            arguments = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1, **names}
            logits: Tensor = model(input_ids=tokens, **arguments).logits
            return logits

        return forward

    tokens = [ids[:, number : number + 1] for number in range(len(mixes))]
    forward = decoder()
    for prompt in (ids, tokens[0]):
        forward(prompt, adapter_names=mixes[0])
    expected = [forward(token, adapter_names=mix) for token, mix in zip(tokens, mixes, strict=True)]

    forward, token, found = decoder(), tokens[0].clone(), []
    with model.route(mixes[0]) as route:
        for prompt in (ids, token):  # compiles and chooses, which a capture must not
            forward(prompt)
        step = _captured(lambda: forward(token)) if DEVICE.type == "cuda" else lambda: forward(token)
        for mix, new in zip(mixes, tokens, strict=True):
            route.assign(mix)
            token.copy_(new)
            found.append(step().clone())
    for number, (logits, others) in enumerate(zip(found, expected, strict=True)):
        _assert_close({f"step {number}": logits}, {f"step {number}": others})
    assert not torch.allclose(expected[-1], forward(tokens[-1], adapter_names=mixes[0]), rtol=1e-2)


def _captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# --- merging ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_merging_computes_the_same_and_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    model = _make("ours", dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    apart = model(**_inputs()).logits
    generator = torch.Generator().manual_seed(6)
    for cycle in range(100):
        model.merge_adapter()
        if cycle == 0:
            merged = model(**_inputs()).logits
            # Weights of up to 48 terms a sum, each rounded once more, through two layers
            limit = 48**0.5 * torch.finfo(dtype).eps * float(apart.abs().max())
            torch.testing.assert_close(merged, apart, rtol=0, atol=limit)
        for vector in vectors:  # as an optimizer does, while the old ones are in the weights
            noise = torch.randn(vector.shape, generator=generator).to(DEVICE)
            vector.add_(0.1 * noise)
        model.unmerge_adapter()
    after = model.state_dict()
    for name, value in before.items():
        assert "ia3_l" in name or torch.equal(after[name], value), name


@torch.no_grad()
def test_an_inexact_merge_is_one_rounding_of_each_weight() -> None:
    model = _make("ours", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(exact=False)
    merged = {name: value for name, value in model.state_dict().items() if name.endswith("base_layer.weight")}
    assert len(merged) == 3 * 2  # of each layer k_proj, v_proj and down_proj
    for name, value in merged.items():
        vector = before[name.replace("base_layer.weight", "ia3_l.default")]
        assert torch.equal(value, (before[name].float() * vector).bfloat16()), name
        assert not torch.equal(value, before[name]), name


# --- around it ----------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_one_graph_that_computes_the_same() -> None:
    model = _make("ours", num_hidden_layers=1)
    model.get_base_model().loss_type = "ForCausalLM"  # where it is missing transformers warns, which breaks the graph
    inputs = _inputs() | {"use_cache": False}
    expected = _run(model, model, inputs)
    torch.compiler.reset()
    # The compiler's own code is the CPU tests' business, and takes a minute there.
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    _assert_close(_run(compiled, model, inputs), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_trainer_goes_where_peft_goes(kind: str, tmp_path: Path) -> None:
    rows = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(7)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trained(which: str) -> dict[str, Tensor]:
        model = _make(which).train()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / which),
            use_cpu=DEVICE.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.5,
            optim="sgd",  # whose step is in proportion to the gradient, not to its sign
            save_strategy="no",
            seed=11,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    before = {name: p for name, p in _make("peft").named_parameters() if p.requires_grad}
    expected, found = trained("peft"), trained(kind)
    assert found.keys() == expected.keys() == before.keys()
    for name, value in expected.items():
        moved = float((value - before[name]).norm())
        assert moved > 0, name
        assert float((found[name] - value).norm()) <= 1e-3 * moved, name
