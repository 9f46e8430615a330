"""Quantized base layers: what is computed is exact, nothing is upcast, feed-forward blocks run fused.

The layers are those of bitsandbytes, torchao and transformers' packed GGUF; each comes with its library or is skipped.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ia3
from ia3.merging import formats

from .helpers import scaled_layer
from .quantizing import (
    BF16,
    IN,
    KINDS,
    OUT,
    ROWS,
    dequantized_model,
    eager_model,
    gguf_values,
    linear,
    loaded,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _scaled(base: nn.Module, is_feedforward: bool) -> tuple[Any, nn.Parameter]:
    """``base`` with a vector far from ones, a zero and negatives in it."""
    layer = scaled_layer(base, is_feedforward, init_ones=True)
    vector = layer.ia3_l["default"]
    with torch.no_grad():
        vector.normal_(generator=torch.Generator().manual_seed(1))
        vector.view(-1)[0] = 0.0
    return layer, vector


def _input(rows: int = ROWS, features: int = IN, seed: int = 2) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).to(BF16)


def _gradients(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, dy))


# --- one layer ------------------------------------------------------------------------------------------------------


def test_output_side_is_the_base_layers_output_times_the_vector_rounded_once(kind: str) -> None:
    base, _ = KINDS[kind](linear())
    layer, vector = _scaled(base, is_feedforward=False)
    x, dy = _input().requires_grad_(), _input(features=OUT, seed=3)
    y = layer(x)
    dx, dvector = _gradients(y, [x, vector], dy)

    own = base(x)
    scale = vector.detach().reshape(-1)
    assert y.dtype == BF16
    assert torch.equal(y, (own.float() * scale).to(BF16))
    (own_dx,) = _gradients(own, [x], (dy.float() * scale).to(BF16))
    assert torch.equal(dx, own_dx)
    # fp32 sums of ROWS products, whichever way they are added up, and of an output that was rounded once more at most
    products = dy.double() * own.double()
    allowed = products.abs().sum(0) * (2 * torch.finfo(torch.float32).eps * ROWS + torch.finfo(BF16).eps)
    assert bool(((dvector.reshape(-1).double() - products.sum(0)).abs() <= allowed).all())


def test_input_side_is_the_base_layer_on_the_scaled_input_rounded_once(kind: str) -> None:
    base, _ = KINDS[kind](linear())
    layer, vector = _scaled(base, is_feedforward=True)
    x, dy = _input().requires_grad_(), _input(features=OUT, seed=3)
    y = layer(x)
    dx, dvector = _gradients(y, [x, vector], dy)

    scale = vector.detach().reshape(-1)
    inner = (x.detach().float() * scale).to(BF16).requires_grad_()
    own = base(inner)
    assert torch.equal(y, own)
    (dinner,) = _gradients(own, [inner], dy)
    assert torch.equal(dx, (dinner.float() * scale).to(BF16))
    products = dinner.double() * x.detach().double()
    allowed = products.abs().sum(0) * 2 * torch.finfo(torch.float32).eps * ROWS
    assert bool(((dvector.reshape(-1).double() - products.sum(0)).abs() <= allowed).all())


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
def test_the_formula_holds_with_the_dequantized_weight(kind: str, is_feedforward: bool) -> None:
    base, weight = KINDS[kind](linear())
    layer, vector = _scaled(base, is_feedforward)
    x, scale = _input(), vector.detach().reshape(-1).double()
    inner = x.double() * scale if is_feedforward else x.double()
    true = inner @ weight.double().T + base.bias.double()
    magnitude = inner.abs() @ weight.double().abs().T + base.bias.double().abs()
    # Roundings to 16 bits on the way: of the input, of the unpacked weight, of the product, of the sum with the bias
    # and of the result; and where the library quantizes the input too, half a step of each row's largest value.
    error = magnitude * 5 * torch.finfo(BF16).eps
    if kind == "bnb 8-bit":
        step = inner.abs().amax(1, keepdim=True) / 127
        error = error + step / 2 * weight.double().abs().sum(1)
    if not is_feedforward:
        true, error = true * scale, error * scale.abs()
    assert bool(((layer(x).double() - true).abs() <= error).all())


class _Fp32(TorchDispatchMode):
    """Counts the fp32 tensors at least as large as an activation that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [str(func) for leaf in tree_leaves(result) if _is_large_fp32(leaf)]
        return result


def _is_large_fp32(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.numel() >= ROWS * min(IN, OUT)


@contextmanager
def _fp32_tensors() -> Iterator[list[str]]:
    """The large fp32 tensors that operators return or autograd keeps, until the end of the block."""
    found: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        if _is_large_fp32(tensor):
            found.append("kept for backward")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Fp32() as mode:
        yield found
    found += mode.seen


def _upcasts(layer: Callable[[Tensor], Tensor]) -> list[str]:
    x = _input().requires_grad_()
    with _fp32_tensors() as found:
        y = layer(x)
        y.backward(torch.ones_like(y))
    return sorted(found)


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
def test_no_activation_is_upcast(kind: str, is_feedforward: bool) -> None:
    base, _ = KINDS[kind](linear())
    layer, _ = _scaled(base, is_feedforward)
    assert _upcasts(layer) == _upcasts(base)


@pytest.mark.parametrize("name", ["bnb 8-bit", "bnb nf4"])
@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
def test_an_upcast_would_be_seen(name: str, is_feedforward: bool) -> None:
    """PEFT's layers do it; without this the test above would pass by looking at nothing."""
    base, _ = KINDS[name](linear())
    feedforward = ["0"] if is_feedforward else []
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=feedforward)
    model = nn.Sequential(base)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = name == "bnb 8-bit", name == "bnb nf4"
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    assert len(_upcasts(theirs)) > len(_upcasts(base))


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(families: dict[str, Any], tmp_path: Path) -> Path:
    """A tiny Llama whose features fill the blocks of 64 that bitsandbytes packs, with logits that vectors matter to."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    families["llama"].build(**sizes, initializer_range=0.2).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def adapted(folder: Path, kind: str) -> ia3.PeftModel:
    """It, quantized, with vectors far from ones."""
    model = ia3.get_peft_model(loaded(folder, kind), ia3.IA3Config(task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def _run(model: Any, vectors: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    result = model(**batch)
    gradients = torch.autograd.grad(result.loss, list(vectors.values()))
    flat = {path: gradient.double().reshape(-1) for path, gradient in zip(vectors, gradients, strict=True)}
    return result.logits.detach().double(), flat


def test_a_model_is_as_exact_as_the_formula_in_fp32(
    adapted: ia3.PeftModel, kind: str, batch: dict[str, Tensor]
) -> None:
    eager, eager_vectors = eager_model(adapted)
    logits, gradients = _run(
        adapted, {path: layer.ia3_l["default"] for path, layer in adapted.base_model.scaled_layers()}, batch
    )
    eager_logits, eager_gradients = _run(eager, eager_vectors, batch)
    true_logits, true_gradients = _run(dequantized_model(eager, kind), eager_vectors, batch)
    # The formula's own distance from fp64 is what 16-bit and 8-bit activations do to this model; twice that allows for
    # roundings in other places.
    assert (logits - true_logits).norm() <= 2 * (eager_logits - true_logits).norm()
    ours = torch.cat([gradients[path] - true for path, true in true_gradients.items()]).norm()
    theirs = torch.cat([eager_gradients[path] - true for path, true in true_gradients.items()]).norm()
    assert ours <= 2 * theirs
    assert theirs < 0.2 * torch.cat(list(true_gradients.values())).norm()  # else it would say little


def test_feed_forward_blocks_run_fused(adapted: ia3.PeftModel, kind: str) -> None:
    rows = ia3.report(adapted).rows
    down = [row for row in rows if row.module.endswith("down_proj")]
    assert len(down) == 2
    assert all(row.runs.startswith("gated_activation") and row.reason.startswith("fused into LlamaMLP") for row in down)
    others = [row for row in rows if row not in down]
    assert all(row.runs.startswith("scaled_activation") and "computes its own product" in row.reason for row in others)


def test_a_quantized_model_learns(adapted: ia3.PeftModel, batch: dict[str, Tensor]) -> None:
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    before = {name: value.clone() for name, value in adapted.state_dict().items() if "ia3_l" not in name}
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(8):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, value in adapted.state_dict().items():
        if name in before and isinstance(value, Tensor) and type(value) is Tensor:
            assert torch.equal(value, before[name]), name


def test_adapters_go_in_files_and_come_back(
    adapted: ia3.PeftModel, folder: Path, kind: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = ia3.PeftModel.from_pretrained(loaded(folder, kind), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, adapted(**batch).logits)


def test_disabled_and_unloaded_models_are_the_base_model(
    adapted: ia3.PeftModel, folder: Path, kind: str, batch: dict[str, Tensor]
) -> None:
    adapted.eval()
    with torch.no_grad():
        true = loaded(folder, kind).eval()(**batch).logits
        with adapted.disable_adapter():
            assert torch.equal(adapted(**batch).logits, true)
        assert torch.equal(adapted.unload()(**batch).logits, true)


# --- the example of the documentation -------------------------------------------------------------------------------


@pytest.fixture
def opt(families: dict[str, Any], tmp_path: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    families["opt"].build(init_std=0.2).save_pretrained(tmp_path / "opt")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "opt", quantization_config=config, device_map="auto"
    )


def test_the_documented_example_names_what_is_wrong_with_it(opt: Any) -> None:
    with pytest.raises(ValueError, match=r"subset of target_modules, but 'fc2' is not among the targets"):
        ia3.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=["fc2"], init_ia3_weights=True)


def test_the_documented_example_trains_once_corrected(opt: Any, families: dict[str, Any]) -> None:
    model = ia3.prepare_model_for_kbit_training(opt)
    config = ia3.IA3Config(
        target_modules=["q_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=True
    )
    model = ia3.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(**families["opt"].inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(bool((p != 1).any()) for p in model.parameters() if p.requires_grad)


# --- packed GGUF layers ---------------------------------------------------------------------------------------------


@pytest.fixture
def packed() -> Any:
    """A packed layer with a bias and inputs in another order, made differentiable."""
    layer: Any = KINDS["gguf"](linear())[0]
    layer.input_permutation = torch.randperm(IN, generator=torch.Generator().manual_seed(6))
    formats.make_differentiable(layer)
    return layer


def _formula(layer: Any, x: Tensor) -> Tensor:
    return x[..., layer.input_permutation] @ gguf_values(layer).to(x.dtype).T + layer.bias.to(x.dtype)


@pytest.mark.parametrize("rows", [1, 8, 9], ids=lambda rows: f"{rows} rows")
def test_packed_layers_have_a_gradient_for_any_number_of_rows(packed: Any, rows: int) -> None:
    x = _input(2 * rows).view(2, rows, IN).double().requires_grad_()
    y = packed(x.float())
    assert y.shape == (2, rows, OUT)
    assert y.dtype == torch.float32
    true = _formula(packed, x)
    dy = torch.randn(true.shape, generator=torch.Generator().manual_seed(7), dtype=torch.double)
    (dx,), (true_dx,) = _gradients(y, [x], dy.float()), _gradients(true, [x], dy)
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, true_dx, rtol=1e-5, atol=1e-5)


def test_large_packed_weights_are_unpacked_in_parts(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    x = _input().float().requires_grad_()
    whole = packed(x)
    (whole_dx,) = _gradients(whole, [x], torch.ones_like(whole))
    monkeypatch.setattr(kernels, "DEQUANT_CHUNK_ELEMS", 7 * IN)  # and 96 is no multiple of 7
    parts = packed(x)
    (dx,) = _gradients(parts, [x], torch.ones_like(parts))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(dx, whole_dx)


def test_packed_layers_keep_no_unpacked_weight_for_backward(packed: Any) -> None:
    def kept(layer: Any) -> set[torch.dtype]:
        dtypes = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (dtypes.add(t.dtype), t)[1], lambda t: t):
            layer(_input().requires_grad_())
        return dtypes - {torch.int64}  # the permutation

    assert not kept(packed)
    formats.give_back(packed)
    assert kept(packed) == {BF16}  # what transformers' own forward keeps


def test_without_a_gradient_packed_layers_run_their_own_forward(packed: Any) -> None:
    own = type(packed).forward(packed, _input())
    assert torch.equal(packed(_input()), own)
    with torch.no_grad():
        assert torch.equal(packed(_input().requires_grad_()), own)


def test_packed_layers_are_copied_and_restored(packed: Any) -> None:
    copied = copy.deepcopy(packed)
    copied.weight.data.zero_()
    x = _input(2).requires_grad_()
    assert torch.equal(copied(x), packed.bias.expand(2, OUT))
    formats.give_back(packed)
    assert "forward" not in packed.__dict__


def test_packed_layers_keep_the_hooks_of_accelerate(packed: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    formats.give_back(packed)
    calls = []

    class Hook(hooks.ModelHook):  # type: ignore[name-defined, misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(packed, Hook())
    formats.make_differentiable(packed)
    x = _input(2).requires_grad_()
    assert packed(x).requires_grad
    assert calls == [packed]
    formats.give_back(packed)
    assert torch.equal(packed(_input()), type(packed).forward(packed, _input()))
    hooks.remove_hook_from_module(packed)
    assert torch.equal(packed(_input()), type(packed).forward(packed, _input()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel such as transformers fetches for a GPU: no autograd knows what it does."""
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")

    def mul_mat_vec(weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
        values = kernels.dequantize(weight, ggml_type, torch.float32).view(out_features, -1)
        return x.detach().float() @ values.T

    monkeypatch.setattr(kernels, "_gguf_kernel", SimpleNamespace(mul_mat_vec=mul_mat_vec))


def _all_gradients(model: ia3.PeftModel, ids: Tensor) -> Tensor:
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    return torch.cat([gradient.reshape(-1) for gradient in gradients.values() if gradient is not None])


def test_few_tokens_train_a_packed_model(folder: Path, kernel: None) -> None:
    """Through the layers that have no vector, too: the first layer's gradient passes all of them."""
    base = loaded(folder, "gguf")
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    _all_gradients(model, torch.tensor([[5, 9, 3]]))
    assert model.unload() is base
    assert not any("forward" in module.__dict__ for module in base.modules())


# --- bitsandbytes' second layout of 4-bit weights -------------------------------------------------------------------


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain scales", "quantized scales"])
@pytest.mark.parametrize("storage", [torch.uint8, BF16], ids=["uint8", "bf16"])
def test_4bit_layers_keep_their_gradient_after_an_evaluation(is_nested: bool, storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(OUT, 2 * IN)
    options = {"compress_statistics": is_nested, "quant_storage": storage, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(2 * IN, OUT, bias=False, compute_dtype=BF16, **options)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    layer = layer.to("cpu")
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    formats.make_differentiable(layer)
    x = _input(features=2 * IN)
    layer.eval()(x)  # where the processor has the instructions, this changes the layout
    if layer.support_avx512bf16_for_cpu:
        assert layer.weight.quant_state.packing_format_for_cpu
    for _ in range(2):
        x.requires_grad_().grad = None
        dy = _input(features=OUT, seed=3)
        layer(x).backward(dy)
        # 16-bit roundings of the blocks' scales, of the values, and of the result
        allowed = 3 * torch.finfo(BF16).eps * (dy.double().abs() @ values.abs())
        assert bool(((x.grad.double() - dy.double() @ values).abs() <= allowed).all())  # type: ignore[union-attr]


def test_a_4bit_model_trains_on_after_an_evaluation(folder: Path) -> None:
    model = ia3.get_peft_model(loaded(folder, "bnb nf4"), ia3.IA3Config(task_type="CAUSAL_LM")).train()
    ids = torch.arange(3, 15)[None]
    before = _all_gradients(model, ids)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = _all_gradients(model.train(), ids)
    # The layout keeps the blocks' scales in bf16, so that the two are not bit-exactly the same.
    assert (after - before).norm() < 0.05 * before.norm()
