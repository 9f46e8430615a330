"""The limit that the operators are held to: wide enough for chance, too narrow for a fault."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ia3_kernels import reference

from .helpers import DTYPES, assert_accurate, error, upcast


def _backwards(x: Tensor, weight: Tensor) -> Tensor:
    """The product with its terms added from the last to the first, as exact as from the first to the last."""
    total = torch.zeros(len(x), len(weight))
    for term in reversed(range(x.shape[1])):
        total = total + x[:, term, None] * weight[None, :, term]
    return total.to(x.dtype)


@pytest.mark.parametrize("inputs", [2, 5, 9])
def test_a_single_sum_may_be_added_in_another_order(inputs: int) -> None:
    """Where the terms cancel, the formula's own error on one element says nothing of what rounding does."""
    for _ in range(150):
        assert_accurate(_backwards, "scaled_linear", torch.randn(1, inputs), torch.randn(1, inputs))


@pytest.mark.parametrize("inputs", [2, 5, 9])
def test_a_single_sum_that_lacks_a_small_part_is_found(inputs: int) -> None:
    for _ in range(50):
        x, weight = torch.randn(1, inputs), torch.randn(1, inputs)
        with pytest.raises(AssertionError):
            assert_accurate(lambda x, w: _backwards(x, w) + 2**-14 * x.norm() * w.norm(), "scaled_linear", x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 64])
def test_errors_a_tenth_beyond_twice_the_formulas_are_found(dtype: torch.dtype, size: int) -> None:
    x, weight = torch.randn(size, 65).to(dtype), torch.randn(size, 65).to(dtype)
    exact = reference.scaled_linear(upcast(x), upcast(weight))
    typical = max(error(reference.scaled_linear(x, weight), exact), torch.finfo(dtype).eps / 2)
    signs = torch.randint(2, exact.shape) * 2.0 - 1
    # That much before it is rounded like any other result
    factor = 1.1 * 2 * (1 + 1 / size)
    faulty = (exact * (1 + factor * typical * signs)).to(dtype)
    assert error(faulty, exact) < 1.3 * factor * typical
    with pytest.raises(AssertionError):
        assert_accurate(lambda *_: faulty, "scaled_linear", x, weight)
