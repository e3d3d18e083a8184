"""softmaxlib.derivatives: values, shapes, structure, autograd, errors."""

import itertools
import math

import mpmath
import pytest
import torch
from drawn import f64, randn
from hypothesis import given, settings
from torch import func
from torch.autograd import gradcheck, gradgradcheck

from softmaxlib import derivatives as d
from softmaxlib import testing

NARROW = (torch.float16, torch.bfloat16, torch.float32)
GAPS = (1, 5, 17, 37, 40, 100, 300, 500, 700)
DENSE = (d.softmax_jacobian, d.log_softmax_jacobian, d.softmax_hessian)


def delta(*indices):
    return int(len(set(indices)) == 1)


def exact(z, temperature=1):
    """Jacobian, log-Jacobian and Hessian of a row, entry by entry."""
    with mpmath.workprec(4000):
        o = testing.oracle(z.tolist(), temperature=temperature)
        p, s = o.softmax, 1 / mpmath.mpf(temperature)
        n = range(len(p))
        jacobian = [
            s * p[i] * (delta(i, j) - p[j])
            for i, j in itertools.product(n, n)
        ]
        log = [s * (delta(i, j) - p[j]) for i, j in itertools.product(n, n)]
        hessian = [
            s**2
            * p[i]
            * (
                (delta(i, j) - p[j]) * (delta(i, k) - p[k])
                - p[j] * (delta(j, k) - p[k])
            )
            for i, j, k in itertools.product(n, n, n)
        ]
        return jacobian, log, hessian


def relative_error(computed, true):
    worst = 0.0
    for a, b in zip(computed.flatten().tolist(), true, strict=True):
        if abs(b) < 1e-290:  # about to underflow
            assert abs(a - b) < 1e-290
            continue
        worst = max(worst, float(abs((mpmath.mpf(a) - b) / b)))
    return worst


def matches(ours, theirs, bound=1e-12, scale=None):
    """To 1e-12 of the largest entry, or of what summed up to it."""
    assert ours.shape == theirs.shape
    scale = theirs if scale is None else scale
    assert (ours - theirs).abs().max() <= bound * scale.abs().max()


# --- values --------------------------------------------------------------


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("row", ["two", "three", "many"])
def test_dense_derivatives_keep_their_digits_at_every_gap(gap, row):
    z = {
        "two": f64(gap, 0.1),
        "three": f64(0.3, gap, gap - 0.7),
        "many": f64(0.0, gap + 0.3, -0.25, 1.75),
    }[row]
    for function, true in zip(DENSE, exact(z), strict=True):
        assert relative_error(function(z, 0), true) <= 1e-13


@pytest.mark.parametrize("gap", GAPS)
def test_products_keep_their_digits_at_every_gap(gap):
    z, u, v = f64(gap + 0.1, 0, -0.7), f64(1, 2, 4.5), f64(-3, 0.5, 1)
    jacobian, _, hessian = exact(z)
    with mpmath.workprec(4000):
        jvp = [
            mpmath.fsum(jacobian[3 * i + j] * v[j].item() for j in range(3))
            for i in range(3)
        ]
        hvp = [
            mpmath.fsum(
                hessian[9 * i + 3 * j + k] * u[i].item() * v[j].item()
                for i in range(3)
                for j in range(3)
            )
            for k in range(3)
        ]
    assert relative_error(d.softmax_jvp(z, v, 0), jvp) <= 1e-13
    assert relative_error(d.softmax_vjp(z, v, 0), jvp) <= 1e-13
    assert relative_error(d.logsumexp_hvp(z, v, 0), jvp) <= 1e-13
    assert relative_error(d.softmax_hvp(z, u, v, 0), hvp) <= 1e-13
    assert relative_error(d.softmax_hvp(z, v, u, 0), hvp) <= 1e-13
    if gap > 1:
        # A confident row forgives any constant: J 1 = 0.
        far = 2.0**20
        shifted = d.softmax_hvp(z, u + far, v - far, 0)
        assert relative_error(shifted, hvp) <= 1e-13
        assert relative_error(d.softmax_jvp(z, v + far, 0), jvp) <= 1e-13


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_formats_are_computed_wide(dtype, temperature):
    z = randn(6, dtype=torch.float64).mul(3).to(dtype)
    for function, true in zip(DENSE, exact(z, temperature), strict=True):
        computed = function(z, 0, temperature=temperature)
        assert computed.dtype == dtype
        # 1 - 2 p_i has a zero, near which nothing is to be had.
        allowed = 2.1
        assert testing.ulp_error(computed, true) <= allowed
    v = randn(6, seed=1).to(dtype)
    jacobian = exact(z, temperature)[0]
    with mpmath.workprec(400):
        true = [
            mpmath.fsum(jacobian[6 * i + j] * v[j].item() for j in range(6))
            for i in range(6)
        ]
    computed = d.softmax_jvp(z, v, 0, temperature=temperature)
    assert testing.ulp_error(computed, true) <= 0.51


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jacobians_in_half_precision_round_once(dtype, temperature):
    # Factors that were halves would underflow before 1/T brings them back.
    for seed in range(20):
        z = randn(5, seed=seed, dtype=torch.float64)
        z = z.mul(3 * temperature).to(dtype)
        jacobian, log_jacobian, _ = exact(z, temperature)
        computed = d.softmax_jacobian(z, 0, temperature=temperature)
        assert testing.ulp_error(computed, jacobian) <= 0.51
        computed = d.log_softmax_jacobian(z, 0, temperature=temperature)
        assert testing.ulp_error(computed, log_jacobian) <= 0.51


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(testing.logits(max_classes=6, magnitude=300))
def test_dense_derivatives_match_the_oracle_everywhere(z):
    for function, true in zip(DENSE, exact(z), strict=True):
        largest = float(max(map(abs, true)))
        worst = max(
            float(abs(mpmath.mpf(a) - b))
            for a, b in zip(
                function(z, 0).flatten().tolist(), true, strict=True
            )
        )
        # 1 - 2 p rounds by 1e-16 where p is near 1/2.
        assert worst <= 1e-12 * largest + 1e-16


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("classes", [1, 2, 3, 9])
def test_agreement_with_torch_func(classes, temperature):
    z, u, v = randn(3, classes) * 2

    def softmax(z):
        return torch.softmax(z / temperature, 0)

    def log_softmax(z):
        return torch.log_softmax(z / temperature, 0)

    t = {"temperature": temperature}
    jacobian, hessian = func.jacrev(softmax)(z), func.hessian(softmax)(z)
    if classes == 1:
        for function in (d.softmax_jacobian, d.softmax_hessian):
            assert not function(z, 0, **t).any()
        return
    matches(d.softmax_jacobian(z, 0, **t), jacobian)
    matches(d.log_softmax_jacobian(z, 0, **t), func.jacrev(log_softmax)(z))
    matches(d.softmax_hessian(z, 0, **t), hessian)
    terms = jacobian.abs() @ v.abs()
    matches(d.softmax_jvp(z, v, 0, **t), jacobian @ v, scale=terms)
    matches(d.softmax_vjp(z, v, 0, **t), v @ jacobian, scale=terms)
    matches(
        d.softmax_hvp(z, u, v, 0, **t),
        torch.einsum("ijk,i,j->k", hessian, u, v),
        scale=torch.einsum("ijk,i,j->k", hessian.abs(), u.abs(), v.abs()),
    )
    logsumexp = func.hessian(lambda z: torch.logsumexp(z, 0))(z)
    matches(d.logsumexp_hessian(z, 0), logsumexp)
    matches(d.logsumexp_hvp(z, v, 0), logsumexp @ v, scale=logsumexp)


def test_hessian_against_finite_differences_of_the_jacobian():
    z, step = randn(5), 1e-5
    hessian = d.softmax_hessian(z, 0)
    for k in range(5):
        move = torch.zeros_like(z)
        move[k] = step
        above = d.softmax_jacobian(z + move, 0)
        below = d.softmax_jacobian(z - move, 0)
        difference = (above - below) / (2 * step)
        assert (hessian[..., k] - difference).abs().max() < 1e-9


# --- structure -----------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_symmetry_and_zero_sums(temperature):
    z = randn(3, 6) * 4
    jacobian = d.softmax_jacobian(z, -1, temperature=temperature)
    assert torch.equal(jacobian, jacobian.mT)
    assert jacobian.sum(-1).abs().max() < 1e-15
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-15
    log = d.log_softmax_jacobian(z, -1, temperature=temperature)
    assert log.sum(-1).abs().max() < 2e-15
    assert (log @ log - log / temperature).abs().max() < 1e-14
    hessian = d.softmax_hessian(z, -1, temperature=temperature)
    for order in itertools.permutations((1, 2, 3)):
        turned = hessian.permute(0, *order)
        assert (hessian - turned).abs().max() < 1e-16
    assert hessian.sum(-1).abs().max() < 1e-15


def test_entries_of_the_third_cumulant():
    z = f64(1, 2, 3)
    p = torch.softmax(z, 0)
    hessian = d.softmax_hessian(z, 0)
    torch.testing.assert_close(hessian[0, 1, 2], 2 * p[0] * p[1] * p[2])
    torch.testing.assert_close(
        hessian[1, 1, 1], p[1] * (1 - p[1]) * (1 - 2 * p[1])
    )
    torch.testing.assert_close(
        hessian[2, 2, 0], -p[2] * p[0] * (1 - 2 * p[2])
    )
    # The K x K matrix that is announced elsewhere is not symmetric.
    slice_ = hessian.diagonal(0, 0, 1).T
    assert not torch.allclose(slice_, slice_.T)


def test_constants_are_in_the_null_space():
    z, one = randn(7) * 5, torch.ones(7, dtype=torch.float64)
    assert d.softmax_jvp(z, one * 1e6, 0).abs().max() < 1e-9
    assert d.softmax_hvp(z, one, randn(7), 0).abs().max() < 1e-15
    g = d.softmax_vjp(z, randn(7), 0)
    assert abs(g.sum()) < 1e-15 * g.abs().max() * 7


# --- shapes and layouts --------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4, 2), (2, 1, 3, 1)])
def test_any_dimension_any_batch(shape):
    z, u, v = randn(3, *shape)
    for dim in range(-len(shape), len(shape)):
        batch = list(shape)
        classes = batch.pop(dim)
        last = z.movedim(dim, -1).reshape(-1, classes)
        for function, power in zip(DENSE, (2, 2, 3), strict=True):
            result = function(z, dim)
            assert result.shape == (*batch, *[classes] * power)
            assert result.is_contiguous()
            rows = torch.stack([function(row, 0) for row in last])
            matches(result, rows.view(result.shape), 1e-14)
        result = d.softmax_hvp(z, u, v, dim)
        assert result.shape == z.shape
        hessian = d.softmax_hessian(z, dim)
        expected = torch.einsum(
            "...ijk,...i,...j->...k",
            hessian,
            u.movedim(dim, -1),
            v.movedim(dim, -1),
        )
        assert (result.movedim(dim, -1) - expected).abs().max() < 1e-15


def test_zero_dimensional_and_empty():
    z = f64(2.0)[0]
    assert d.softmax_jacobian(z, 0).tolist() == [[0.0]]
    assert d.softmax_hessian(z, -1).shape == (1, 1, 1)
    assert d.log_softmax_jacobian(z, 0).shape == (1, 1)
    assert d.softmax_jvp(z, z, 0).shape == ()
    assert d.softmax_hvp(z, z, z, 0) == 0
    none = torch.zeros(3, 0)
    assert d.softmax_jacobian(none, 1).shape == (3, 0, 0)
    assert d.softmax_hessian(none, 0).shape == (0, 3, 3, 3)
    assert d.softmax_hvp(none, none, none, 1).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_inputs_go_by_blocks(dtype):
    z, u, v = randn(3, 3, 700, 300, dtype=dtype)
    for dim in range(3):
        got = d.softmax_hvp(z, u, v, dim), d.softmax_jvp(z, v, dim)
        p = torch.softmax(z.double(), dim)

        def away(t, p=p, dim=dim):
            return t - (p * t).sum(dim, keepdim=True)

        hvp = p * away(away(u.double()) * away(v.double()))
        bound = 3e-6 if dtype == torch.float32 else 1e-13
        matches(got[0], hvp.to(dtype), bound)
        matches(got[1], (p * away(v.double())).to(dtype), bound)


def test_long_float32_rows_do_not_drift():
    # The product of the deviations is one nearly throughout, so that its
    # mean cancels it: a running sum over a strided dimension would show.
    z = randn(100_000, 16, dtype=torch.float32) / 10
    v = torch.ones_like(z)
    v[::2] = -1
    true = d.softmax_hvp(z.double(), v.double(), v.double(), 0)
    error = (d.softmax_hvp(z, v, v, 0) - true) / torch.softmax(z, 0)
    assert error.abs().max() <= 5e-7


def test_strides_and_inputs_untouched():
    base = randn(5, 4)
    for z in (base.T, base[::2], base[:1].expand(3, 4), base.flip(0)):
        before = z.clone()
        u, v = before.cos(), before.sin()
        again = u.clone(), v.clone()
        for dim in (0, 1):
            for function in DENSE:
                assert torch.equal(
                    function(z, dim), function(before.contiguous(), dim)
                )
            d.softmax_hvp(z, u, v, dim)
            d.softmax_jvp(z, v, dim)
        assert torch.equal(z, before)
        assert torch.equal(u, again[0])
        assert torch.equal(v, again[1])


# --- special values ------------------------------------------------------


def test_a_mask_of_minus_infinity():
    z = f64(1.0, -math.inf, 2.0)
    few = f64(1.0, 2.0)
    keep = torch.tensor([0, 2])
    jacobian = d.softmax_jacobian(z, 0)
    assert torch.equal(jacobian[keep][:, keep], d.softmax_jacobian(few, 0))
    assert not jacobian[1].any()
    assert not jacobian[:, 1].any()
    hessian = d.softmax_hessian(z, 0)
    assert torch.equal(
        hessian[keep][:, keep][:, :, keep], d.softmax_hessian(few, 0)
    )
    assert not hessian[1].any()
    log = d.log_softmax_jacobian(z, 0)
    assert log[:, 1].tolist() == [0, 1, 0]
    assert d.softmax_jvp(z, f64(1, 5, 2), 0)[1] == 0
    assert d.softmax_hvp(z, f64(1, 5, 2), f64(3, 1, 1), 0)[1] == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_rows_are_nan_alone(bad, dtype):
    z = randn(3, 3, dtype=dtype)
    good = z[[0, 2]].clone()
    good[1, 0] = z[2, 0] = 50.0  # confident, beside a row of NaN
    z[1] = -math.inf if bad is None else z[1]
    if bad is not None:
        z[1, 1] = bad
    u, v = randn(2, 3, 3, dtype=dtype)
    for function in DENSE:
        result = function(z, 1)
        assert result[1].isnan().all()
        assert torch.equal(result[[0, 2]], function(good, 1))
    for result, other in (
        (d.softmax_jvp(z, v, 1), d.softmax_jvp(good, v[[0, 2]], 1)),
        (
            d.softmax_hvp(z, u, v, 1),
            d.softmax_hvp(good, u[[0, 2]], v[[0, 2]], 1),
        ),
    ):
        assert result[1].isnan().all()
        torch.testing.assert_close(result[[0, 2]], other)
    one = z[1:2, 1:2] * math.nan
    assert d.log_softmax_jacobian(one, 1).isnan().all()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_limits_of_the_temperature(dtype):
    z = torch.tensor([1.0, 2.0, 2.0], dtype=dtype)
    for temperature in (0, math.inf):
        t = {"temperature": temperature}
        for function in DENSE:
            assert not function(z, 0, **t).any()
        assert not d.softmax_jvp(z, z, 0, **t).any()
        assert not d.softmax_hvp(z, z, z, 0, **t).any()
    for temperature in (1e-300, 1e-3, 1e3, 1e300):
        for function in DENSE:
            value = function(z, 0, temperature=temperature)
            assert not value.isnan().any()


# --- autograd ------------------------------------------------------------

CASES = {
    "jacobian": (lambda z, u, v, t: d.softmax_jacobian(z, 1, **t), 1),
    "log": (lambda z, u, v, t: d.log_softmax_jacobian(z, 1, **t), 1),
    "hessian": (lambda z, u, v, t: d.softmax_hessian(z, 1, **t), 1),
    "jvp": (lambda z, u, v, t: d.softmax_jvp(z, u, 1, **t), 2),
    "vjp": (lambda z, u, v, t: d.softmax_vjp(z, u, 1, **t), 2),
    "hvp": (lambda z, u, v, t: d.softmax_hvp(z, u, v, 1, **t), 3),
    "lse": (lambda z, u, v, t: d.logsumexp_hvp(z, u, 1), 2),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, temperature):
    function, count = CASES[name]
    t = {"temperature": temperature}
    inputs = [
        (randn(2, 3, seed=s)).requires_grad_(s < count) for s in range(3)
    ]

    def call(*inputs):
        return function(*inputs, t)

    gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    gradgradcheck(
        call, inputs, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize(
    "modes", itertools.product((func.jacrev, func.jacfwd), repeat=2)
)
def test_nested_transforms_by_value(modes):
    z, u, v = randn(3, 3)

    def softmax(z):
        return torch.softmax(z, 0)

    def jacobian(z):
        p = softmax(z)
        return torch.diag(p) - torch.outer(p, p)

    def both(f):
        return modes[0](modes[1](f))(z)

    h = func.jacrev(jacobian)
    matches(both(lambda z: d.softmax_jacobian(z, 0)), both(jacobian))
    matches(both(lambda z: d.softmax_hessian(z, 0)), both(h))
    matches(
        both(lambda z: d.log_softmax_jacobian(z, 0)),
        both(lambda z: torch.eye(3, dtype=z.dtype) - softmax(z)),
    )
    matches(
        both(lambda z: d.softmax_jvp(z, z * v, 0)),
        both(lambda z: jacobian(z) @ (z * v)),
    )
    matches(
        both(lambda z: d.softmax_hvp(z, u, z * v, 0)),
        both(lambda z: torch.einsum("ijk,i,j->k", h(z), u, z * v)),
    )


def test_vmap_over_any_dimension():
    z, u, v = randn(3, 4, 5)
    for function in DENSE:
        matches(
            func.vmap(lambda z, f=function: f(z, 0), 1)(z), function(z, 0)
        )
    matches(
        func.vmap(lambda z, u: d.softmax_hvp(z, u, v[0], 0), (0, None))(
            z, u[0]
        ),
        d.softmax_hvp(z, u[:1].expand(4, 5), v[:1].expand(4, 5), 1),
    )
    per_row = func.vmap(func.jacrev(lambda z: d.softmax_jvp(z, v[0], 0)))
    assert per_row(z).shape == (4, 5, 5)


def test_upstream_per_row_and_backward_twice():
    z = randn(4, 5).requires_grad_()
    up = randn(4, 5, 5, seed=3)
    value = d.softmax_jacobian(z, 1)
    (first,) = torch.autograd.grad(value, z, up, retain_graph=True)
    (second,) = torch.autograd.grad(value, z, up)
    assert torch.equal(first, second)
    expected = torch.einsum("bijk,bij->bk", d.softmax_hessian(z, 1), up)
    matches(first, expected)


def test_watched_or_not_gives_the_same():
    z, u, v = randn(3, 2, 5)
    for function in DENSE:
        loose = function(z, 1)
        tied = function(z.clone().requires_grad_(), 1)
        assert tied.requires_grad
        assert torch.equal(loose, tied)
    tied = d.softmax_hvp(z, u.clone().requires_grad_(), v, 1)
    assert tied.requires_grad
    assert torch.equal(tied, d.softmax_hvp(z, u, v, 1))


def test_compiled_in_one_graph():
    z, u, v = randn(3, 4)

    def everything(z):
        parts = [f(z, 0, temperature=2.0).flatten() for f in DENSE]
        parts += [d.softmax_jvp(z, u, 0), d.softmax_hvp(z, u, v, 0)]
        return torch.cat(parts)

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    matches(compiled(z), everything(z))


# --- errors --------------------------------------------------------------


@pytest.mark.parametrize("function", DENSE)
def test_errors_of_dense_derivatives(function):
    z = torch.zeros(2, 3)
    name = function.__name__
    with pytest.raises(IndexError, match=rf"{name}.*\[-2, 1\].*got 2"):
        function(z, 2)
    with pytest.raises(TypeError, match=name):
        function(z, 1.0)
    with pytest.raises(TypeError, match="list"):
        function([1.0, 2.0], 0)
    with pytest.raises(ValueError, match=r"got -1"):
        function(z, 0, temperature=-1)
    with pytest.raises(ValueError, match="nan"):
        function(z, 0, temperature=math.nan)
    with pytest.raises(TypeError, match="temperature"):
        function(z, 0, temperature=True)
    with pytest.raises(NotImplementedError, match="int64"):
        function(z.long(), 0)
    with pytest.raises(NotImplementedError, match="complex"):
        function(z.to(torch.complex64), 0)


def test_errors_of_products():
    z = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"tangent.*\(2, 3\).*\(3,\)"):
        d.softmax_jvp(z, torch.zeros(3), 1)
    with pytest.raises(RuntimeError, match=r"cotangent.*float64"):
        d.softmax_vjp(z, z.double(), 1)
    with pytest.raises(RuntimeError, match="softmax_hvp.*tangent"):
        d.softmax_hvp(z, z, z[:1], 1)
    with pytest.raises(TypeError, match="tangent"):
        d.logsumexp_hvp(z, 1.0, 1)
    with pytest.raises(ValueError, match="temperature"):
        d.softmax_hvp(z, z, z, 1, temperature=-2.0)


def test_integers_are_promoted_for_logsumexp_only():
    z = torch.tensor([0, 1])
    expected = d.logsumexp_hessian(z.float(), 0)
    assert torch.equal(d.logsumexp_hessian(z, 0), expected)
    v = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(d.logsumexp_hvp(z, v, 0), expected[0])
