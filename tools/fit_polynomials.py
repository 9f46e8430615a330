"""Derive the polynomial coefficients of csrc/core/math.h (needs mpmath; prints C++ arrays, lowest degree first).

Each fit interpolates in mpmath's precision at Chebyshev nodes and minimizes the *relative* error; the printed bound is
measured on a dense grid with the coefficients rounded to fp32, the arithmetic exact.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import numpy as np

mp.mp.dps = 40


def fit(function: Callable[[mp.mpf], mp.mpf], low: float, high: float, degree: int) -> tuple[list[float], float]:
    """Coefficients of p with p(x) ≈ function(x), relative error weighted, and the largest relative error seen."""
    count = degree + 1
    nodes = [
        mp.mpf(low + high) / 2 + mp.mpf(high - low) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * count))
        for i in range(count)
    ]
    matrix = mp.matrix(count, count)
    values = mp.matrix(count, 1)
    for row, node in enumerate(nodes):
        # p(node) / f(node) = 1: the interpolation of a constant, weighted to be relative.
        for power in range(count):
            matrix[row, power] = node**power / function(node)
        values[row] = 1
    solution = mp.lu_solve(matrix, values)
    rounded = [float(np.float32(float(c))) for c in solution]
    grid = [mp.mpf(low) + (mp.mpf(high) - low) * i / 2000 for i in range(2001)]
    error = max(abs(mp.polyval(rounded[::-1], x) / function(x) - 1) for x in grid)
    return rounded, float(error)


def half_scaled_erfc(t: mp.mpf) -> mp.mpf:
    """0.5 erfcx(t / sqrt 2) = Phi(-t) exp(t^2 / 2)."""
    return mp.erfc(t / mp.sqrt(2)) * mp.exp(t * t / 2) / 2


def main() -> None:
    """Print every table."""
    transform = mp.mpf("0.33")

    def tail(y: mp.mpf) -> mp.mpf:
        # Phi(-t) exp(t^2/2) / y with y = 1 / (1 + 0.33 t): smooth and bounded on (0, 1]
        return half_scaled_erfc((1 / y - 1) / transform) / y

    for name, function, low, high, degree in (
        ("kExp2 (approximate: 2^f)", lambda f: mp.mpf(2) ** f, -0.5, 0.5, 4),
        ("kExp (e^r)", mp.exp, -0.3466, 0.3466, 6),
        ("kNormalTail (approximate)", tail, 0.17, 1.0, 5),
        ("kNormalTail", tail, 0.17, 1.0, 9),
    ):
        coefficients, error = fit(function, low, high, degree)
        print(f"{name}: relative error {error:.2e}\n    {', '.join(f'{c:.9g}f' for c in coefficients)}")


if __name__ == "__main__":
    main()
