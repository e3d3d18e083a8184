"""Softmax in pieces: exact truth, any tree, any order, and the edges."""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import softmaxlib
from softmaxlib import OnlineSoftmax, streaming_logsumexp, streaming_softmax
from softmaxlib.testing import logits, oracle, spacing, ulp_error

F16, BF16 = torch.float16, torch.bfloat16
F32, F64 = torch.float32, torch.float64
NARROW = (F16, BF16, F32)
INF, NAN = math.inf, math.nan
NOTHING = OnlineSoftmax()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=F64, seed=0, scale=1.0):
    z = torch.randn(shape, dtype=F64, generator=generator(seed))
    return (z * scale).to(dtype)


def of(z, values=None, size=1, dim=-1, **options):
    """The state of a tensor, cut into chunks."""
    state = NOTHING
    start = 0
    for chunk in z.split(size, dim):
        n = chunk.shape[dim]
        if values is not None:
            options["values"] = values[..., start : start + n, :]
        state = state.update(chunk, dim, **options)
        start += n
    return state


def same(a, b):
    assert a.dtype == b.dtype
    for name in ("top", "total", "values"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


# A chunk's rows have a maximum, a shift, n exponentials and a sum; a merge
# two exponentials, two products and a sum. Of n <= 8 logits within 31 of
# each other the exponents are rounded by 31 u, those of the weights that
# matter by log n u (thm. of chapter 06): 50 u is more than all of it.
CLOSE = 50 * 2.0**-53


# ---------------------------------------------------------------- the truth


@given(logits(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_any_tree_and_any_order_give_the_log_sum_exp(z, size, random):
    values = torch.stack([z.sin(), z * 0 + 1], -1)
    chunks = list(zip(z.split(size), values.split(size), strict=True))
    states = [NOTHING.update(c, values=v) for c, v in chunks]
    states += [NOTHING, NOTHING.update(z[:0], values=values[:0])]
    random.shuffle(states)
    while len(states) > 1:
        i, j = random.sample(range(len(states)), 2)
        merged = states[i].merge(states[j])
        states = [s for k, s in enumerate(states) if k not in (i, j)]
        states.append(merged)
    state, exact = states[0], oracle(z)
    scale = 1 + abs(float(exact.logsumexp))
    assert abs(state.logsumexp - float(exact.logsumexp)) <= CLOSE * scale
    assert 1 <= state.total <= len(z) * (1 + CLOSE)
    mean = mpmath.fdot(exact.softmax, values[:, 0].tolist())
    assert abs(state.finalize()[0] - float(mean)) <= CLOSE
    assert abs(state.finalize()[1] - 1) <= CLOSE
    p = torch.tensor([float(v) for v in exact.softmax], dtype=F64)
    got = torch.cat([state.softmax(chunk) for chunk in z.split(size)])
    # An exponent down to -62 is rounded by 62 u, and CLOSE on top.
    torch.testing.assert_close(got, p, rtol=2e-14, atol=0)


@pytest.mark.parametrize("bases", [(2, 3, 5), (-1, 0, 4)])
def test_the_monoid_is_that_of_the_formula_in_fractions(bases):
    """With powers of two for weights nothing rounds: equal, bit for bit."""
    log2 = math.log(2)
    states = []
    for k in bases:
        total = torch.tensor([float(Fraction(3, 2))], dtype=F64)
        top = torch.tensor([k * log2], dtype=F64)
        states.append(OnlineSoftmax(top, total, None, F64))
    exact = sum(Fraction(3, 2) * Fraction(2) ** k for k in bases)
    for a, b, c in itertools.permutations(states):
        left, right = a.merge(b).merge(c), a.merge(b.merge(c))
        for state in (left, right):
            value = (state.top / log2).round().exp2() * state.total
            assert abs(value.item() / float(exact) - 1) <= 8 * 2.0**-53


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_narrow_formats_keep_the_promise_of_the_library(dtype, scale):
    z = normal(20, 200, dtype=dtype, scale=scale)
    state = of(z, size=7)
    assert state.top.dtype == state.total.dtype == F64
    lse, p = (
        state.logsumexp,
        torch.cat(list(streaming_softmax(z.split(7, 1), 1)), 1),
    )
    assert lse.dtype == p.dtype == dtype
    # The hair of float16 is 2**-14 ulp: PyTorch rounds it by float32.
    hair = 2.0**-14 if dtype == F16 else 1e-6
    for row, value, shares in zip(z, lse, p, strict=True):
        exact = oracle(row)
        s = max(abs(exact.logsumexp), abs(float(row.max())), math.log(200))
        allowed = (0.5 + hair) * spacing(exact.logsumexp, dtype)
        error = abs(mpmath.mpf(value.item()) - exact.logsumexp)
        assert error <= allowed + 2.0**-50 * s
        assert ulp_error(shares, exact.softmax) <= 0.5 + hair


@pytest.mark.parametrize("rising", [True, False])
def test_a_thousand_chunks_cost_no_digits(rising):
    z = torch.linspace(-5, 5, 1000, dtype=F64)
    z = z if rising else z.flip(0)
    exact = oracle(z).logsumexp
    state = of(z)
    # Each of 1000 merges rounds the sum three times; they half cancel.
    assert abs(state.logsumexp - float(exact)) <= 3000 * 2.0**-53


def test_attention_is_that_of_pytorch():
    q, k, v = (normal(2, 3, 5, 4, seed=s) for s in range(3))
    scores = q @ k.mT / 2
    mask = torch.rand(5, 5, generator=generator(3)) < 0.7
    mask[2] = False  # nothing to attend to
    state = NOTHING
    for at in (slice(0, 2), slice(2, 2), slice(2, 5)):
        state = state.update(
            scores[..., at], values=v[..., at, :], mask=mask[..., at]
        )
    peer = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask
    )
    assert not state.finalize()[:, :, 2].any()
    torch.testing.assert_close(state.finalize(), peer, rtol=0, atol=1e-14)


def test_one_set_of_values_may_serve_all_rows():
    z, v = normal(2, 3, 6), normal(6, 4, seed=1)
    state = of(z, v, size=4)
    peer = softmaxlib.softmax(z, -1) @ v
    torch.testing.assert_close(state.finalize(), peer, rtol=0, atol=1e-14)
    front = OnlineSoftmax().update(z.movedim(-1, 0), 0, values=v)
    assert torch.equal(
        front.finalize(), NOTHING.update(z, values=v).finalize()
    )


# ----------------------------------------------------------- the monoid


def test_nothing_is_the_identity():
    state = of(normal(3, 5), normal(5, 2), size=2)
    same(NOTHING.merge(state), state)
    same(state.merge(NOTHING), state)
    same(NOTHING.merge(NOTHING), NOTHING)
    empty = state.update(normal(3, 0), values=normal(0, 2))
    same(empty, state)
    assert NOTHING.logsumexp == -INF
    assert NOTHING.total == 0
    assert NOTHING.top == -INF


def test_a_state_of_nothing_but_minus_infinity_is_neutral_too():
    state = of(normal(3, 5), size=2)
    hidden = NOTHING.update(torch.full((3, 4), -INF, dtype=F64))
    assert hidden.logsumexp.eq(-INF).all()
    assert not hidden.total.any()
    same(state.merge(hidden), state)
    same(hidden.merge(state), state)


def test_merging_commutes_bit_for_bit_and_associates_up_to_rounding():
    different = 0
    for seed in range(300):
        a, b, c = (NOTHING.update(z) for z in normal(3, 1, seed=seed) * 9)
        same(a.merge(b), b.merge(a))
        left, right = a.merge(b).merge(c), a.merge(b.merge(c))
        different += not torch.equal(left.total, right.total)
        torch.testing.assert_close(
            left.total, right.total, rtol=1e-15, atol=0
        )
    assert different  # and no test may ask for equality


def test_a_state_never_changes():
    state = of(normal(3, 5))
    before = dataclasses.replace(state, top=state.top.clone())
    state.update(normal(3, 5, scale=9.0))
    state.merge(state)
    same(state, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.top = 0


# ---------------------------------------------------------- special values

ROWS = [
    [1.0, 2.0, 3.0, 4.0],
    [-INF, -INF, -INF, -INF],
    [-INF, -INF, 3.0, -INF],
    [-INF, INF, 0.0, 1.0],
    [INF, INF, 0.0, -INF],
    [NAN, 1.0, 2.0, INF],
    [-INF, -INF, NAN, -INF],
    [3e38, -3e38, 3e38, 3e38],
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_special_values_are_those_of_the_library(size, dim, dtype):
    z = torch.tensor(ROWS, dtype=dtype)
    z = z if dim else z.mT.contiguous()
    lse = streaming_logsumexp(z.split(size, dim), dim)
    p = torch.cat(list(streaming_softmax(z.split(size, dim), dim)), dim)
    close = functools.partial(
        torch.testing.assert_close, rtol=2e-15, atol=0, equal_nan=True
    )
    close(lse, softmaxlib.logsumexp(z, dim))
    close(p, softmaxlib.softmax(z, dim))


def test_finalize_is_nan_in_the_rows_that_are_and_zero_without_weight():
    z = torch.tensor(ROWS[:7], dtype=F64)
    got = of(z, torch.ones(4, 2, dtype=F64), size=2).finalize()
    assert got[[0, 2]].sub(1).abs().max() <= 1e-15
    assert got[1].tolist() == [0, 0]
    assert got[3:].isnan().all()


def test_masks_are_those_of_the_library():
    z = torch.tensor([[1.0, NAN, 2.0], [INF, 1.0, 0.0], [NAN, INF, 1.0]])
    z = torch.cat([z, torch.zeros(1, 3)]).double()
    mask = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]]).bool()
    halves = list(zip(z.split(2, 1), mask.split(2, 1), strict=True))
    state = NOTHING
    for chunk, part in halves:
        state = state.update(chunk, mask=part)
    lse = softmaxlib.logsumexp(z, 1, mask=mask)
    torch.testing.assert_close(state.logsumexp, lse, rtol=0, atol=1e-15)
    p = [state.softmax(chunk, mask=part) for chunk, part in halves]
    right = softmaxlib.softmax(z, 1, mask=mask)
    torch.testing.assert_close(torch.cat(p, 1), right, rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (0, 3), (2, 3, 0, 4)])
def test_shapes_that_are_hardly_there(shape):
    z = torch.zeros(shape)
    dim = -2 if len(shape) == 4 else -1
    state = NOTHING.update(z, dim)
    assert torch.equal(state.logsumexp, softmaxlib.logsumexp(z, dim))
    assert torch.equal(state.softmax(z, dim), softmaxlib.softmax(z, dim))


def test_mixed_formats_are_promoted():
    state = NOTHING.update(normal(3, 2, dtype=F16))
    assert state.logsumexp.dtype == F16
    assert state.update(normal(3, 2, dtype=BF16)).logsumexp.dtype == F32
    assert state.merge(of(normal(3, 2))).logsumexp.dtype == F64


# ------------------------------------------------------------- the streams


class Counting:
    """Chunks made on the spot, each pass anew, and never two at a time."""

    def __init__(self, n):
        self.n, self.passes = n, 0

    def __iter__(self):
        self.passes += 1
        return (normal(4, 50, seed=k) for k in range(self.n))


def test_streams_read_once_or_twice():
    chunks = Counting(6)
    whole = torch.cat(list(Counting(6)), 1)
    lse = streaming_logsumexp(iter(chunks), 1)
    right = softmaxlib.logsumexp(whole, 1)
    torch.testing.assert_close(lse, right, rtol=1e-14, atol=0)
    chunks.passes = 0
    p = streaming_softmax(chunks, 1)
    assert chunks.passes == 1 + 1  # the second begins with the iterator
    right = softmaxlib.softmax(whole, 1)
    torch.testing.assert_close(
        torch.cat(list(p), 1), right, rtol=1e-13, atol=0
    )
    assert streaming_logsumexp([], 0) == -INF
    assert list(streaming_softmax([], 0)) == []


# ------------------------------------------------------------- derivatives


def by_stream(z, size=2):
    return of(z, size=size).logsumexp


def attention(z, v, size=2):
    return of(z, v, size=size).finalize()


def shares(z, size=2):
    return torch.cat(list(streaming_softmax(z.split(size, -1), -1)), -1)


def test_derivatives_of_both_orders_in_both_modes():
    z, v = normal(2, 5).requires_grad_(), normal(5, 3).requires_grad_()
    for function, inputs in (
        (by_stream, (z,)),
        (shares, (z,)),
        (attention, (z, v)),
    ):
        options = {"check_forward_ad": True}
        assert torch.autograd.gradcheck(function, inputs, **options)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_functional_transforms():
    z = normal(4, 5)
    close = functools.partial(
        torch.testing.assert_close, rtol=0, atol=1e-14
    )
    hessian = torch.func.hessian(by_stream)(z[0])
    close(hessian, softmaxlib.logsumexp_hessian(z[0], 0))
    jacobian = torch.func.jacrev(shares)(z[0])
    close(jacobian, softmaxlib.softmax_jacobian(z[0], 0))
    close(torch.func.jacfwd(shares)(z[0]), jacobian)
    close(torch.func.vmap(by_stream)(z), by_stream(z))
    # jacfwd over jacfwd: a nested forward mode that forgets is all zero.
    twice = torch.func.jacfwd(torch.func.jacfwd(by_stream))(z[0])
    close(twice, hessian)


def test_gradients_at_minus_infinity():
    rows = [[1.0, -INF, 2.0], [-INF] * 3, [-INF, -INF, 5.0]]
    z = torch.tensor(rows, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(by_stream(z).sum(), z)
    right = softmaxlib.softmax(z.detach(), 1)  # NaN in the second row
    torch.testing.assert_close(g, right, equal_nan=True, rtol=0, atol=1e-15)
    v = normal(3, 2).requires_grad_()
    gz, gv = torch.autograd.grad(attention(z, v).square().sum(), (z, v))
    assert gz.isfinite().all()
    assert gv.isfinite().all()
    assert not gz[1].any()
    assert not gz[2].any()
    out = (softmaxlib.softmax(z.detach()[::2], 1) @ v).square().sum()
    (right,) = torch.autograd.grad(out, v)
    torch.testing.assert_close(gv, right, rtol=0, atol=1e-14)


def test_a_masked_row_has_zero_gradient():
    z = torch.tensor([[NAN, INF], [1.0, -INF]], dtype=F64)
    mask = torch.tensor([[False, False], [True, False]])
    for read in (
        lambda s, x: s.logsumexp[1],
        lambda s, x: s.logsumexp.sum(),
        lambda s, x: s.softmax(x, mask=mask).square().sum(),
    ):
        x = z.clone().requires_grad_()
        state = NOTHING.update(x, mask=mask)
        read(state, x).backward()
        assert x.grad[~mask].eq(0).all()
        assert x.grad.isfinite().all()


def test_compiled():
    z, v = normal(3, 6), normal(6, 2)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z, v), attention(z, v))


# ------------------------------------------------------------- refusals

Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NOTHING.update([1.0]), TypeError, "a torch.Tensor"),
        (lambda: NOTHING.update(Z.int()), NotImplementedError, "dtype="),
        (lambda: NOTHING.update(Z, 2), IndexError, r"\[-2, 1\]"),
        (lambda: NOTHING.update(Z, mask=Z), TypeError, "bool"),
        (
            lambda: NOTHING.update(Z, values=torch.zeros(2, 3)),
            RuntimeError,
            r"values must be of shape \(3, 3\), got \(2, 3\)",
        ),
        (
            lambda: NOTHING.update(Z, values=torch.zeros(3)),
            RuntimeError,
            "values must be of shape",
        ),
        (
            lambda: NOTHING.update(Z, values=[1.0]),
            TypeError,
            "values must be a torch.Tensor",
        ),
        (
            lambda: NOTHING.update(Z, values=torch.zeros(3, 1).double()),
            RuntimeError,
            "of dtype and device of input",
        ),
        (
            lambda: NOTHING.update(Z).update(torch.zeros(5, 3)),
            RuntimeError,
            r"batch must be of shape \(2, 1\), that of self, got \(5, 1\)",
        ),
        (
            lambda: NOTHING.update(Z).update(Z, values=torch.zeros(3, 1)),
            ValueError,
            "some with and some without",
        ),
        (lambda: NOTHING.update(Z).finalize(), ValueError, "got none"),
        (lambda: NOTHING.finalize(), ValueError, "got none"),
        (
            lambda: NOTHING.update(Z).softmax(torch.zeros(5, 3)),
            RuntimeError,
            "the state must be of shape",
        ),
        (lambda: streaming_logsumexp(Z, 1), TypeError, "split"),
        (lambda: streaming_logsumexp(3, 1), TypeError, "int"),
        (
            lambda: streaming_softmax(iter([Z]), 1),
            TypeError,
            "readable twice, got list_iterator",
        ),
        (lambda: streaming_softmax([Z, "z"], 1), TypeError, "str"),
    ],
)
def test_refusals_say_what_was_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_numpy_integers_are_dimensions():
    assert torch.equal(of(Z, dim=np.int64(0)).top, of(Z, dim=0).top)
