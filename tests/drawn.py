"""Tensors for the tests, the same ones at every run."""

import torch

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def randn(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def rand(*shape, dtype=F64, seed=0):
    return torch.rand(shape, generator=generator(seed), dtype=dtype)
