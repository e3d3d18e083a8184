"""softmax, log_softmax and logsumexp against mpmath, PyTorch and words."""

import itertools
import json
import math
import pathlib

import hypothesis.strategies as st
import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from drawn import generator, randn
from hypothesis import given

import softmaxlib
from softmaxlib import log_softmax, logsumexp, naive_softmax, softmax
from softmaxlib.testing import logits, oracle, spacing, ulp_error

F16, BF16 = torch.float16, torch.bfloat16
F32, F64 = torch.float32, torch.float64
DTYPES = (F16, BF16, F32, F64)
PUBLIC = (softmax, log_softmax, logsumexp)
# The contract: half an ulp and a hair where there is a wider format.
BOUND = {F16: 0.51, BF16: 0.51, F32: 0.51, F64: 5.0}
# (function, dtype) of which the exact value is compared, one per name.
ids = [f.__name__ for f in PUBLIC]

golden = json.loads(
    (pathlib.Path(__file__).parent / "data" / "golden.json").read_text()
)


# --- values --------------------------------------------------------------


@pytest.mark.parametrize("key", golden)
def test_golden_values(key):
    case = golden[key]
    z = torch.tensor([float(v) for v in case["z"]], dtype=F64)
    t = float(case["T"])
    # z and T are decimals rounded to float64, each good to half an ulp,
    # which the exponential magnifies by |z / T| < 5000.
    slack = {"rtol": 1e-15 * max(1.0, float(z.abs().max()) / t), "atol": 0}
    with mpmath.workdps(30):
        p = [float(mpmath.mpf(v)) for v in case["p"]]
        log_p = [float(mpmath.mpf(v)) for v in case["log_p"]]
        lse = float(mpmath.mpf(case["lse(z/T)"]))
    expect = torch.tensor(p, dtype=F64)
    torch.testing.assert_close(
        softmax(z, 0, temperature=t), expect, **slack
    )
    log_expect = torch.tensor(log_p, dtype=F64)
    # -5.1e-435 is below the smallest float64.
    got = log_softmax(z, 0, temperature=t)
    torch.testing.assert_close(got, log_expect, **slack)
    assert logsumexp(z / t, 0).item() == pytest.approx(lse, rel=1e-14)


def families(size, seed=0):
    """The kinds of rows on which softmax implementations differ."""
    g = generator(seed)
    normal = torch.randn(size, generator=g, dtype=F64)
    unit = torch.rand(size, generator=g, dtype=F64)
    dominant = normal.clone()
    dominant[size // 2] = normal.max() + math.log(size) + 20
    tail = -60 - 45 * unit
    tail[0] = 0
    return {
        "normal": normal,
        "wide": 2000 * unit - 1000,
        "dominant": dominant,
        "very dominant": dominant + 40 * (normal == dominant.min()),
        "tied": torch.full((size,), 3.3, dtype=F64),
        "nearly tied": 1e-3 * normal,
        "offset": 300 + 5 * normal,
        "tail": tail,
        "log-probabilities": torch.log_softmax(normal, 0),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 10, 100, 5000])
def test_accuracy(size, dtype):
    for name, z in families(size).items():
        x = z.to(dtype)
        exact = oracle(x)
        bound = BOUND[dtype]
        assert ulp_error(softmax(x, 0), exact.softmax) <= bound, name
        error = ulp_error(log_softmax(x, 0), exact.log_softmax)
        assert error <= bound, name
        assert lse_error(logsumexp(x, 0), x) <= 1, name


def lse_error(value, z):
    """The error of a log-sum-exp, over what is promised.

    Half an ulp of the result (and a hundredth) and 2^-50 of the largest of
    |LSE|, |max z| and log K; for float64, 4 ulp of that scale.
    """
    exact = oracle(z).logsumexp
    top = abs(mpmath.mpf(z.max().item()))
    scale = max(abs(exact), top, mpmath.log(len(z)))
    if z.dtype == F64:
        allowed = 4 * spacing(scale, F64)
    else:
        allowed = 0.51 * spacing(exact, z.dtype) + scale / 2**50
    return abs(mpmath.mpf(value.item()) - exact) / allowed


@pytest.mark.parametrize("name", ["normal", "wide", "dominant"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_accuracy_of_a_vocabulary(name, dtype):
    # Last dimension, and a strided one beside three other columns: K =
    # 131,072 is cut into chunks there.
    size = 131_072
    x = families(size)[name].to(dtype)
    exact = oracle(x, bits=140)
    columns = torch.stack((x, x * 0, x.flip(0), -x), 1)
    for y in (softmax(x, 0), softmax(columns, 0)[:, 0]):
        assert ulp_error(y, exact.softmax) <= BOUND[dtype]
    for y in (log_softmax(x, 0), log_softmax(columns, 0)[:, 0]):
        assert ulp_error(y, exact.log_softmax) <= BOUND[dtype]
    scale = mpmath.mpf(x.double().abs().max().item())
    scale = max(scale, abs(exact.logsumexp), mpmath.log(size))
    for y in (logsumexp(x, 0), logsumexp(columns, 0)[0]):
        error = ulp_error(
            y[None],
            [exact.logsumexp],
            scale=scale if dtype == F64 else None,
        )
        assert error <= (4 if dtype == F64 else 0.51)


@given(
    logits(dtype=F32, magnitude=200.0, min_classes=2, max_classes=6),
    st.sampled_from([0.01, 0.1, 0.37, 3.0, 77.7]),
)
def test_temperature_does_not_cost_accuracy_in_float32(z, t):
    exact = oracle(z, t)
    assert ulp_error(softmax(z, 0, temperature=t), exact.softmax) <= 0.51
    error = ulp_error(log_softmax(z, 0, temperature=t), exact.log_softmax)
    assert error <= 0.51


@given(
    logits(dtype=F64, magnitude=1000.0, min_classes=2, max_classes=6),
    st.floats(1e-3, 1e3),
)
def test_temperature_does_not_cost_accuracy_in_float64(z, t):
    exact = oracle(z, t)
    assert ulp_error(softmax(z, 0, temperature=t), exact.softmax) <= 5
    error = ulp_error(log_softmax(z, 0, temperature=t), exact.log_softmax)
    assert error <= 5


@pytest.mark.parametrize("gap", [1, 2, 5, 17, 37, 40, 100, 300, 700])
def test_the_winner_keeps_its_log_probability(gap):
    # pytorch#113708: elsewhere it is 0 from a gap of 37 on.
    value = log_softmax(torch.tensor([gap, 0.0], dtype=F64), 0)[0].item()
    with mpmath.workdps(400):
        exact = -mpmath.log1p(mpmath.exp(-gap))
        assert abs(value / exact - 1) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logsumexp_near_its_zero_set(dtype):
    # m + log(sum) cancels, and no fixed precision mends that: see lse_error.
    g = generator(1)
    for size in (2, 3, 10, 500):
        for _ in range(20):
            z = -10 * torch.rand(size, generator=g, dtype=F64)
            for _ in range(3):
                z = (z.double() - torch.logsumexp(z.double(), 0)).to(dtype)
            rest = torch.logsumexp(z[1:].double(), 0).item()
            if rest < 0:
                z[0] = math.log(-math.expm1(rest))
            assert lse_error(logsumexp(z, 0), z) <= 1
            rows = torch.stack((z, z - 3))
            assert lse_error(logsumexp(rows, 1)[0], z) <= 1


@pytest.mark.parametrize(
    "z", [(-1.8e-35, -80.0), (-1e-40, -92.1), (-1e-3, -6.9082553)]
)
def test_logsumexp_of_a_pair_that_cancels(z):
    x = torch.tensor(z, dtype=F32)
    assert lse_error(logsumexp(x, 0), x) <= 1


@pytest.mark.parametrize("v", [1.0, 1e8, 1e30, 3e38])
def test_equal_large_logits(v):
    # pytorch#11752, mlx#4169: x - logsumexp(x) gives 0.
    z = torch.tensor([v, v])
    half = torch.tensor(0.5).log().item()
    assert softmax(z, 0).tolist() == [0.5, 0.5]
    assert log_softmax(z, 0).tolist() == [half, half]


def test_extremes_of_the_format():
    for dtype in DTYPES:
        top = torch.finfo(dtype).max
        z = torch.tensor([top, -top], dtype=dtype)
        assert softmax(z, 0).tolist() == [1, 0]
        # The true value, -2 * top, is not representable.
        assert log_softmax(z, 0).tolist() == [0, -math.inf]
        assert logsumexp(z, 0).item() == top
        scaled = softmax(z, 0, temperature=float(top))
        exact = oracle(torch.tensor([1.0, -1.0])).softmax
        assert ulp_error(scaled, exact) <= BOUND[dtype]


def test_many_equal_half_precision_logits():
    # A float16 sum overflows from 65,504 on, a bfloat16 one sticks at 256.
    for dtype in (F16, BF16):
        p = softmax(torch.zeros(70_000, dtype=dtype), 0)
        assert torch.equal(p, torch.full_like(p, 1 / 70_000))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("size", [2049, 65_537, 1_000_000])
def test_sums_do_not_drift_with_the_length(size, dtype):
    # Each entry is within half an ulp, so the sum is within u.
    z = randn(size, seed=2).to(dtype)
    for p in (softmax(z, 0), softmax(z[:, None].repeat(1, 2), 0)[:, 1]):
        assert abs(p.double().sum().item() - 1) <= torch.finfo(dtype).eps


def test_every_width():
    # pytorch#147284: float64, wrong for some widths only.
    x = randn(3, 1100)
    for width in range(1, 1101):
        part = x[:, :width]
        expect = scipy.special.softmax(part.numpy(), axis=1)
        torch.testing.assert_close(
            softmax(part, 1), torch.from_numpy(expect), rtol=1e-14, atol=0
        )


# --- metamorphic ---------------------------------------------------------


@given(logits(max_classes=10), st.randoms(use_true_random=False))
def test_permutation(z, random):
    order = list(range(len(z)))
    random.shuffle(order)
    # Only the order of the sum changes: 10 terms, one ulp each.
    torch.testing.assert_close(
        softmax(z[order], 0), softmax(z, 0)[order], rtol=3e-15, atol=0
    )


@given(logits(kinds=("integer",), magnitude=5), st.integers(-1000, 1000))
def test_an_exact_translation_changes_no_bit(z, c):
    assert torch.equal(softmax(z + c, 0), softmax(z, 0))
    assert torch.equal(log_softmax(z + c, 0), log_softmax(z, 0))


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_is_deletion_is_a_mask(function, dtype):
    z = randn(6, seed=3).to(dtype)
    keep = torch.tensor([True, False, True, True, False, True])
    out = function(z.masked_fill(~keep, -math.inf), 0)
    masked = function(z.masked_fill(~keep, math.nan), 0, mask=keep)
    assert torch.equal(out, masked)
    if function is logsumexp:
        assert torch.equal(out, function(z[keep], 0))
    else:
        assert torch.equal(out[keep], function(z[keep], 0))
        nothing = 0 if function is softmax else -math.inf
        assert out[~keep].tolist() == [nothing] * 2


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
@pytest.mark.parametrize(
    "shape",
    [(5,), (3, 5), (5, 3), (2, 3, 4), (2, 70, 3), (1, 1), (300, 40)],
)
def test_every_dim_is_the_last_one_moved(function, shape):
    x = randn(*shape, dtype=F32)
    for dim in range(-len(shape), len(shape)):
        expect = function(x.movedim(dim, -1).contiguous(), -1)
        if function is not logsumexp:
            expect = expect.movedim(-1, dim)
        assert torch.equal(function(x, dim), expect)


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_is_its_rows(function, dtype):
    # Levels far apart: a global maximum would empty all rows but one.
    x = (randn(5, 5) + 500 * torch.arange(5)[:, None]).to(dtype)
    for dim in (0, 1):
        rows = [function(row, 0) for row in x.unbind(1 - dim)]
        expect = torch.stack(rows, -1 if function is logsumexp else 1 - dim)
        assert torch.equal(function(x, dim), expect)


def test_consistency_of_the_three():
    x = randn(7, 9, seed=4) * 5
    # exp amplifies an error of 5 ulp in a log-probability below 40.
    torch.testing.assert_close(
        log_softmax(x, 1).exp(), softmax(x, 1), rtol=5e-14, atol=0
    )
    total = logsumexp(x, 1, keepdim=True)
    torch.testing.assert_close(
        log_softmax(x, 1), x - total, rtol=1e-14, atol=1e-14
    )


# --- layouts -------------------------------------------------------------


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_layouts(function):
    base = randn(6, 8, 10, dtype=F32)
    views = {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "sliced": base[::2, 1::3, ::2],
        "expanded": base[:, :1].expand(6, 8, 10),
        "broadcast": torch.tensor(2.0).expand(3, 4, 5),
    }
    for name, view in views.items():
        for dim in range(3):
            got = function(view, dim)
            assert torch.equal(got, function(view.clone(), dim)), name
            assert got.is_contiguous()


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_no_input_is_modified(function):
    for dtype in DTYPES:
        x = randn(4, 5).to(dtype)
        mask = torch.ones(4, 5, dtype=torch.bool)
        mask[0, 1] = False
        before = x.clone(), mask.clone()
        for dim, m in itertools.product((0, 1), (None, mask)):
            function(x, dim, mask=m)
            if function is not logsumexp:
                function(x, dim, mask=m, temperature=0.3)
        assert torch.equal(x, before[0])
        assert torch.equal(mask, before[1])


def test_zero_dimensional():
    x = torch.tensor(3.0)
    for dim in (0, -1):
        assert softmax(x, dim) == 1
        assert log_softmax(x, dim) == 0
        assert logsumexp(x, dim) == 3
        assert logsumexp(x, dim, keepdim=True).shape == ()
        assert softmax(x, dim).shape == ()
    assert softmax(x, 0, mask=torch.tensor(False)) == 0


def test_empty():
    for shape, dim in (((0,), 0), ((2, 0), 1), ((2, 0), 0), ((0, 3), 1)):
        x = torch.empty(shape)
        for function in (softmax, log_softmax):
            assert function(x, dim).shape == shape
        expect = torch.logsumexp(x, dim)
        assert torch.equal(logsumexp(x, dim), expect)
        assert expect.numel() == 0 or (expect == -math.inf).all()


# --- special values ------------------------------------------------------

INF, NAN = math.inf, math.nan
SPECIAL = [
    [1.0, -INF],
    [-INF, -INF],
    [-INF],
    [INF, 0.0],
    [INF, INF, -INF],
    [INF, -INF],
    [NAN, 0.0],
    [NAN, -INF],
    [NAN, INF],
    [0.0, 0.0, -INF],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", PUBLIC, ids=ids)
@pytest.mark.parametrize("z", SPECIAL, ids=str)
def test_special_values_are_those_of_pytorch(function, z, dtype):
    peer = getattr(torch, function.__name__)
    # In a row of its own, so that a leak would show; and long, so that the
    # tiles are used.
    for padding in (0, 5000):
        fill = [-INF] * padding
        x = torch.tensor(
            [z + fill, [0.5] * (len(z) + padding)], dtype=dtype
        )
        got = function(x, 1)
        torch.testing.assert_close(
            got, peer(x, 1), equal_nan=True, rtol=2e-2, atol=0
        )
        assert not got[1].isnan().any()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("function", PUBLIC, ids=ids)
@pytest.mark.parametrize("z", SPECIAL, ids=str)
def test_gradients_at_special_values_are_those_of_pytorch(
    function, z, dtype
):
    peer = getattr(torch, function.__name__)
    x = torch.tensor([z, [0.5] * len(z)], dtype=dtype, requires_grad=True)
    v = randn(*function(x.detach(), 1).shape, dtype=dtype)
    (got,) = torch.autograd.grad(function(x, 1), x, v)
    (expect,) = torch.autograd.grad(peer(x, 1), x, v)
    torch.testing.assert_close(got, expect, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(dtype):
    x = torch.tensor([[1, 2, NAN], [NAN, INF, 0], [3, 1, 2]]).to(dtype)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    p, log_p = softmax(x, 1, mask=mask), log_softmax(x, 1, mask=mask)
    assert torch.equal(p[0, :2], softmax(x[0, :2], 0))
    assert p[0, 2] == 0
    assert p[1].tolist() == [0, 0, 0]
    assert torch.equal(p[2], softmax(x[2], 0))
    assert log_p[1].tolist() == [-INF] * 3
    assert log_p[0, 2] == -INF
    assert logsumexp(x, 1, mask=mask)[1] == -INF
    # Unmasked rows keep the IEEE rules.
    none = torch.tensor([[-INF, -INF, 0.0]], dtype=dtype)
    part = torch.tensor([[True, True, False]])
    assert softmax(none, 1, mask=part)[0, :2].isnan().all()
    assert softmax(none, 1, mask=part)[0, 2] == 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_masked_entries_never_reach_a_gradient(function, dtype):
    x = torch.tensor([[1, 2, NAN], [NAN, INF, 0]], dtype=dtype)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    x.requires_grad_()
    y = function(x, 1, mask=mask)
    v = torch.ones_like(y)
    if function is not logsumexp:
        v[~mask] = NAN
    (g,) = torch.autograd.grad(y, x, v, create_graph=True)
    assert g[~mask].tolist() == [0] * 4
    assert g[mask].isfinite().all()
    small = x.detach()[:1, :2].requires_grad_()
    y = function(small, 1)
    (expect,) = torch.autograd.grad(y, small, torch.ones_like(y))
    torch.testing.assert_close(g[:1, :2], expect)
    (gg,) = torch.autograd.grad(g[mask].sum(), x)
    assert gg[~mask].tolist() == [0] * 4
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.full_like(x, NAN).masked_fill(mask, 1.0)
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
        out = torch.autograd.forward_ad.unpack_dual(
            function(dual, 1, mask=mask)
        ).tangent
        assert out.isfinite().all()


def test_a_mask_broadcasts_to_the_input_and_no_further():
    x = randn(2, 3, 4)
    column = torch.tensor([True, False, True])[:, None]
    expect = softmax(x.masked_fill(~column, -INF), 1)
    assert torch.equal(softmax(x, 1, mask=column), expect)
    with pytest.raises(RuntimeError, match=r"\(2, 3, 4\).*\(5, 2, 3, 4\)"):
        softmax(x, 1, mask=torch.ones(5, 2, 3, 4, dtype=torch.bool))


# --- temperature ---------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_zero_is_the_limit(dtype):
    z = torch.tensor([[1, 3, 3, 2], [5, 1, 1, 1]], dtype=dtype)
    expect = torch.tensor([[0, 0.5, 0.5, 0], [1, 0, 0, 0]], dtype=dtype)
    assert torch.equal(softmax(z, 1, temperature=0), expect)
    assert torch.equal(
        log_softmax(z, 1, temperature=0), expect.double().log().to(dtype)
    )
    assert torch.equal(softmax(z, 1, temperature=0.0), expect)
    # Differences far below any float's spacing at one still count.
    tiny = torch.tensor([2e-7, 1e-7, 0], dtype=dtype)
    assert softmax(tiny, 0, temperature=0).tolist() == [1, 0, 0]
    for special in ([NAN, 1.0], [INF, 1.0], [-INF, -INF]):
        x = torch.tensor(special, dtype=dtype)
        assert softmax(x, 0, temperature=0).isnan().all()
    x = torch.tensor([-INF, 1.0, 1.0], dtype=dtype)
    assert softmax(x, 0, temperature=0).tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_infinity_is_uniform(dtype):
    z = torch.tensor([1, 3, -INF, 2, -7], dtype=dtype)
    expect = torch.tensor([0.25, 0.25, 0, 0.25, 0.25], dtype=dtype)
    assert torch.equal(softmax(z, 0, temperature=INF), expect)
    top = torch.finfo(dtype).max
    z = torch.tensor([top, -top], dtype=dtype)
    assert softmax(z, 0, temperature=INF).tolist() == [0.5, 0.5]


def test_shift_then_divide():
    # z / T overflows in all of these.
    half = torch.tensor([300, 299], dtype=F16)
    assert softmax(half, 0, temperature=1e-3).tolist() == [1, 0]
    z = torch.tensor([1.0, 1.0])
    assert softmax(z, 0, temperature=1e-40).tolist() == [0.5, 0.5]
    z = torch.tensor([2e-9, 1e-9, 0.0], dtype=F64)
    assert softmax(z, 0, temperature=5e-324).tolist() == [1, 0, 0]
    tiny = torch.tensor([5e-324, 0.0], dtype=F64)
    assert (
        ulp_error(
            softmax(tiny, 0, temperature=5e-324), oracle([1.0, 0.0]).softmax
        )
        <= 5
    )


@pytest.mark.parametrize("t", [0.0, INF])
def test_gradient_at_the_limits_of_temperature_is_zero(t):
    x = randn(5).requires_grad_()
    (g,) = torch.autograd.grad(softmax(x, 0, temperature=t)[0], x)
    assert g.tolist() == [0] * 5


# --- dtype and out -------------------------------------------------------


def test_dtype_is_cast_before_computing():
    z = torch.tensor([0, 255], dtype=torch.uint8)
    expect = oracle([0.0, 255.0]).softmax
    assert ulp_error(softmax(z, 0, dtype=F32), expect) <= 0.51
    half = torch.tensor([1.0, 2.0, 3.0], dtype=F16)
    assert torch.equal(
        softmax(half, 0, dtype=F64), softmax(half.double(), 0)
    )
    back = softmax(half.double(), 0, dtype=F16)
    assert torch.equal(back, softmax(half, 0))
    x = half.clone().requires_grad_()
    assert (
        torch.autograd.grad(softmax(x, 0, dtype=F32)[0], x)[0].dtype == F16
    )


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
)
def test_logsumexp_promotes_integers(dtype):
    z = torch.tensor([1, 0, 1]).to(dtype)
    assert logsumexp(z, 0).dtype == torch.get_default_dtype()
    assert torch.equal(logsumexp(z, 0), logsumexp(z.float(), 0))


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_out(function):
    x = randn(64, 300, dtype=F32)
    expect = function(x, 1)
    out = torch.empty_like(expect)
    assert function(x, 1, out=out) is out
    assert torch.equal(out, expect)
    empty = torch.empty(0)
    assert function(x, 1, out=empty) is empty
    assert torch.equal(empty, expect)
    strided = torch.empty(*expect.shape, 2)[..., 0]
    function(x, 1, out=strided)
    assert torch.equal(strided, expect)


@pytest.mark.parametrize("function", [softmax, log_softmax], ids=ids[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (40, 3000), (2, 300_000)])
def test_in_place(function, dtype, shape):
    x = randn(*shape).to(dtype)
    for dim in (0, 1):
        expect = function(x, dim)
        y = x.clone()
        function(y, dim, out=y)
        assert torch.equal(y, expect)
    square = randn(50, 50).to(dtype)
    expect = function(square, 1)
    function(square, 1, out=square.T)
    assert torch.equal(square.T, expect)


def test_out_is_checked():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"\(2, 3\).*\(3, 2\)"):
        softmax(x, 1, out=torch.empty(3, 2))
    with pytest.raises(RuntimeError, match=r"float32.*float64"):
        softmax(x, 1, out=torch.empty(2, 3, dtype=F64))
    with pytest.raises(TypeError, match="out must be a torch.Tensor"):
        softmax(x, 1, out=[0.0])
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        softmax(x.requires_grad_(), 1, out=torch.empty(2, 3))
    with torch.no_grad():
        softmax(x, 1, out=torch.empty(2, 3))


# --- errors --------------------------------------------------------------


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_bad_input(function):
    x = torch.zeros(2, 3)
    name = function.__name__
    with pytest.raises(TypeError, match=r"torch.Tensor, got list"):
        function([1.0, 2.0], 0)
    with pytest.raises(TypeError, match="dim"):
        function(x)
    for dim in (1.5, "1", None, True, (0, 1)):
        if function is logsumexp and dim == (0, 1):
            continue  # log-sum-exp takes several
        with pytest.raises(TypeError, match=rf"{name}\(\): dim must be"):
            function(x, dim)
    for dim in (2, -3):
        with pytest.raises(IndexError, match=rf"\[-2, 1\].*got {dim}"):
            function(x, dim)
    for dtype in (torch.complex64, torch.complex128):
        with pytest.raises(NotImplementedError, match="complex"):
            function(x.to(dtype), 1)
        with pytest.raises(NotImplementedError, match="complex"):
            function(x.to(dtype), 1, dtype=F32)
        with pytest.raises(NotImplementedError, match="complex"):
            function(x, 1, dtype=dtype)
    with pytest.raises(NotImplementedError, match="8-bit.*dtype="):
        function(x.to(torch.float8_e4m3fn), 1)
    assert function(x.to(torch.float8_e4m3fn), 1, dtype=F32).dtype == F32
    with pytest.raises(NotImplementedError, match="int32"):
        function(x, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match="torch.dtype"):
        function(x, 1, dtype=float)
    with pytest.raises(NotImplementedError, match="to_dense"):
        function(x.to_sparse(), 1)
    with pytest.raises(TypeError, match=r"bool.*int64"):
        function(x, 1, mask=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask must be a torch.Tensor"):
        function(x, 1, mask=[True])
    with pytest.raises(RuntimeError, match=r"\(2, 3\).*\(2, 2\)"):
        function(x, 1, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="device"):
        function(x, 1, mask=torch.ones(2, 3, device="meta").bool())


@pytest.mark.parametrize("function", [softmax, log_softmax], ids=ids[:2])
def test_bad_input_of_the_elementwise_two(function):
    x = torch.zeros(2, 3)
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(
            NotImplementedError, match="dtype=torch.float32"
        ):
            function(x.to(dtype), 1)
    for t in (-1, -0.5, NAN, -INF):
        with pytest.raises(ValueError, match=r"temperature.*-input"):
            function(x, 1, temperature=t)
    for t in ("1", None, True, torch.tensor(1.0), 1j):
        with pytest.raises(TypeError, match="temperature must be"):
            function(x, 1, temperature=t)
    assert function(x, 1, temperature=np.float32(0.5)).shape == x.shape
    with pytest.raises(TypeError):
        function(x, 1, 2.0)


def test_logsumexp_checks_keepdim():
    with pytest.raises(TypeError, match="keepdim"):
        logsumexp(torch.zeros(2), 0, 1)


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_exception_types_are_those_of_pytorch(function):
    peer = getattr(torch, function.__name__)
    x = torch.zeros(2, 3)
    calls = [([1.0], 0), (x, 7), (x, "a")]
    if function is not logsumexp:
        calls += [(x.long(), 1), (x.to(torch.complex64), 1)]
    for args in calls:
        with pytest.raises(Exception) as theirs:
            peer(*args)
        with pytest.raises(theirs.type):
            function(*args)


# --- derivatives ---------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
DIFFERENTIABLE = {
    "softmax": lambda x: softmax(x, 1),
    "softmax dim 0": lambda x: softmax(x, 0, temperature=0.7),
    "softmax masked": lambda x: softmax(x, 1, mask=MASK),
    "log_softmax": lambda x: log_softmax(x, 1, temperature=2.0),
    "log_softmax masked": lambda x: log_softmax(
        x, 1, mask=MASK
    ).masked_fill(~MASK, 0),
    "logsumexp": lambda x: logsumexp(x, 1),
    "logsumexp dim 0": lambda x: logsumexp(x, 0, keepdim=True),
    "logsumexp masked": lambda x: logsumexp(x, 1, mask=MASK)[:2],
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    x = randn(3, 4, seed=5).requires_grad_()
    f = DIFFERENTIABLE[name]
    assert torch.autograd.gradcheck(
        f,
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        f,
        x,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
@pytest.mark.parametrize("depth", [2, 3])
def test_nested_transforms_by_value(function, depth):
    # A custom jvp can return silent zeros under nested forward mode.
    peer = getattr(torch, function.__name__)
    modes = (torch.func.jacrev, torch.func.jacfwd)
    x = randn(4, seed=6)

    def nest(f, order):
        g = lambda z: f(z, 0)  # noqa: E731
        for mode in order:
            g = mode(g)
        return g(x)

    expect = nest(peer, (torch.func.jacrev,) * depth)
    assert expect.abs().max() > 0.01
    for order in itertools.product(modes, repeat=depth):
        # Fourth-order cancellation of entries below one.
        torch.testing.assert_close(
            nest(function, order), expect, rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_vmap(function):
    x = randn(3, 4, 5)
    mask = randn(4, 5, seed=7) > -0.5
    for batch in range(3):
        got = torch.func.vmap(lambda z: function(z, -1), in_dims=batch)(x)
        assert torch.equal(got, function(x.movedim(batch, 0), -1))
    got = torch.func.vmap(lambda z, m: function(z, 0, mask=m))(x[0], mask)
    assert torch.equal(got, function(x[0], 1, mask=mask))
    got = torch.func.vmap(lambda m: function(x[0, 0], 0, mask=m))(mask)
    assert torch.equal(got, function(x[0, :1].expand(4, 5), 1, mask=mask))
    per_sample = torch.func.vmap(
        torch.func.grad(lambda z: function(z, 0).square().sum())
    )(x[0])
    y = x[0].clone().requires_grad_()
    (expect,) = torch.autograd.grad(function(y, 1).square().sum(), y)
    torch.testing.assert_close(per_sample, expect)


@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_jacobian_vectorized(function):
    x = randn(4)
    expect = torch.func.jacrev(lambda z: function(z, 0))(x)
    for strategy in ("reverse-mode", "forward-mode"):
        got = torch.autograd.functional.jacobian(
            lambda z: function(z, 0), x, vectorize=True, strategy=strategy
        )
        torch.testing.assert_close(got, expect)


@pytest.mark.parametrize("gap", [1, 10, 40, 100, 300, 700])
def test_vjp_keeps_its_digits(gap):
    # jax#40384: y (v - y . v) cancels where y is nearly one.
    z = torch.tensor([gap, 0.0], dtype=F64, requires_grad=True)
    v = torch.tensor([1.0, 3.0], dtype=F64)
    (g,) = torch.autograd.grad(softmax(z, 0), z, v)
    (h,) = torch.autograd.grad(log_softmax(z, 0)[0], z)
    with mpmath.workdps(700):
        q = 1 / (1 + mpmath.exp(gap))
        for got, exact in zip(
            (*g.tolist(), *h.tolist()),
            (-2 * q * (1 - q), 2 * q * (1 - q), q, -q),
            strict=True,
        ):
            assert abs(got / exact - 1) <= 1e-13


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 5000), (300_000,), (900, 7)])
def test_gradients_of_large_tensors(shape, dtype):
    # Through the tiles and, at 300,000, through the chunks.
    x = randn(*shape, dtype=dtype).requires_grad_()
    v = randn(*shape, dtype=dtype, seed=8)
    for function, peer in ((softmax, torch.softmax), (log_softmax, None)):
        for dim in range(len(shape)):
            (got,) = torch.autograd.grad(function(x, dim), x, v)
            y = x.detach().double().requires_grad_()
            f = peer or torch.log_softmax
            (expect,) = torch.autograd.grad(f(y, dim), y, v.double())
            # Relative to the largest entry, as v - y . v cancels.
            scale = expect.abs().max().item()
            slack = 1e-6 if dtype == F32 else 1e-12
            error = (got - expect).abs().max().item() / scale
            assert error <= slack
            # The gradient of anything of softmax sums to zero; float32
            # entries bring half an ulp each.
            total = got.double().sum(dim).abs().max().item()
            assert total <= 2 * torch.finfo(dtype).eps * expect.abs().sum()


def test_two_backward_passes_and_partial_graphs():
    x = randn(3, 4).requires_grad_()
    for function in PUBLIC:
        y = function(x, 1).sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        second = torch.autograd.grad(y, x)[0]
        assert torch.equal(first, second)
        assert not function(x.detach(), 1).requires_grad
        with torch.inference_mode():
            function(x, 1)


def test_per_row_upstream_gradients():
    x = randn(4, 5, seed=9).requires_grad_()
    weights = torch.tensor([0.0, 1.0, -2.0, 1e6], dtype=F64)
    rows = torch.func.vmap(torch.func.grad(lambda z: logsumexp(z, 0)))(
        x.detach()
    )
    (got,) = torch.autograd.grad(logsumexp(x, 1), x, weights)
    torch.testing.assert_close(got, weights[:, None] * rows)


@pytest.mark.slow
@pytest.mark.parametrize("function", PUBLIC, ids=ids)
def test_compile(function):
    def loss(z, mask):
        extra = {} if function is logsumexp else {"temperature": 0.5}
        plain = function(z, 1, **extra)
        masked = function(z, 0, mask=mask).masked_fill(~mask.any(0), 0)
        parts = (v.clamp(min=-1e3).square().sum() for v in (plain, masked))
        return plain, sum(parts)

    compiled = torch.compile(loss, fullgraph=True)
    x = randn(5, 6, dtype=F32)
    x[0, 0] = -INF
    x[1, :] += 30 * torch.eye(6)[2]
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 1] = False
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expect = compiled(a, mask), loss(b, mask)
    # Both are computed in float64 and rounded once.
    torch.testing.assert_close(got[0], expect[0], rtol=1e-7, atol=0)
    (g,) = torch.autograd.grad(got[1], a)
    (h,) = torch.autograd.grad(expect[1], b)
    torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-9)


# --- the foil ------------------------------------------------------------


def test_naive_softmax_is_the_textbook_formula():
    z = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(naive_softmax(z, 0), z.exp() / z.exp().sum())
    assert naive_softmax(torch.tensor([1000.0, 2000.0]), 0).isnan().all()
    assert naive_softmax(torch.tensor([88.5, 88.5]), 0).tolist() == [0, 0]


def test_the_public_names():
    assert set(ids) | {"naive_softmax"} <= set(softmaxlib.__all__)
    for name in softmaxlib.__all__:
        assert hasattr(softmaxlib, name)
