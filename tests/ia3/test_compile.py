"""torch.compile of whole models: one graph, the same numbers, and no second compilation when adapters switch."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import ia3
from ia3_kernels import formulas
from tests.ia3_kernels.helpers import needs_native

KINDS = ("ours", "accelerated")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Counter:
    """A backend that runs graphs in eager mode, and counts them; ``aot_eager`` traces their backward, too."""

    def __init__(self, backend: str = "eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.compile: Callable[..., Any] = lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return self.compile(graph, inputs)

    def __len__(self) -> int:
        return len(self.graphs)

    def operators(self) -> dict[str, int]:
        """The operators of ours in the last graph, and how often each stands there."""
        targets = (str(node.target) for node in self.graphs[-1].graph.nodes if node.op == "call_function")
        return dict(collections.Counter(target.split(".")[1] for target in targets if target.startswith("ia3.")))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(kind: str, base: nn.Module, names: tuple[str, ...] = ("first", "second", "third"), **config: Any) -> Any:
    """A model with adapters of one shape, whose vectors differ."""
    package: Any = ia3 if kind == "ours" else peft
    settings = {"task_type": "CAUSAL_LM", "init_ia3_weights": False} | config
    torch.manual_seed(4)
    model = package.get_peft_model(base, package.IA3Config(**settings), names[0])
    for name in names[1:]:
        model.add_adapter(name, package.IA3Config(**settings))
    return model if kind == "ours" else ia3.accelerate(model)


def run(call: Any, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradient of everything that got one."""
    model.zero_grad(set_to_none=True)
    result = call(**inputs, use_cache=False)
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": result.logits.detach().clone()} | gradients


def assert_same(compiled: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    assert compiled.keys() == eager.keys()
    for name, expected in eager.items():
        # One formula in two orders of rounding: sums of up to 64 terms in fp32.
        scale = float(expected.abs().max())
        torch.testing.assert_close(compiled[name], expected, rtol=0, atol=64 * 2**-24 * scale, msg=name)


def one_layer(family: Any, **changes: Any) -> nn.Module:
    """Tracing costs a second a layer, and one is as telling as two."""
    layers = "n_layer" if family.name == "gpt2" else "num_hidden_layers"
    return family.build(**{layers: 1}, **changes)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family_name", ["llama", "phi", "gpt2", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_one_graph_that_computes_what_eager_does(
    families: dict[str, Any], kind: str, family_name: str
) -> None:
    family = families[family_name]
    model = make(kind, one_layer(family), ("default",), **family.targets)
    model.get_base_model().loss_type = "ForCausalLM"  # where it is missing transformers warns, which breaks the graph
    backend = Counter("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = run(compiled, model, family.inputs())
    assert len(backend) == 1
    assert_same(results, run(model, model, family.inputs()))
    # The compiler sees the formula itself, which it may fuse with anything.
    assert backend.operators() == {}


@needs_native
@pytest.mark.parametrize("family_name", ["llama", "phi", "opt"])
def test_a_matmul_that_beats_the_compilers_stays_whole(
    families: dict[str, Any], family_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formulas, "_OPAQUE_MATMULS", frozenset({torch.bfloat16}))
    family = families[family_name]
    model = make("ours", one_layer(family), ("default",), **family.targets).bfloat16()
    model.get_base_model().loss_type = "ForCausalLM"
    backend = Counter("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = family.inputs()
    results, expected = run(compiled, model, inputs), run(model, model, inputs)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(results[name], value, rtol=0, atol=8 * 2**-8 * scale, msg=name)
    # Adapted or not: all of a layer's, and the head.
    assert backend.operators() == {"scaled_linear": {"llama": 8, "phi": 7, "opt": 7}[family_name]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_runs_without_this_package(families: dict[str, Any], kind: str) -> None:
    model = make(kind, one_layer(families["llama"]), ("default",)).eval()
    ids = families["llama"].inputs()["input_ids"]
    with torch.no_grad():
        exported = torch.export.export(model.get_base_model(), (), {"input_ids": ids, "use_cache": False})
        expected = model.get_base_model()(input_ids=ids, use_cache=False).logits
        logits = exported.module()(input_ids=ids, use_cache=False).logits
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert calls
    assert not [call for call in calls if call.startswith("ia3")]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_switching_adapters_does_not_compile_again(families: dict[str, Any], kind: str) -> None:
    """PEFT's outermost ``forward`` looks at the active adapter's name, so of its models the base model is compiled."""
    family = families["llama"]
    model = make(kind, one_layer(family))
    backend = Counter("aot_eager")
    compiled = torch.compile(model if kind == "ours" else model.get_base_model(), backend=backend, fullgraph=True)
    seen = []
    for name in ("first", "second", "third", "first"):
        model.set_adapter(name)
        results = run(compiled, model, family.inputs())
        trained = {parameter for parameter in results if parameter != "logits"}
        assert trained
        assert all(parameter.endswith(f"ia3_l.{name}") for parameter in trained)
        assert_same(results, run(model, model, family.inputs()))
        seen.append(results["logits"])
    assert len(backend) == 1
    assert torch.equal(seen[0], seen[3])
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_compiles_again_does_so_once(families: dict[str, Any], kind: str) -> None:
    """Disabling, and several adapters at once, are other computations; going back and forth is free."""
    family = families["llama"]
    base = one_layer(family)
    inputs = dict(family.inputs(), use_cache=False)
    expected = base(**inputs).logits
    model = make(kind, base)
    backend = Counter()
    compiled = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)
    activate = model.base_model.set_adapter

    activate(["first"])
    enabled = compiled(**inputs).logits
    assert len(backend) == 1
    for _ in range(2):
        with model.disable_adapter():
            torch.testing.assert_close(compiled(**inputs).logits, expected)
        assert torch.equal(compiled(**inputs).logits, enabled)
    assert len(backend) == 2
    for names in (["first", "second"], ["second", "third"], ["third", "first"]):
        activate(names)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert len(backend) == 3
    activate(["second"])
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert len(backend) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_compiles_once_at_most(families: dict[str, Any], kind: str) -> None:
    family = families["llama"]
    model = make(kind, one_layer(family), ("first",))
    backend = Counter()
    compiled = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)
    run(compiled, model, family.inputs())
    model.add_adapter("late", model.peft_config["first"])
    for name in ("late", "first", "late"):
        model.set_adapter(name)
        assert_same(run(compiled, model, family.inputs()), run(model, model, family.inputs()))
    assert len(backend) <= 2


def _assigned(model: Any, state: dict[str, Tensor]) -> Any:
    model.load_state_dict(state, assign=True)
    return model


def _emptied(model: Any, state: dict[str, Tensor]) -> Any:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu").load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


def _moved(model: Any, state: dict[str, Tensor]) -> Any:
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # new parameters rather than new .data
    try:
        model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with torch.no_grad():  # not load_state_dict, which would make the graphs look for parameters again
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model


def _copied(model: Any, state: dict[str, Tensor]) -> Any:
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("change", [_copied, _assigned, _emptied, _moved])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_runs_on_its_present_vectors(
    families: dict[str, Any], kind: str, change: Callable[[Any, dict[str, Tensor]], Any]
) -> None:
    family = families["llama"]
    model = make(kind, one_layer(family))
    compiled = torch.compile(model, backend=Counter(), fullgraph=True)
    old = run(compiled, model, family.inputs())
    state = {name: -tensor if "ia3_l" in name else tensor.clone() for name, tensor in model.state_dict().items()}
    change(model, state)
    new = run(compiled, model, family.inputs())
    assert not torch.allclose(new["logits"], old["logits"])
    assert_same(new, run(model, model, family.inputs()))
    model.set_adapter("second")
    assert_same(run(compiled, model, family.inputs()), run(model, model, family.inputs()))


@pytest.mark.parametrize("is_inside", [False, True], ids=["around the compiled model", "inside the compiled function"])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_given_vectors(families: dict[str, Any], kind: str, is_inside: bool) -> None:
    family = families["llama"]
    model = make(kind, one_layer(family), ("default",))
    inputs = dict(family.inputs(), use_cache=False)
    given = {name: -p.detach() for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.func.functional_call(model, given, kwargs=inputs).logits
    if is_inside:
        compiled = torch.compile(
            lambda vectors: torch.func.functional_call(model, vectors, kwargs=inputs).logits, backend=Counter()
        )
        torch.testing.assert_close(compiled(given), expected)
    else:
        around: Any = torch.compile(model, backend=Counter())
        around(**inputs)
        given = {f"_orig_mod.{name}": vector for name, vector in given.items()}
        torch.testing.assert_close(torch.func.functional_call(around, given, kwargs=inputs).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_compiled_model_compiles_for_itself(families: dict[str, Any], kind: str) -> None:
    family = families["llama"]
    model = make(kind, one_layer(family))
    compiled = torch.compile(model, backend=Counter(), fullgraph=True)
    expected = run(compiled, model, family.inputs())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "ia3_l" in name:
                parameter.neg_()
    results = run(torch.compile(twin, backend=Counter(), fullgraph=True), twin, family.inputs())
    assert_same(results, run(twin, twin, family.inputs()))
    assert not torch.allclose(results["logits"], expected["logits"])


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_compiles_and_saves_the_adapter(families: dict[str, Any], kind: str, tmp_path: Path) -> None:
    family = families["llama"]
    ids = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(7)).tolist()
    losses = []
    for is_compiled in (False, True):
        model = make(kind, one_layer(family), ("default",))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(is_compiled)),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            logging_steps=1,
            save_steps=3,
            torch_compile=is_compiled,
            torch_compile_backend="aot_eager" if is_compiled else None,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        names = {path.name for path in (tmp_path / str(is_compiled) / "checkpoint-3").iterdir()}
        assert "adapter_model.safetensors" in names
        assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert losses[0] == pytest.approx(losses[1], rel=64 * 2**-24)


def test_inductor_agrees(families: dict[str, Any]) -> None:
    """The real compiler, once. It compiles C++, which takes a while."""
    layer = make("ours", one_layer(families["llama"]), ("default",)).get_base_model().model.layers[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))

    def step(x: Tensor) -> Tensor:
        y: Tensor = layer.mlp(x).square().mean() + layer.self_attn.k_proj(x).square().mean()
        return y

    vectors = [layer.mlp.down_proj.ia3_l["default"], layer.self_attn.k_proj.ia3_l["default"]]
    eager, compiled = step(x), torch.compile(step, fullgraph=True)(x)
    names = ("loss", "down_proj", "k_proj")
    values = [dict(zip(names, (y.detach(), *torch.autograd.grad(y, vectors)), strict=True)) for y in (compiled, eager)]
    assert_same(*values)
