"""softmaxlib.loss: values, gradients, special values, autograd, errors."""

import itertools
import math

import mpmath
import pytest
import torch
from drawn import f64, generator, rand, randn
from torch import func
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as peer

from softmaxlib import loss, testing

NARROW = (torch.float16, torch.bfloat16, torch.float32)
GAPS = (1, 5, 17, 37, 40, 100, 300, 500, 700)
SHAPES = ((5,), (4, 5), (3, 5, 2), (2, 5, 3, 2))


def case(shape, seed=0):
    """Logits, class indices (one of them ignored), class dimension."""
    dim = min(len(shape) - 1, 1)
    x = randn(*shape, seed=seed) * 2
    rest = shape[:dim] + shape[dim + 1 :]
    target = torch.randint(shape[dim], rest, generator=generator(seed))
    if target.ndim:
        target.view(-1)[0] = -100
    return x, target, dim


def exact_row(z, y):
    """Loss and gradient of a row, for a target distribution y."""
    with mpmath.workprec(4000):
        o = testing.oracle(z.tolist())
        y = [mpmath.mpf(v) for v in y]
        total = mpmath.fsum(y)
        value = -mpmath.fsum(
            a * b for a, b in zip(y, o.log_softmax, strict=True)
        )
        gradient = [
            total * p - v for p, v in zip(o.softmax, y, strict=True)
        ]
        return value, gradient


def relative_error(computed, true):
    worst = 0.0
    for a, b in zip(computed.flatten().tolist(), true, strict=True):
        worst = max(worst, float(abs((mpmath.mpf(a) - b) / b)))
    return worst


def same(ours, theirs, bound=1e-13):
    assert ours.shape == theirs.shape
    scale = theirs.detach().abs().max().clamp(min=1e-3)
    assert (ours - theirs).abs().max() <= bound * scale


# --- values --------------------------------------------------------------


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_indices_keep_their_digits_at_every_gap(gap, target):
    z = f64(gap + 0.3, 0.1, -0.7)
    t = torch.tensor(target)
    y = [float(k == target) for k in range(3)]
    value, gradient = exact_row(z, y)
    assert relative_error(loss.cross_entropy(z, t), [value]) <= 1e-13
    closed = loss.cross_entropy_gradient(z, t)
    assert relative_error(closed, gradient) <= 1e-13
    z.requires_grad_()
    (auto,) = torch.autograd.grad(loss.cross_entropy(z, t), z)
    assert torch.equal(auto, closed)


@pytest.mark.parametrize("gap", GAPS)
def test_distributions_keep_their_digits_at_every_gap(gap):
    z = f64(0.1, gap + 0.3, -0.7)
    for y in (f64(0, 1, 0), f64(0, 2, 0.0), f64(0.25, 0.25, 0.5)):
        value, gradient = exact_row(z, y.tolist())
        got = loss.soft_cross_entropy(z, y)
        assert relative_error(got, [value]) <= 1e-13
        got = loss.soft_cross_entropy_gradient(z, y)
        assert relative_error(got, gradient) <= 1e-13


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_formats_are_rounded_once(dtype):
    x = (randn(8, 6) * 6).to(dtype)
    x[0, 0] = 25.0
    t = torch.arange(8) % 6
    y = torch.softmax(randn(8, 6, seed=2), 1).to(dtype)
    rows = loss.cross_entropy(x, t, reduction="none")
    gradient = loss.cross_entropy_gradient(x, t, reduction="none")
    soft = loss.soft_cross_entropy(x, y, reduction="none")
    assert rows.dtype == gradient.dtype == soft.dtype == dtype
    for n in range(8):
        one = [float(k == t[n]) for k in range(6)]
        value, exact = exact_row(x[n], one)
        assert testing.ulp_error(rows[n], [value]) <= 0.51
        assert testing.ulp_error(gradient[n], exact) <= 0.51
        value, _ = exact_row(x[n], y[n].tolist())
        assert testing.ulp_error(soft[n], [value]) <= 0.51


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_pytorch(shape, reduction, smoothing, weighted):
    x, target, dim = case(shape)
    x.requires_grad_()
    options = {
        "weight": rand(shape[dim]) if weighted else None,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    ours = loss.cross_entropy(x, target, **options)
    theirs = peer.cross_entropy(x, target, **options)
    same(ours, theirs)
    up = randn(*ours.shape, seed=4)
    (mine,) = torch.autograd.grad(ours, x, up)
    (other,) = torch.autograd.grad(theirs, x, up)
    same(mine, other)
    (other,) = torch.autograd.grad(
        peer.cross_entropy(x, target, **options).sum(), x
    )
    same(loss.cross_entropy_gradient(x, target, **options), other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("total", [1.0, 2.5])
def test_distributions_as_pytorch(shape, reduction, total):
    x, _, dim = case(shape)
    x.requires_grad_()
    y = torch.softmax(randn(*shape, seed=3), dim) * total
    y.requires_grad_()
    ours = loss.soft_cross_entropy(x, y, dim, reduction=reduction)
    theirs = peer.cross_entropy(x, y, reduction=reduction)
    same(ours, theirs)
    up = randn(*ours.shape, seed=4)
    for a, b in zip(
        torch.autograd.grad(ours, (x, y), up),
        torch.autograd.grad(theirs, (x, y), up),
        strict=True,
    ):
        same(a, b)
    gradient = loss.soft_cross_entropy_gradient(
        x, y, dim, reduction=reduction
    )
    (other,) = torch.autograd.grad(
        peer.cross_entropy(x, y, reduction=reduction).sum(), x
    )
    same(gradient, other)


def test_any_dimension_of_a_distribution():
    x, y = randn(3, 4, 5), rand(3, 4, 5)
    for dim in range(-3, 3):
        rows = loss.soft_cross_entropy(x, y, dim, reduction="none")
        expected = -(y * torch.log_softmax(x, dim)).sum(dim)
        same(rows, expected)
        gradient = loss.soft_cross_entropy_gradient(
            x, y, dim, reduction="sum"
        )
        p = torch.softmax(x, dim)
        same(gradient, p * y.sum(dim, keepdim=True) - y)


def test_one_hot_is_the_index_and_zero_logits_give_log_k():
    x, t, _ = case((6, 4))
    t = t.clamp(min=0)
    y = torch.nn.functional.one_hot(t, 4).double()
    same(loss.soft_cross_entropy(x, y), loss.cross_entropy(x, t))
    same(
        loss.soft_cross_entropy_gradient(x, y),
        loss.cross_entropy_gradient(x, t),
    )
    zero = torch.zeros(1, 10, dtype=torch.float64)
    value = loss.cross_entropy(zero, torch.tensor([3]))
    assert abs(value - math.log(10)) < 1e-15


def test_large_logits_do_not_lose_the_loss():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[1e8, 1e8]], dtype=dtype)
        value = loss.cross_entropy(x, torch.tensor([1]))
        assert abs(value - math.log(2)) < 1e-7
        x = torch.tensor([3e4, -3e4], dtype=torch.float16)
        value = loss.cross_entropy(x, torch.tensor(1))
        assert value == 60_000


def test_gradient_of_an_unnormalised_target_is_sp_minus_y():
    z, y = f64(1, 2, 3), f64(0.5, 1.5, 1.0)
    p = torch.softmax(z, 0)
    got = loss.soft_cross_entropy_gradient(z, y)
    same(got, 3 * p - y)
    assert (got - (p - y)).abs().max() > 0.1
    assert abs(got.sum()) < 1e-15
    # By finite differences too.
    step, numeric = 1e-6, []
    for k in range(3):
        move = torch.zeros(3, dtype=torch.float64)
        move[k] = step
        above = loss.soft_cross_entropy(z + move, y)
        below = loss.soft_cross_entropy(z - move, y)
        numeric.append((above - below) / (2 * step))
    same(got, torch.stack(numeric), 1e-8)


def test_no_single_term_chain_rule():
    z, t = f64(1, 2, 3, 1.5), torch.tensor(2)
    got = loss.cross_entropy_gradient(z, t)
    p = torch.softmax(z, 0)
    for k in (0, 1, 3):
        assert abs(got[k] - p[k]) < 1e-15
    assert got[2] < 0


def test_smoothing_has_its_minimum_at_a_finite_gap():
    gap = math.log(1 + 4 * 0.9 / 0.1)
    z = f64(gap, 0, 0, 0)
    gradient = loss.cross_entropy_gradient(
        z, torch.tensor(0), label_smoothing=0.1
    )
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("classes", [1, 3, 5000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_in_pieces(classes, dtype):
    x = randn(2, classes, dtype=dtype)
    t = torch.tensor([classes - 1, 0])
    x[1, 0] = 30.0
    y = torch.zeros_like(x).scatter(1, t[:, None], 1)
    wide = x.double()
    p = torch.softmax(wide, 1)
    rows = loss.cross_entropy(x, t, reduction="none")
    expected = -torch.log_softmax(wide, 1).gather(1, t[:, None])[:, 0]
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    same(rows, expected.to(dtype), bound)
    soft = loss.soft_cross_entropy(x, y, reduction="none")
    same(soft, expected.to(dtype), bound)
    for gradient in (
        loss.cross_entropy_gradient(x, t, reduction="sum"),
        loss.soft_cross_entropy_gradient(x, y, reduction="sum"),
    ):
        same(gradient, (p - y).to(dtype), bound)


def test_strided_inputs_are_read_only():
    x, t, _ = case((6, 5))
    for view in (x.T.contiguous().T, x[::2], x[:1].expand(4, 5)):
        target = t[: len(view)].clamp(min=0)
        y = torch.softmax(view, 1).flip(1)
        before = view.clone()
        dense = view.clone(memory_format=torch.contiguous_format)
        assert torch.equal(
            loss.cross_entropy_gradient(view, target),
            loss.cross_entropy_gradient(dense, target),
        )
        same(
            loss.soft_cross_entropy(view, y),
            loss.soft_cross_entropy(dense, y.contiguous()),
        )
        assert torch.equal(view, before)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int32, torch.int64]
)
def test_any_integer_target(dtype):
    x = randn(3, 4)
    t = torch.tensor([0, 3, 1])
    expected = loss.cross_entropy(x, t)
    assert torch.equal(loss.cross_entropy(x, t.to(dtype)), expected)
    got = loss.cross_entropy(x, t.to(dtype), ignore_index=3)
    assert torch.equal(got, peer.cross_entropy(x, t, ignore_index=3))


# --- special values ------------------------------------------------------


def test_logits_of_minus_infinity():
    z = f64(1.0, -math.inf, 2.0)
    t = torch.tensor(0)
    same(loss.cross_entropy(z, t), loss.cross_entropy(f64(1, 2), t))
    assert loss.cross_entropy_gradient(z, t)[1] == 0
    t = torch.tensor(1)
    assert loss.cross_entropy(z, t) == math.inf
    gradient = loss.cross_entropy_gradient(z, t)
    assert gradient.isfinite().all()
    assert gradient[1] == -1
    y = f64(0.25, 0, 0.75)
    value = loss.soft_cross_entropy(z, y)
    assert value.isfinite()
    same(value, loss.soft_cross_entropy(f64(1, 2), f64(0.25, 0.75)))
    gradient = loss.soft_cross_entropy_gradient(z, y)
    assert gradient[1] == 0
    assert gradient.isfinite().all()
    assert loss.soft_cross_entropy(z, f64(0, 0.5, 0.5)) == math.inf
    smooth = loss.cross_entropy(z, torch.tensor(0), label_smoothing=0.1)
    assert smooth == math.inf
    # A class of weight zero is left out.
    smooth = loss.cross_entropy(
        z, torch.tensor(0), weight=f64(1, 0, 1), label_smoothing=0.1
    )
    assert smooth.isfinite()


def test_gradient_in_the_target_is_minus_log_p():
    z = f64(1.0, -math.inf, 2.0)
    y = f64(0.25, 0, 0.75).requires_grad_()
    (g,) = torch.autograd.grad(loss.soft_cross_entropy(z, y), y)
    same(g[[0, 2]], -torch.log_softmax(z, 0)[[0, 2]])
    assert g[1] == math.inf


@pytest.mark.parametrize("bad", [math.inf, math.nan, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_bad_rows_are_nan_alone_and_nothing_when_ignored(bad, smoothing):
    x = randn(3, 4)
    x[1] = -math.inf if bad is None else x[1]
    if bad is not None:
        x[1, 2] = bad
    options = {"reduction": "none", "label_smoothing": smoothing}
    rows = loss.cross_entropy(x, torch.tensor([0, 1, 2]), **options)
    assert rows.isnan().tolist() == [False, True, False]
    gradient = loss.cross_entropy_gradient(
        x, torch.tensor([0, 1, 2]), **options
    )
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    soft = loss.soft_cross_entropy(
        x, torch.full((3, 4), 0.25, dtype=x.dtype), reduction="none"
    )
    assert soft.isnan().tolist() == [False, True, False]
    t = torch.tensor([0, -100, 2])
    x.requires_grad_()
    value = loss.cross_entropy(x, t, label_smoothing=smoothing)
    expected = loss.cross_entropy(
        x[[0, 2]], t[[0, 2]], label_smoothing=smoothing
    )
    same(value, expected)
    (auto,) = torch.autograd.grad(value, x)
    closed = loss.cross_entropy_gradient(x, t, label_smoothing=smoothing)
    for gradient in (auto, closed):
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_no_valid_target_and_empty_batches(smoothing):
    options = {"label_smoothing": smoothing}
    t = torch.tensor([-100, -100])
    for x, target in ((randn(2, 3), t), (torch.zeros(0, 3), t[:0])):
        x.requires_grad_()
        value = loss.cross_entropy(x, target, **options)
        assert value.isnan()
        (gradient,) = torch.autograd.grad(value, x)
        assert not gradient.any()
        closed = loss.cross_entropy_gradient(x, target, **options)
        assert not closed.any()
        assert closed.shape == x.shape
        total = loss.cross_entropy(x, target, reduction="sum", **options)
        assert total == 0
    x = torch.zeros(0, 3)
    assert loss.soft_cross_entropy(x, x).isnan()
    assert loss.soft_cross_entropy(x, x, reduction="sum") == 0
    assert loss.soft_cross_entropy(x.T, x.T, reduction="sum") == 0
    assert loss.soft_cross_entropy_gradient(x, x).shape == (0, 3)


def test_weights_that_are_all_zero():
    x, t = randn(2, 3).requires_grad_(), torch.tensor([1, 1])
    weight = f64(1, 0, 1)
    value = loss.cross_entropy(x, t, weight=weight)
    assert value.isnan()
    (gradient,) = torch.autograd.grad(value, x)
    assert not gradient.any()
    assert not loss.cross_entropy_gradient(x, t, weight=weight).any()


# --- autograd ------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gradient", [False, True])
def test_gradcheck_of_indices(shape, smoothing, gradient):
    x, target, dim = case(shape)
    x, weight = x.requires_grad_(), rand(shape[dim]).requires_grad_()
    function = (
        loss.cross_entropy_gradient if gradient else loss.cross_entropy
    )
    for reduction in ("mean", "none"):

        def call(x, weight, reduction=reduction):
            return function(
                x,
                target,
                weight=weight,
                reduction=reduction,
                label_smoothing=smoothing,
            )

        gradcheck(
            call,
            (x, weight),
            check_forward_ad=True,
            check_batched_grad=True,
        )
        gradgradcheck(
            call,
            (x, weight),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
        )


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("gradient", [False, True])
def test_gradcheck_of_distributions(shape, gradient):
    x, _, dim = case(shape)
    x.requires_grad_()
    y = rand(*shape, seed=1).requires_grad_()
    function = (
        loss.soft_cross_entropy_gradient
        if gradient
        else loss.soft_cross_entropy
    )
    for reduction in ("mean", "none"):

        def call(x, y, reduction=reduction):
            return function(x, y, dim, reduction=reduction)

        gradcheck(
            call,
            (x, y),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        gradgradcheck(
            call, (x, y), check_fwd_over_rev=True, check_rev_over_rev=True
        )


@pytest.mark.parametrize(
    "modes", itertools.product((func.jacrev, func.jacfwd), repeat=2)
)
def test_nested_transforms_by_value(modes):
    x, t, _ = case((3, 4))
    y = rand(3, 4, seed=5)

    def both(f, at):
        return modes[0](modes[1](f))(at)

    options = {"label_smoothing": 0.1}
    for ours, theirs, at in (
        (
            lambda x: loss.cross_entropy(x, t, **options),
            lambda x: peer.cross_entropy(x, t, **options),
            x,
        ),
        (
            lambda x: loss.soft_cross_entropy(x, y),
            lambda x: peer.cross_entropy(x, y),
            x,
        ),
        (
            lambda y: loss.soft_cross_entropy(x, y).exp(),
            lambda y: peer.cross_entropy(x, y).exp(),
            y,
        ),
    ):
        same(both(ours, at), both(theirs, at), 1e-12)
        third = both(func.grad(ours), at), both(func.grad(theirs), at)
        same(*third, 1e-12)


def test_per_sample_gradients_by_vmap():
    x, t, _ = case((6, 4))
    t = t.clamp(min=0)
    each = func.vmap(func.grad(loss.cross_entropy))(x, t)
    whole = loss.cross_entropy_gradient(x, t, reduction="sum")
    same(each, whole, 1e-15)
    y = rand(6, 4)
    each = func.vmap(func.grad(loss.soft_cross_entropy))(x, y)
    same(each, loss.soft_cross_entropy_gradient(x, y, reduction="none"))
    one = func.vmap(loss.cross_entropy, (None, 0))(x[0], t)
    same(one, loss.cross_entropy(x[:1].expand(6, 4), t, reduction="none"))
    with pytest.raises(IndexError, match="got 9"):
        func.vmap(func.grad(loss.cross_entropy))(x, t + 9 - t)


def test_upstream_per_row_and_backward_twice():
    x, t, _ = case((5, 4))
    x.requires_grad_()
    up = randn(5, seed=7)
    rows = loss.cross_entropy(x, t, reduction="none", label_smoothing=0.1)
    (first,) = torch.autograd.grad(rows, x, up, retain_graph=True)
    (second,) = torch.autograd.grad(rows, x, up)
    assert torch.equal(first, second)
    closed = loss.cross_entropy_gradient(
        x, t, reduction="none", label_smoothing=0.1
    )
    same(first, up[:, None] * closed, 1e-14)


def test_half_gradients_with_a_scaled_loss():
    # 1/N first would round to zero what the loss scale then multiplies.
    x = torch.full((4096, 2), 0.0, dtype=torch.float16)
    x[:, 0] = 12.0
    x.requires_grad_()
    t = torch.zeros(4096, dtype=torch.int64)
    (loss.cross_entropy(x, t) * 2.0**15).backward()
    true = 2.0**15 / 4096 / (1 + math.exp(12))
    assert abs(x.grad[0, 1] - true) < 1e-3 * true


def test_compiled_in_one_graph():
    x, t, _ = case((3, 4))
    y = rand(3, 4)

    def everything(x):
        return torch.stack(
            [
                loss.cross_entropy(x, t, label_smoothing=0.1),
                loss.cross_entropy_gradient(x, t, weight=y[0])[1, 2],
                loss.soft_cross_entropy(x, y),
                loss.soft_cross_entropy_gradient(x, y)[1, 2],
            ]
        )

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    same(compiled(x), everything(x))


# --- errors --------------------------------------------------------------

BOTH = (loss.cross_entropy, loss.cross_entropy_gradient)
SOFT = (loss.soft_cross_entropy, loss.soft_cross_entropy_gradient)


@pytest.mark.parametrize("function", BOTH)
def test_errors_of_indices(function):
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    name = function.__name__
    for wrong in (3, -1, 7):
        with pytest.raises(IndexError, match=rf"{name}.*got {wrong}"):
            function(x, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="'avg'"):
        function(x, t, reduction="avg")
    with pytest.raises(RuntimeError, match=r"label_smoothing.*1\.5"):
        function(x, t, label_smoothing=1.5)
    with pytest.raises(RuntimeError, match="nan"):
        function(x, t, label_smoothing=math.nan)
    with pytest.raises(ValueError, match=r"\(2,\), .*got \(1,\)"):
        function(x, t[:1])
    with pytest.raises(RuntimeError, match=r"\(2, 4\), .*got \(2, 3\)"):
        function(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"probabilities.*\(2, 3\)"):
        function(x, x[:, :2])
    with pytest.raises(RuntimeError, match="ignore_index is for class"):
        function(x, x, ignore_index=1)
    with pytest.raises(TypeError, match=r"label_smoothing.*'0\.1'"):
        function(x, t, label_smoothing="0.1")
    with pytest.raises(RuntimeError, match="bool"):
        function(x, t.bool())
    with pytest.raises(RuntimeError, match=r"weight.*\(3,\), .*got \(2,\)"):
        function(x, t, weight=torch.ones(2))
    with pytest.raises(RuntimeError, match=r"weight.*int64"):
        function(x, t, weight=torch.ones(3, dtype=torch.long))
    with pytest.raises(TypeError, match="ignore_index"):
        function(x, t, ignore_index=None)
    with pytest.raises(TypeError, match="target"):
        function(x, [0, 1])
    with pytest.raises(NotImplementedError, match="int64"):
        function(x.long(), t)
    with pytest.raises(RuntimeError, match="0-d"):
        function(x[0, 0], t[0])
    with pytest.raises(IndexError, match="no classes"):
        function(torch.zeros(2, 0), t)


@pytest.mark.parametrize("function", SOFT)
def test_errors_of_distributions(function):
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"\(2, 3\), .*got \(3,\)"):
        function(x, x[0])
    with pytest.raises(RuntimeError, match="float64"):
        function(x, x.double())
    with pytest.raises(IndexError, match="got 2"):
        function(x, x, 2)
    with pytest.raises(ValueError, match="reduction"):
        function(x, x, reduction=None)
    with pytest.raises(TypeError, match="target"):
        function(x, None)


def test_the_same_exceptions_as_pytorch():
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    for arguments, options in (
        ((x, torch.tensor([0, 3])), {}),
        ((x, t), {"reduction": "avg"}),
        ((x, t), {"label_smoothing": 1.5}),
        ((x, t[:1]), {}),
        ((x, t), {"weight": torch.ones(2)}),
        ((x, t.float()), {}),
    ):
        with pytest.raises(Exception) as theirs:
            peer.cross_entropy(*arguments, **options)
        with pytest.raises(theirs.type):
            loss.cross_entropy(*arguments, **options)
