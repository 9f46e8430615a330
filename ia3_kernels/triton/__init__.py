"""Kernels in Triton: one source for NVIDIA from Ampere on, and AMD. Importing a module here needs Triton.

Each file begins with the equations that its kernels compute and the bytes that they move; ``docs/kernels.md`` has the
registers, shared memory and instructions that they compile to. Offsets are 64-bit throughout: a tensor may have more
than 2³¹ elements. Launch parameters come from ``ia3_kernels.launches``.
"""
