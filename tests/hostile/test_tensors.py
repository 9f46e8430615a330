"""Tensors whose memory overlaps, is gone or elsewhere, derivatives that there are none of, and the ends of ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ia3_kernels as kernels
from ia3_kernels import ACTIVATIONS

from .harness import bounds

# --- the whole range of each dtype -----------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
    "identity": lambda x: x,
}


def values(dtype: torch.dtype) -> Tensor:
    """Return numbers from end to end of a dtype, both zeros, subnormals, infinities and NaN."""
    info = torch.finfo(dtype)
    ends = [info.max, info.max / 2, info.tiny, info.smallest_normal / 2, 0.0, torch.inf]
    steps = [10.0**power for power in range(-37, 39) if 10.0**power < info.max]
    inner = [x / 4 for x in range(1, 420)]
    found = torch.tensor([*ends, *steps, *inner], dtype=torch.float64)
    return torch.cat([found, -found, torch.tensor([torch.nan])]).to(dtype)


def agree(found: Tensor, x: Tensor, right: Tensor, what: str) -> None:
    """Fail where a result is not torch's in fp64, within roundings of its dtype, NaN and infinities included."""
    info = torch.finfo(found.dtype)
    expected = right.to(found.dtype)
    error = (found.double() - expected.double()).abs()
    # Beside a rounding or a few of the result: of the products with x, near where a derivative is zero.
    allowed = 16 * info.eps * expected.double().abs() + 16 * info.smallest_normal + 4 * info.eps
    near = (error <= allowed) | (found == expected) | (found.isnan() & expected.isnan())
    assert bool(near.all()), f"{what} at {x[~near][:5].tolist()}: {found[~near][:5]} for {expected[~near][:5]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_over_the_whole_range(activation: str, dtype: torch.dtype) -> None:
    x = values(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    right = _TORCH[activation](wide)
    (slope,) = torch.autograd.grad(right.sum(), wide)
    with bounds(seconds=5):
        y = kernels.scaled_activation(x, torch.ones(len(x)), activation)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        gated = kernels.gated_activation(x, torch.ones_like(x), torch.ones(len(x)), activation)
        (gated_gradient,) = torch.autograd.grad(gated, x, torch.ones_like(gated))
    for found in (y, gated):
        agree(found.detach(), x.detach(), right.detach(), activation)
    # fp64's own tails and NaN at infinities are torch's business: what torch gives in this dtype counts there.
    own = x.detach().clone().requires_grad_()
    (torchs,) = torch.autograd.grad(_TORCH[activation](own).sum(), own)
    known = ~(torchs.isnan() ^ slope.isnan())
    for found in (gradient, gated_gradient):
        agree(found[known], x.detach()[known], slope[known], f"the derivative of {activation}")


# --- memory ----------------------------------------------------------------------------------------------------------


def _gone(name: str) -> Callable[[], object]:
    """Return a call with one tensor whose storage was freed, as sharding and offloading do."""

    def call() -> object:
        tensors = {
            "x": torch.ones(3, 8),
            "weight": torch.ones(5, 8),
            "bias": torch.ones(5),
            "input_scale": torch.ones(8),
            "output_scale": torch.ones(5),
        }
        tensors[name].untyped_storage().resize_(0)
        return kernels.scaled_linear(**tensors)

    return call


def _gone_in(call: Callable[..., object], *shapes: tuple[int, ...], at: int = 0) -> Callable[[], object]:
    def attack() -> object:
        tensors = [torch.ones(shape) for shape in shapes]
        tensors[at].untyped_storage().resize_(0)
        return call(*tensors)

    return attack


def _residual(scale: Tensor, weight: Tensor) -> Any:
    residual = kernels.merge_(weight, scale, exact=True)
    assert residual is not None
    return residual


def _elsewhere() -> None:
    weight, scale = torch.randn(4, 6), torch.rand(4) + 0.5
    kernels.unmerge_(weight, scale, 0, _residual(scale, weight).to("meta"))


def _swapped_elsewhere() -> None:
    weight, scale = torch.randn(4, 6), torch.rand(4) + 0.5
    kernels.swap_(weight, scale, torch.rand(4), 0, _residual(scale, weight).to("meta"))


def _view_of_itself(side: int) -> Callable[[], object]:
    weight = torch.rand(6, 6)
    return lambda: kernels.scale_weight_(weight, weight[0] if side else weight[:, 0], side)


ones = torch.ones
OVERLAP, GONE = "overlap|single memory location|strides|shares? memory|copy it", "memory|storage|no data|freed|data"
MEMORY: dict[str, tuple[Callable[[], object], str]] = {
    "rows-expanded": (lambda: kernels.scale_weight_(ones(1, 4).expand(3, 4), ones(4) * 2, 1), OVERLAP),
    "columns-expanded": (lambda: kernels.scale_weight_(ones(3, 1).expand(3, 4), ones(3) * 2, 0), OVERLAP),
    "windows-transposed": (lambda: kernels.scale_weight_(ones(8).as_strided((4, 3), (1, 2)), ones(3) * 2, 1), OVERLAP),
    "windows": (lambda: kernels.scale_weight_(ones(8).as_strided((3, 4), (2, 1)), ones(3) * 2, 0), OVERLAP),
    "merge-rows-expanded": (lambda: kernels.merge_(ones(1, 4).expand(3, 4), ones(3) * 2), OVERLAP),
    "merge-columns-expanded": (lambda: kernels.merge_(ones(3, 1).expand(3, 4), ones(3) * 2), OVERLAP),
    "merge-vector-expanded": (lambda: kernels.merge_(ones(1).expand(4), ones(4) * 2), OVERLAP),
    "merge-windows": (lambda: kernels.merge_(ones(8).as_strided((3, 4), (2, 1)), ones(3) * 2), OVERLAP),
    "exact-rows-expanded": (lambda: kernels.merge_(ones(1, 4).expand(3, 4), ones(3) * 2, exact=True), OVERLAP),
    "own-row": (_view_of_itself(1), OVERLAP),
    "merge-own-row": (lambda: (lambda w: kernels.merge_(w, w[:, 0]))(torch.rand(6, 6)), OVERLAP),
    "exact-own-row": (lambda: (lambda w: kernels.merge_(w, w[:, 0], exact=True))(torch.rand(6, 6)), OVERLAP),
    "residual-elsewhere": (_elsewhere, "residual is on meta, but weight is on cpu"),
    "swap-elsewhere": (_swapped_elsewhere, "residual is on meta, but weight is on cpu"),
    "no-residual": (lambda: kernels.unmerge_(ones(3, 4), ones(3)), "residual is None"),
    **{f"gone-{name}": (_gone(name), GONE) for name in ("x", "weight", "bias", "input_scale", "output_scale")},
    "gone-in-activation": (_gone_in(kernels.scaled_activation, (3, 8), (8,)), GONE),
    "gone-in-activations-scale": (_gone_in(kernels.scaled_activation, (3, 8), (8,), at=1), GONE),
    "gone-gate": (_gone_in(kernels.gated_activation, (3, 8), (3, 8), (8,)), GONE),
    "gone-up": (_gone_in(kernels.gated_activation, (3, 8), (3, 8), (8,), at=1), GONE),
    "gone-in-scale_weight": (_gone_in(lambda w, s: kernels.scale_weight_(w, s, 0), (3, 8), (3,)), GONE),
    "gone-in-merge": (_gone_in(kernels.merge_, (3, 8), (3,)), GONE),
    "gone-in-finite": (_gone_in(kernels.stays_finite, (3, 8), (3,)), GONE),
    "gone-in-mlp": (_gone_in(kernels.mlp, (3, 8), (6, 8), (8, 6), (6,), at=1), GONE),
    "gone-in-gated-mlp": (_gone_in(kernels.gated_mlp, (3, 8), (6, 8), (6, 8), (8, 6), (6,), at=3), GONE),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name: str) -> None:
    attack, said = MEMORY[name]
    with bounds(seconds=5), pytest.raises(RuntimeError, match=said):
        attack()


VIEWS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, int]]] = {
    "own-column": lambda all: (all, all[:, 0], 0),
    "row-of-a-slice": lambda all: (all[:, :4], all[2, :4], 1),
    "column-of-a-slice": lambda all: (all[:, :4], all[:, 1], 0),
    "row-of-steps": lambda all: (all[:, ::2], all[1, ::2], 1),
    "row-of-a-transpose": lambda all: (all.t()[:4], all.t()[2], 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_scale_that_is_a_view_of_the_weight_is_refused_or_read_before(name: str) -> None:
    weight, scale, dim = VIEWS[name](torch.rand(8, 8))
    right = weight * scale.clone().unsqueeze(1 - dim)
    try:
        kernels.scale_weight_(weight, scale, dim)
    except RuntimeError as error:
        assert "memory" in str(error)  # noqa: PT017
    else:
        assert torch.equal(weight, right)


# --- derivatives that there are none of ------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: kernels.scaled_linear(x, ones(8, 8), None, ones(8) * 2),
    "linear-weight": lambda x: kernels.scaled_linear(ones(3, 8), x[:1].expand(8, 8).clone(), None, ones(8)),
    "linear-scale": lambda x: kernels.scaled_linear(ones(3, 8), ones(8, 8), None, x[0]),
    "activation": lambda x: kernels.scaled_activation(x, ones(8) * 2, "silu"),
    "activation-scale": lambda x: kernels.scaled_activation(ones(3, 8), x[0], "silu"),
    "gated": lambda x: kernels.gated_activation(x, x, ones(8) * 2),
    "mlp": lambda x: kernels.mlp(x, ones(6, 8), ones(8, 6), ones(6)),
    "gated-mlp": lambda x: kernels.gated_mlp(x, ones(6, 8), ones(6, 8), ones(8, 6), ones(6)),
}


def _dual(f: Callable[[Tensor], Tensor], x: Tensor) -> object:
    import torch.autograd.forward_ad as forward

    with forward.dual_level():
        return forward.unpack_dual(f(forward.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "dual": _dual,
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_forward_derivative(name: str, transform: str) -> None:
    x = torch.rand(3, 8)
    with bounds(seconds=10, nbytes=2 << 30), pytest.raises(Exception, match=r".") as caught:
        TRANSFORMS[transform](FUNCTIONS[name], x)
    assert isinstance(caught.value, RuntimeError | NotImplementedError), repr(caught.value)
    assert len(str(caught.value)) > 20
