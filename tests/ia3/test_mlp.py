"""Fused feed-forward blocks: which are, what they compute, and when they step aside."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import activations

import ia3
from ia3.mlp import ROWS, activation_name, fused_forward, patch_of, row_of, unfuse
from tests.ia3_kernels.helpers import needs_native

UNFUSED = {"opt"}  # its feed-forward lies open in the decoder layer


def _patched(model: nn.Module) -> list[nn.Module]:
    return [block for block in model.modules() if patch_of(block) is not None]


def test_every_family_runs_fused(family: Any, adapted: Callable[..., ia3.PeftModel]) -> None:
    blocks = _patched(adapted(family))
    layers = 4 if family.name.startswith("t5") else 2
    assert len(blocks) == (0 if family.name in UNFUSED else layers)


def test_every_row_is_exercised(adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]) -> None:
    used = {block_row.family for f in families.values() for b in _patched(adapted(f)) if (block_row := patch_of(b))}
    assert used == {row.family for row in ROWS} - {"GPT-J"}  # GPT-J is GPT-2 under other names


def test_gptj_runs_fused() -> None:
    import transformers

    config = transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=64)
    model = ia3.get_peft_model(transformers.GPTJForCausalLM(config), ia3.IA3Config())
    assert [row.family for block in _patched(model) if (row := patch_of(block))] == ["GPT-J"]


def test_dropout_falls_between_the_activation_and_the_projection(
    adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]
) -> None:
    for name in ("t5", "t5_gated", "gpt2", "bert"):
        model = adapted(families[name]).train()
        inputs = families[name].inputs()
        torch.manual_seed(2)
        fused = model(**inputs).logits
        unfuse(model)
        torch.manual_seed(2)
        torch.testing.assert_close(fused, model(**inputs).logits)


def test_t5_keeps_its_cast(adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]) -> None:
    model = adapted(families["t5_gated"], torch.bfloat16)
    for block in _patched(model):
        block.wo.base_layer.float()
    block = _patched(model)[0]
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    y = block(x)
    unfuse(model)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, block(x), rtol=2e-2, atol=2e-2)


def _in_bert(model: ia3.PeftModel) -> nn.Module:
    return model.get_base_model().bert.encoder.layer[0]


@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("llama", "act_fn"),
        ("llama", "down_proj"),
        ("llama", "gate_proj"),
        ("llama", "up_proj"),
        ("llama", "down_proj.base_layer"),
        ("bert", "intermediate"),
        ("bert", "output"),
        ("bert", "output.dropout"),
        ("bert", "intermediate.dense"),
        ("gpt2", "dropout"),
    ],
)
def test_no_hook_is_skipped(
    adapted: Callable[..., ia3.PeftModel], families: dict[str, Any], name: str, child: str
) -> None:
    model = adapted(families[name])
    expected = model(**families[name].inputs()).logits
    calls: list[str] = []
    for kind in ("register_forward_hook", "register_forward_pre_hook"):
        getattr(_patched(model)[0].get_submodule(child), kind)(lambda *_: calls.append(child))
    torch.testing.assert_close(model(**families[name].inputs()).logits, expected)
    assert len(calls) == 2


def test_a_global_hook_sees_every_module(adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]) -> None:
    model = adapted(families["llama"])
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(**families["llama"].inputs())
    finally:
        handle.remove()
    block = _patched(model)[0]
    children = [child for child in block.modules() if not isinstance(child, nn.ParameterDict)]
    assert all(any(module is child for module in seen) for child in children)


def test_a_forward_that_is_not_the_tables_is_left_alone(families: dict[str, Any]) -> None:
    class Clipped(nn.Module):
        """The children of a Llama block, another formula."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1, 1))

    assert row_of(Clipped()) is None
    model = families["llama"].build()
    block = model.model.layers[0].mlp
    block.forward = functools.partial(type(block).forward, block)  # as another library's patch would be
    adapted = ia3.get_peft_model(model, ia3.IA3Config())
    assert _patched(adapted) == [model.model.layers[1].mlp]
    assert "another library" in str(ia3.report(adapted))


def test_an_unknown_activation_is_not_fused(families: dict[str, Any]) -> None:
    model = ia3.get_peft_model(families["llama"].build(hidden_act="mish"), ia3.IA3Config())
    assert _patched(model) == []
    assert "MishActivation has no kernel" in str(ia3.report(model))


@pytest.mark.parametrize("name", sorted(activations.ACT2CLS))
def test_activation_names_mean_what_transformers_computes(name: str) -> None:
    module = activations.ACT2FN[name]
    ours = activation_name(module)
    if ours is None:
        return
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    from ia3_kernels import scaled_activation

    # FastGELU writes its constant with ten digits.
    torch.testing.assert_close(scaled_activation(x, None, ours), module(x), rtol=1e-7, atol=1e-9)


def test_activation_functions_and_torch_modules_are_known() -> None:
    assert activation_name(nn.functional.gelu) == "gelu"
    assert activation_name(torch.relu) == "relu"
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU("tanh")) == "gelu_tanh"
    assert activation_name(nn.Tanh()) is None
    assert activation_name("gelu") is None
    known = {name for name in activations.ACT2CLS if activation_name(activations.ACT2FN[name])}
    assert known >= {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "linear"}


def test_patches_survive_copies_and_are_taken_back(
    adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]
) -> None:
    for name in ("llama", "bert"):
        model = adapted(families[name])
        inputs = families[name].inputs()
        expected = model(**inputs).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            blocks = _patched(twin)
            assert len(blocks) == 2
            for block in blocks:
                method = block.__dict__[patch_of(block).method]  # type: ignore[union-attr]
                assert method.func is fused_forward
                assert method.args[0] is block
            assert torch.equal(twin(**inputs).logits, expected)
            with torch.no_grad():  # the copy runs on its own vectors
                for parameter in (p for n, p in twin.named_parameters() if "ia3_l" in n):
                    parameter.fill_(1.0)
            assert not torch.equal(twin(**inputs).logits, expected)
            assert torch.equal(model(**inputs).logits, expected)
        unfuse(model)
        assert _patched(model) == []
        torch.testing.assert_close(model(**inputs).logits, expected)


# --- the block as one node ------------------------------------------------------------------------------------------

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Name -> target modules, those scaled on their inputs, and the nodes of the block's own
LAYOUTS = {
    "down": (["k_proj", "v_proj", "down_proj"], ["down_proj"], {"GatedMlp"}),
    "inputs of all three": (
        [*_ATTENTION, "gate_proj", "up_proj", "down_proj"],
        ["gate_proj", "up_proj", "down_proj"],
        {"GatedMlp"},
    ),
    "input of up": (["up_proj", "down_proj"], ["up_proj", "down_proj"], {"ScaledLinear", "GatedActivation"}),
    "output of up": (["up_proj", "down_proj"], ["down_proj"], {"GatedMlp"}),
    "every output": (
        [*_ATTENTION, "gate_proj", "up_proj", "down_proj"],
        ["down_proj"],
        {"ScaledLinear", "GatedActivation"},
    ),
}


def _nodes(y: Tensor, until: Tensor) -> set[str]:
    """The names of the nodes of this package between a block's output and its input."""
    found, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node is until.grad_fn:
            continue
        found.add(node.name().rsplit("::", 1)[-1].rstrip(">"))
        stack += [following for following, _ in node.next_functions]
    return found & {"GatedMlp", "Mlp", "ScaledLinear", "GatedActivation", "ScaledActivation"}


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_computes_what_its_layers_do(
    adapted: Callable[..., ia3.PeftModel], families: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    targets, feedforward, nodes = LAYOUTS[layout]
    config = {"target_modules": targets, "feedforward_modules": feedforward}
    results = []
    for precision in (dtype, dtype, torch.float64):
        model = adapted(families["llama"], dtype, **config).to(precision if precision == torch.float64 else dtype)
        if results:
            unfuse(model)
        block = model.base_model.model.model.layers[0].mlp
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).to(precision).requires_grad_()
        y = block(x)
        if not results:
            assert _nodes(y, x) == nodes
        leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
        assert len(leaves) == 1 + sum(name in ("gate_proj", "up_proj", "down_proj") for name in targets)
        grad = torch.cos(torch.arange(y.numel())).reshape(y.shape).to(precision)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    for fused, apart, exact in zip(*results, strict=True):
        error, allowed = ((value.double() - exact).norm() / exact.norm() for value in (fused, apart))
        assert error <= 2 * max(allowed, torch.finfo(dtype).eps)


@needs_native
def test_a_trained_weight_or_a_hook_takes_the_block_apart(
    adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]
) -> None:
    model = adapted(families["llama"])
    block = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 32).requires_grad_()
    expected = block(x)
    assert _nodes(expected, x) == {"GatedMlp"}
    block.gate_proj.weight.requires_grad_(True)
    y = block(x)
    assert "GatedMlp" not in _nodes(y, x)
    y.sum().backward()
    assert block.gate_proj.weight.grad is not None
    block.gate_proj.weight.requires_grad_(False)
    seen: list[torch.Size] = []
    handle = block.up_proj.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    torch.testing.assert_close(block(x), expected)
    assert seen == [(2, 5, 48)]
    handle.remove()


@needs_native
def test_a_plain_block_is_one_node(adapted: Callable[..., ia3.PeftModel], families: dict[str, Any]) -> None:
    for name, path in (
        ("phi", "model.layers.0.mlp"),
        ("gpt2", "transformer.h.0.mlp"),
        ("t5", "encoder.block.0.layer.1"),
    ):
        model = adapted(families[name])
        block = model.get_submodule(f"base_model.model.{path}")
        block = block.DenseReluDense if name == "t5" else block
        x = torch.randn(2, 5, 32).requires_grad_()
        y = block(x)
        assert _nodes(y, x) == {"Mlp"}, name
        unfuse(model)
        torch.testing.assert_close(y, block(x))


class _Other(nn.Module):
    """Children and names of rows of the table, and another computation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn, self.gate_up_proj = nn.SiLU(), nn.Linear(8, 32)


class _Residual(_Other):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(self.activation_fn(self.fc1(x)))
        return y


class _Halved(_Other):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 0.5 * self.fc2(self.activation_fn(self.fc1(x)))
        return y


class _Swapped(_Other):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
        return y


class _Summed(_Other):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
        return y


class _UpFirst(_Other):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(self.activation_fn(gate) * up)
        return y


class _Plain(_Other):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


@pytest.mark.parametrize("kind", [_Residual, _Halved, _Swapped, _Summed, _UpFirst, _Plain])
def test_a_block_that_reads_the_names_of_a_row_and_computes_something_else_is_left_alone(kind: type[_Other]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(kind())
    x = torch.randn(3, 8)
    expected = base(x)
    state = torch.random.get_rng_state()
    config = ia3.IA3Config(target_modules=["fc2", "down_proj"], feedforward_modules=["fc2", "down_proj"])
    assert (row_of(base[0]) is not None) == (kind is _Plain)
    assert torch.equal(torch.random.get_rng_state(), state)
    model = ia3.get_peft_model(base, config)
    torch.testing.assert_close(model(x), expected)
