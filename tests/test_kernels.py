"""The two arithmetics and the blocks, where the public API cannot reach.

A device without float64 is not at hand, so the compensated arithmetic in
float32 is tested by declaring the CPU to be one.
"""

import pytest
import torch
from drawn import rand

from softmaxlib import _blocks, _kernels
from softmaxlib.testing import oracle, ulp_error

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 entries, so that small tensors are cut everywhere."""
    monkeypatch.setattr(_blocks, "SIZE", 64)
    monkeypatch.setattr(_blocks, "SHARED", 64)
    monkeypatch.setattr(_kernels, "_SMALL", 0)


def compute(kernel, x, dim, *, mask=None, temperature=1.0, shape=None):
    out = torch.empty(shape or x.shape, dtype=x.dtype)
    kernel(x, mask, dim, temperature, out)
    return out


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, F32, F64], ids=str)
@pytest.mark.parametrize(
    "shape", [(7, 30), (1, 500), (500, 1), (3, 200, 5), (2, 9, 40)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_do_not_show(shape, dtype, masked):
    x = (40 * rand(*shape) - 20).to(dtype)
    mask = (rand(*shape, seed=1) > 0.2) if masked else None
    for dim in range(len(shape)):
        reduced = list(shape)
        reduced[dim] = 1
        for kernel, out_shape, t in (
            (_kernels.softmax, shape, 0.7),
            (_kernels.log_softmax, shape, 0.7),
            (_kernels.logsumexp, reduced, 1.0),
        ):
            options = {"mask": mask, "temperature": t, "shape": out_shape}
            got = compute(kernel, x, dim, **options)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_blocks, "SIZE", 2**20)
                patch.setattr(_blocks, "SHARED", 2**20)
                whole = compute(kernel, x, dim, **options)
            # Sums of pieces are rounded in another order.
            slack = {F64: 4e-15}.get(dtype, torch.finfo(dtype).eps)
            torch.testing.assert_close(
                got, whole, rtol=slack, atol=0, equal_nan=True
            )
        v = rand(*shape, seed=2).to(dtype)
        for kernel in (_kernels.softmax_vjp, _kernels.log_softmax_vjp):
            y = _softmax(x, dim) if kernel is _kernels.softmax_vjp else x
            results = []
            for size in (64, 2**20):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(_blocks, "SIZE", size)
                    patch.setattr(_blocks, "SHARED", size)
                    results.append(kernel(y, v, mask, dim, 0.7))
            # v - y . v cancels: relative to the largest entry.
            scale = results[1].abs().max().item()
            torch.testing.assert_close(
                *results, rtol=0, atol=2 * slack * scale
            )


def _softmax(x, dim):
    return compute(_kernels.softmax, x, dim)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("offset", [0.0, 1e7, 3e30])
def test_pieces_at_any_offset(offset):
    x = (offset + 30 * rand(300)).to(F32)
    exact = oracle(x)
    p = compute(_kernels.softmax, x, 0)
    assert ulp_error(p, exact.softmax) <= 0.51
    log_p = compute(_kernels.log_softmax, x, 0)
    assert ulp_error(log_p, exact.log_softmax) <= 0.51


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("gap", [10, 20, 60, 100])
def test_confident_rows_across_pieces(gap):
    x = rand(300, seed=3).to(F32)
    x[170] += gap
    exact = oracle(x)
    log_p = compute(_kernels.log_softmax, x, 0)
    assert ulp_error(log_p, exact.log_softmax) <= 0.51
    rows = torch.stack((x, 0 * x, x.flip(0)))
    for row in compute(_kernels.log_softmax, rows, 1)[::2]:
        order = exact.log_softmax if row[170] > -1 else None
        flipped = exact.log_softmax[::-1]
        assert ulp_error(row, order or flipped) <= 0.51


@pytest.fixture
def no_float64(monkeypatch):
    """Compute float32 and narrower formats in float32, compensated."""
    monkeypatch.setattr(_blocks, "work_dtype", lambda x: F32)
    monkeypatch.setattr(_blocks, "compensates", lambda x: x.dtype == F32)


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("size", [2, 10, 1000])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.7])
def test_compensated_float32(size, temperature):
    for x in (
        rand(size),
        2000 * rand(size) - 1000,
        300 + 5 * rand(size),
        30 * (rand(size) > 0.9) + rand(size),
    ):
        z = x.to(F32)
        exact = oracle(z, temperature)
        options = {"temperature": temperature}
        p = compute(_kernels.softmax, z, 0, **options)
        # Below the normal range the format itself has fewer digits.
        assert ulp_error(p, exact.softmax) <= 5
        log_p = compute(_kernels.log_softmax, z, 0, **options)
        assert ulp_error(log_p, exact.log_softmax) <= 5
    half = (5 * rand(size)).half()
    p = compute(_kernels.softmax, half, 0, temperature=temperature)
    assert ulp_error(p, oracle(half, temperature).softmax) <= 0.51
