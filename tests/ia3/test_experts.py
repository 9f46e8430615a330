"""Experts whose weights are parameters: every family and implementation against the formula, expert by expert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import ia3

pytestmark = pytest.mark.filterwarnings("ignore:target_modules is not set")

E, TOP, WIDTH, INNER = 4, 2, 32, 24
_SIZES = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": TOP,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DEEPSEEK = dict(
    _SIZES, num_key_value_heads=4, moe_intermediate_size=INNER, n_routed_experts=E, n_shared_experts=1,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", dict(_SIZES, num_local_experts=E)),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(_SIZES, num_experts=E, moe_intermediate_size=INNER, shared_expert_intermediate_size=INNER),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(_SIZES, num_experts=E, moe_intermediate_size=INNER, head_dim=8)),
    "deepseek_v2": ("DeepseekV2", dict(_DEEPSEEK)),
    "deepseek_v3": ("DeepseekV3", dict(_DEEPSEEK, n_group=1, topk_group=1)),
    "olmoe": ("Olmoe", dict(_SIZES, num_experts=E)),
    "granitemoe": ("GraniteMoe", dict(_SIZES, num_local_experts=E, attention_multiplier=8**-0.5)),
    "gpt_oss": ("GptOss", dict(_SIZES, num_local_experts=E, head_dim=8)),
    "llama4": (
        "Llama4",
        dict(_SIZES, num_local_experts=E, intermediate_size_mlp=INNER, head_dim=8, interleave_moe_layer_step=1),
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def build(name: str, implementation: str | None = None, **changes: Any) -> Any:
    """A tiny model in eval mode; the same weights each time, biases and routers far from zero."""
    architecture, sizes = FAMILIES[name]
    if name == "llama4":
        kind, config = transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**{**sizes, **changes})
    else:
        kind = getattr(transformers, f"{architecture}ForCausalLM")
        config = getattr(transformers, f"{architecture}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() < 2))
    if implementation is not None and name != "llama4":
        model.set_experts_implementation(implementation)
    return model


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(3, 64, (rows, 7), generator=torch.Generator().manual_seed(1))


def scatter(model: nn.Module, seed: int = 7) -> None:
    """Give every vector values around one, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.copy_(1 + 0.7 * torch.randn(parameter.shape, generator=generator))


def adapted(name: str, implementation: str | None = None, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    base = build(name, implementation).to(dtype)
    settings: dict[str, Any] = {"target_modules": [], "target_parameters": BOTH, "task_type": "CAUSAL_LM"}
    model = ia3.get_peft_model(base, ia3.IA3Config(**{**settings, **config}))
    for _, layer in model.base_model.scaled_layers():
        for key, vector in layer.ia3_l.items():
            layer.ia3_l[key] = nn.Parameter(vector.detach().to(torch.promote_types(dtype, torch.float32)))
    scatter(model)
    return model.eval()


def formula(experts: Any, out: Tensor, inner: Tensor) -> Callable[..., Tensor]:
    """What experts compute with vectors on the outputs of ``gate_up_proj`` and the inputs of ``down_proj``."""

    def expert(e: int, x: Tensor) -> Tensor:
        up, down = experts.gate_up_proj[e], experts.down_proj[e]
        if type(experts).__name__ == "GptOssExperts":
            rows = (x @ up + experts.gate_up_proj_bias[e]) * out[e]
            gate, linear = (
                rows[..., 0::2].clamp(max=experts.limit),
                rows[..., 1::2].clamp(-experts.limit, experts.limit),
            )
            hidden = (linear + 1) * gate * torch.sigmoid(gate * experts.alpha)
            return (hidden * inner[e]) @ down + experts.down_proj_bias[e]
        if type(experts).__name__ == "Llama4TextExperts":
            up, down = up.T, down.T
        gate, linear = ((x @ up.T) * out[e]).chunk(2, -1)
        return (F.silu(gate) * linear * inner[e]) @ down.T

    def forward(x: Tensor, index: Tensor | None = None, weights: Any = None) -> Tensor:
        if index is None:
            return torch.cat([expert(e, part) for e, part in enumerate(x.chunk(E))])
        rows = [
            sum(weights[t, k] * expert(int(index[t, k]), x[t]) for k in range(index.shape[1])) for t in range(len(x))
        ]
        return torch.stack(rows)

    return forward


def reference(name: str, model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The base model in fp64 with the formula in place of its experts, and the vectors by their keys in a file."""
    base = build(name).double()
    vectors = {
        key: value.detach().double().requires_grad_() for key, value in ia3.get_peft_model_state_dict(model).items()
    }
    for path, module in base.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            out, inner = (
                vectors.get(f"base_model.model.{path}.{side}.ia3_l", torch.ones(E, 1, 1).double())
                for side in ("gate_up_proj", "down_proj")
            )
            module.forward = formula(module, out.squeeze(2), inner.squeeze(1))
        elif f"base_model.model.{path}.ia3_l" in vectors:
            vector = vectors[f"base_model.model.{path}.ia3_l"]
            if vector.shape[0] == 1:
                module.register_forward_pre_hook(lambda _, args, vector=vector: (args[0] * vector[0],))
            else:
                module.register_forward_hook(lambda _, args, y, vector=vector: y * vector[:, 0])
    return base, vectors


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of ``dtype`` over sums of some tens of terms in two layers."""
    error = float((ours.double() - expected).norm() / expected.norm())
    assert error < 64 * torch.finfo(dtype).eps, error


CASES = [(name, impl) for name in FAMILIES for impl in (IMPLEMENTATIONS if name != "llama4" else (None,))]


@pytest.mark.parametrize(("name", "implementation"), CASES)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:], BOTH[:1]], ids=["both", "down", "gate_up"])
def test_logits_and_gradients_are_the_formulas(name: str, implementation: str, parameters: list[str]) -> None:
    for dtype in (torch.float32,) if implementation == "grouped_mm" else (torch.float64, torch.float32):
        model = adapted(name, implementation, dtype, target_parameters=parameters)
        base, vectors = reference(name, model)
        expected = base(tokens()).logits
        logits = model(tokens()).logits
        assert_near(logits, expected, dtype)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        (expected * weights).sum().backward()
        (logits * weights).sum().backward()
        own = {key.replace(".default", ""): value for key, value in model.named_parameters() if "ia3_l" in key}
        assert own.keys() == vectors.keys()
        for key, vector in vectors.items():
            assert_near(own[key].grad, vector.grad, dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_and_their_file(name: str, tmp_path: Any) -> None:
    base = build(name)
    expected = base(tokens()).logits
    with pytest.warns(UserWarning, match="PEFT has no defaults"):
        model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all("ia3_l" in key for key in trained)
    assert any("experts.down_proj.ia3_l" in key for key in trained)
    assert not any("gate" in key or "router" in key for key in trained)
    if name in ("qwen2_moe", "deepseek_v3"):
        assert any("shared_expert" in key for key in trained)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    scatter(model)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = ia3.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, expected)
    again = ia3.get_peft_model(build(name), model.peft_config["default"])
    again.load_adapter(tmp_path, "loaded")
    again.set_adapter("loaded")
    assert torch.equal(again.eval()(tokens()).logits, expected)
    reference_model, _ = reference(name, model)
    assert_near(expected, reference_model(tokens()).logits, torch.float32)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_each_sequence_takes_its_adapter(name: str, implementation: str) -> None:
    model = adapted(name, implementation)
    for seed, other in enumerate(("second", "third")):
        model.add_adapter(
            other, ia3.IA3Config(target_modules=[], target_parameters=BOTH[seed:], init_ia3_weights=False)
        )
    rows = ["second", "__base__", "default", "third"]
    alone = []
    for row, adapter in enumerate(rows):
        model.set_adapter(adapter if adapter != "__base__" else "default")
        with model.disable_adapter() if adapter == "__base__" else pytest.MonkeyPatch.context():
            alone.append(model(tokens(4)[row : row + 1]).logits)
    model.set_adapter("default")
    mixed = model(input_ids=tokens(4), adapter_names=rows).logits
    assert_near(mixed.detach(), torch.cat(alone).detach().double(), torch.float32)
    with ia3.AdapterBank(model, 4) as bank:
        for adapter in ("default", "second", "third"):
            bank.load(f"bank/{adapter}", ia3.get_peft_model_state_dict(model, adapter_name=adapter))
        named = [adapter if adapter == "__base__" else f"bank/{adapter}" for adapter in rows]
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens(4), adapter_names=named).logits, mixed, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_in_place_and_bit_exact(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype=dtype)
    model.add_adapter("second", ia3.IA3Config(target_modules=[], target_parameters=BOTH, init_ia3_weights=False))
    base = model.get_base_model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    places = {key: value.data_ptr() for key, value in base.named_parameters()}
    expected = model(tokens()).logits
    model.merge_adapter()
    assert places == {key: value.data_ptr() for key, value in base.named_parameters()}
    assert_near(model(tokens()).logits.detach(), expected.detach().double(), dtype)
    with model.disable_adapter():
        assert_same(base.state_dict(), before)
    merged = copy.deepcopy(model)
    merged.to(torch.float64).unmerge_adapter()
    model.swap_adapter("default", "second")
    model.unmerge_adapter()
    assert_same(base.state_dict(), before)
    assert_same({key: value.to(dtype) for key, value in merged.get_base_model().state_dict().items()}, before)
    model.set_adapter("default")
    plain = model.merge_and_unload()
    assert not any("ia3" in key or "base_layer" in key for key in plain.state_dict())
    assert type(plain) is type(build(name))
    assert_near(plain(tokens()).logits.detach(), expected.detach().double(), dtype)


def assert_same(state: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert state.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(state[key], value.to(state[key].dtype)), key


def test_a_training_step_on_merged_experts_is_refused() -> None:
    model = adapted("mixtral").train()
    model.merge_adapter()
    with pytest.raises(ia3.IA3Error, match="merged into the weights, where its vectors get no gradient"):
        model(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize(
    ("name", "implementation"), [("qwen3_moe", "grouped_mm"), ("gpt_oss", "batched_mm"), ("llama4", None)]
)
@pytest.mark.parametrize("adapters", [1, 2])
def test_compiled(name: str, implementation: str, adapters: int) -> None:
    model = adapted(name, implementation)
    names = None
    if adapters == 2:
        model.add_adapter("second", ia3.IA3Config(target_modules=[], target_parameters=BOTH, init_ia3_weights=False))
        names = ["second", "default"]
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, fullgraph=adapters == 1, backend="aot_eager")):
        model.zero_grad()
        loss = run(input_ids=tokens(), labels=tokens(), adapter_names=names).loss
        loss.backward()
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        results.append([loss.detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_generation_is_that_of_the_merged_model(name: str, implementation: str) -> None:
    model = adapted(name, implementation)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    settings: dict[str, Any] = {**inputs, "max_new_tokens": 5, "do_sample": False}
    ours = model.generate(**settings)
    names = model.generate(**settings, adapter_names=["default", "__base__"])
    with model.disable_adapter():
        base = model.generate(**settings)
    assert torch.equal(names, torch.stack([ours[0], base[1]]))
    assert not torch.equal(ours, base)
    assert torch.equal(model.merge_and_unload().generate(**settings), ours)


def test_adapters_come_and_go() -> None:
    model = adapted("mixtral", target_parameters=BOTH[1:])
    first = model(tokens()).logits
    model.add_adapter(
        "other", ia3.IA3Config(target_modules=["q_proj"], feedforward_modules=[], target_parameters=BOTH[:1])
    )
    assert torch.equal(model(tokens()).logits, first)
    scatter(model, 9)
    model.set_adapter(["default", "other"])
    both = model(tokens()).logits
    assert not torch.allclose(both, first)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    layer = model.get_base_model().model.layers[0].mlp.experts.down_proj
    torch.testing.assert_close(layer.ia3_l["mean"], 0.5 * layer.ia3_l["default"] + 0.5)
    model.set_adapter("default")
    model.delete_adapter("other")
    model.delete_adapter("mean")
    assert {key.rpartition(".")[2] for key, _ in model.named_parameters() if "ia3_l" in key} == {"default"}
    base = model.unload()
    assert type(base.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    torch.testing.assert_close(base(tokens()).logits, build("mixtral")(tokens()).logits)


def test_names_of_modules_never_mean_experts() -> None:
    """Whether or not another adapter has vectors on them."""
    model = adapted("qwen2_moe")
    for name, targets in (("listed", ["down_proj"]), ("pattern", r".*down_proj"), ("all", "all-linear")):
        model.add_adapter(name, ia3.IA3Config(target_modules=targets, feedforward_modules=[]))
        paths = [key for key, _ in model.named_parameters() if key.endswith(f".ia3_l.{name}")]
        assert any("shared_expert.down_proj" in path for path in paths)
        assert not any(".experts." in path for path in paths)


def _synthetic(kind: str, implementation: str) -> Any:
    """A model that is nothing but experts of a rarer layout, without a class in transformers."""
    from types import SimpleNamespace

    from transformers.integrations import use_experts_implementation

    class Rare(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn, self.post_expert_norm = E, nn.SiLU(), nn.LayerNorm(WIDTH)
            up = nn.Parameter(0.3 * torch.randn(E, INNER if kind == "has_gate" else 2 * INNER, WIDTH))
            setattr(self, "up_proj" if kind == "has_gate" else "gate_up_proj", up)
            self.down_proj = nn.Parameter(0.3 * torch.randn(E, WIDTH, INNER))

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            raise AssertionError("the registry's functions run in its place")

    settings = {"has_gate": {"has_gate": False}, "has_post_expert_norm": {"has_post_expert_norm": True}}[kind]
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = use_experts_implementation(Rare, **settings)(
        SimpleNamespace(_experts_implementation=implementation)
    )
    model.forward = lambda *inputs: model.experts(*inputs)
    return model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["has_gate", "has_post_expert_norm"])
def test_experts_without_a_gate_and_with_a_norm(kind: str, implementation: str) -> None:
    model = _synthetic(kind, implementation)
    experts, up = model.experts, "up_proj" if kind == "has_gate" else "gate_up_proj"
    config = ia3.IA3Config(target_modules=[], target_parameters=[f"experts.{up}", "experts.down_proj"])
    ia3.inject_adapter_in_model(config, model)
    scatter(model)
    out, inner = (model.experts._modules[name].ia3_l["default"].squeeze() for name in (up, "down_proj"))
    generator = torch.Generator().manual_seed(5)
    x, weights = torch.randn(9, WIDTH, generator=generator), torch.rand(9, TOP, generator=generator)
    index = torch.stack([torch.randperm(E, generator=generator)[:TOP] for _ in range(9)])
    expected = []
    for token, chosen, shares in zip(x, index, weights, strict=True):
        parts = []
        for e, share in zip(chosen.tolist(), shares, strict=True):
            rows = (experts._parameters[up][e] @ token) * out[e]
            hidden = F.silu(rows) if kind == "has_gate" else F.silu(rows[:INNER]) * rows[INNER:]
            y = experts.down_proj[e] @ (hidden * inner[e])
            parts.append(share * (y if kind == "has_gate" else experts.post_expert_norm(y)))
        expected.append(sum(parts))
    assert_near(model(x, index, weights), torch.stack(expected).double(), torch.float32)


def test_hooks_on_experts_still_run() -> None:
    model = adapted("mixtral")
    seen = []
    experts = model.get_base_model().model.layers[0].mlp.experts.base_layer
    experts.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model(tokens())
    assert seen == [(14, WIDTH)]


def test_the_report_says_what_runs() -> None:
    def rows(name: str) -> dict[str, Any]:
        return {row.module.rpartition(".")[2]: row for row in ia3.report(adapted(name)).rows}

    assert rows("qwen3_moe")["down_proj"].runs.startswith("gated_activation")
    assert rows("qwen3_moe")["gate_up_proj"].runs.startswith("scaled_activation")
    assert "computes its own gate" in rows("gpt_oss")["down_proj"].reason


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted("qwen3_moe").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        results.append([value.grad for value in model.parameters() if value.grad is not None])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


# --- bad input ------------------------------------------------------------------------------------------------------


class _Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (
            ["experts.dwn_proj"],
            r"no such parameter; experts' parameters in it are 'experts.gate_up_proj', 'experts.down_proj'",
        ),
        (["experts.gate_up_proj_bias"], r"shape \[4, 48\]; expected one of experts"),
        (["strange.down_proj"], "part of a _Strange, whose layout is not known"),
        ("experts.down_proj", r"write \['experts.down_proj'\]"),
        ([3], "expected a list"),
    ],
)
def test_bad_parameters_are_refused(parameters: Any, said: str) -> None:
    model = build("gpt_oss")
    model.strange = _Strange()
    before = {name: (id(module), dict(module.__dict__["_modules"])) for name, module in model.named_modules()}
    with pytest.raises(ia3.IA3Error, match=said):
        ia3.get_peft_model(model, ia3.IA3Config(target_modules=[], target_parameters=parameters))
    assert before == {name: (id(module), dict(module.__dict__["_modules"])) for name, module in model.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sharded_and_quantized_experts_are_refused() -> None:
    config = ia3.IA3Config(target_modules=[], target_parameters=["experts.down_proj"])
    model = build("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ia3.IA3Error, match="sharded over processes"):
        ia3.get_peft_model(model, config)
    model = build("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.uint8), requires_grad=False)
    with pytest.raises(ia3.IA3Error, match="quantized"):
        ia3.get_peft_model(model, config)
    model = build("mixtral")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ia3.IA3Error, match="experts_implementation is 'sonicmoe'"):
        ia3.get_peft_model(model, config)
    assert not any("ia3" in name for name, _ in model.named_parameters())


def test_peft_refuses_such_an_adapter(tmp_path: Any) -> None:
    import peft

    for number, targets in enumerate((["k_proj"], r".*\.(k_proj|v_proj)", [])):
        model = adapted("mixtral", target_modules=targets, feedforward_modules=[], target_parameters=BOTH[number % 2 :])
        model.save_pretrained(tmp_path / str(number))
        base = build("mixtral")
        with (
            pytest.raises(ValueError, match="should be a subset"),
            pytest.warns(UserWarning, match="target_parameters"),
        ):
            peft.PeftModel.from_pretrained(base, tmp_path / str(number))
        assert base.state_dict().keys() == build("mixtral").state_dict().keys()
        loaded = ia3.PeftModel.from_pretrained(base, tmp_path / str(number)).eval()
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_peft_has_no_way_back() -> None:
    with pytest.raises(ia3.IA3Error, match="PEFT has no layers for"):
        ia3.decelerate(adapted("mixtral"))


# --- files of separate experts --------------------------------------------------------------------------------------


def old_adapter(folder: Any, name: str, leaves: dict[str, str]) -> dict[str, Tensor]:
    """An adapter as PEFT wrote it when experts were modules; returns the vectors of the parameters that are now."""
    import json

    from safetensors.torch import save_file

    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    model = adapted(name, target_modules=["k_proj", "v_proj"], feedforward_modules=[], target_parameters=BOTH)
    tensors = {key: value.clone() for key, value in ia3.get_peft_model_state_dict(model).items()}
    old: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if ".experts." not in key:
            old[key] = value
            continue
        path = key.partition(".mlp.")[0]
        for e in range(E):
            if "down_proj" in key:
                old[f"{path}.{block}.experts.{e}.{leaves['down']}.ia3_l"] = value[e].clone()
            else:
                for leaf, half in zip((leaves["gate"], leaves["up"]), value[e].chunk(2), strict=True):
                    old[f"{path}.{block}.experts.{e}.{leaf}.ia3_l"] = half.clone()
    folder.mkdir()
    save_file(old, folder / "adapter_model.safetensors")
    fields = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj", "v_proj", *leaves.values()]}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "feedforward_modules": [leaves["down"]]}))
    return tensors


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("mixtral", {"gate": "w1", "down": "w2", "up": "w3"}),
        ("qwen3_moe", {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}),
    ],
)
def test_adapters_of_separate_experts_load(name: str, leaves: dict[str, str], tmp_path: Any) -> None:
    expected = old_adapter(tmp_path / "old", name, leaves)
    model = ia3.PeftModel.from_pretrained(build(name), tmp_path / "old")
    assert_same(dict(sorted(ia3.get_peft_model_state_dict(model).items())), dict(sorted(expected.items())))
    other = ia3.get_peft_model(build(name), ia3.IA3Config())
    other.load_adapter(tmp_path / "old", "old")
    assert_same(ia3.get_peft_model_state_dict(other, adapter_name="old"), expected)
    assert model.peft_config["default"].target_parameters == ["experts.down_proj", "experts.gate_up_proj"]


def test_an_adapter_of_some_experts_is_refused(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    old_adapter(tmp_path / "old", "mixtral", {"gate": "w1", "down": "w2", "up": "w3"})
    path = tmp_path / "old" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w2.ia3_l"]
    save_file(tensors, path)
    with pytest.raises(ia3.IA3Error, match=r"no vector for expert 2 of 'model.layers.1.mlp.experts.down_proj'"):
        ia3.PeftModel.from_pretrained(build("mixtral"), tmp_path / "old")


def test_a_bank_reads_vectors_of_separate_experts(tmp_path: Any) -> None:
    expected = old_adapter(tmp_path / "old", "mixtral", {"gate": "w1", "down": "w2", "up": "w3"})
    config = ia3.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], target_parameters=BOTH)
    model, ids = ia3.get_peft_model(build("mixtral"), config).eval(), torch.arange(12).view(2, 6)
    with torch.no_grad(), ia3.AdapterBank(model, 2) as bank:
        bank.load("old", tmp_path / "old")
        mixed = model(ids, adapter_names=["old", "__base__"]).logits
        base = model(ids, adapter_names=["__base__"] * 2).logits
    ia3.set_peft_model_state_dict(model, expected)
    torch.testing.assert_close(mixed[:1], model(ids).logits[:1])
    torch.testing.assert_close(mixed[1:], base[1:])
    assert not torch.allclose(mixed[0], base[0])


def test_a_number_of_an_expert_without_end_is_refused(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    old_adapter(tmp_path / "old", "mixtral", {"gate": "w1", "down": "w2", "up": "w3"})
    path = tmp_path / "old" / "adapter_model.safetensors"
    name = f"base_model.model.model.layers.1.block_sparse_moe.experts.{'9' * 5000}.w2.ia3_l"
    save_file({**load_file(path), name: torch.ones(1, 4)}, path)
    with pytest.raises(ia3.IA3Error):
        ia3.PeftModel.from_pretrained(build("mixtral"), tmp_path / "old")


# --- checkpoints on disk ----------------------------------------------------------------------------------------------


def merged_on_disk(base: Any, adapter: Any, out: Any) -> Any:
    from ia3.merging.checkpoint import plan_merge, write_merged

    write_merged(plan_merge(base, adapter, out), out)
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_separate", [True, False])
def test_checkpoints_of_separate_and_stacked_experts_merge(name: str, is_separate: bool, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = adapted(name, dtype=torch.bfloat16, target_modules=["o_proj"], feedforward_modules=[])
    base = copy.deepcopy(model).unload()
    base.save_pretrained(tmp_path / "base")
    if not is_separate:
        save_file({key: value.clone() for key, value in base.state_dict().items()}, tmp_path / "base/model.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    merged = merged_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same(merged.state_dict(), model.merge_and_unload().state_dict())


def test_an_adapter_of_separate_experts_merges_on_disk(tmp_path: Any) -> None:
    leaves = {"gate": "w1", "down": "w2", "up": "w3"}
    old_adapter(tmp_path / "old", "mixtral", leaves)
    build("mixtral").save_pretrained(tmp_path / "base")
    merged = merged_on_disk(tmp_path / "base", tmp_path / "old", tmp_path / "out")
    loaded = ia3.PeftModel.from_pretrained(build("mixtral"), tmp_path / "old")
    assert_same(merged.state_dict(), loaded.merge_and_unload().state_dict())
