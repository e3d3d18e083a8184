"""linear_cross_entropy against float64, mpmath, and its own other ways."""

import itertools
import math
from pathlib import Path

import mpmath
import pytest
import torch
from drawn import f64, generator, rand, randn
from torch import func
from torch.autograd import forward_ad, gradcheck
from torch.nn import functional as peer

from softmaxlib import _linear, linear_cross_entropy, testing

F32, F64 = torch.float32, torch.float64
REDUCTIONS = "mean", "sum", "none"


@pytest.fixture(autouse=True, params=[2**20, 500])
def size(request, monkeypatch):
    """One block of logits, or many, the last of them narrower."""
    monkeypatch.setattr(_linear, "_SIZE", request.param)


def truth(
    x,
    weight,
    target,
    bias=None,
    *,
    class_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
):
    """The same from all logits, by PyTorch."""
    z = peer.linear(x, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.flatten(0, -2)
    soft = target.is_floating_point()
    target = target.flatten(0, -2) if soft else target.flatten()
    rows = peer.cross_entropy(
        z,
        target,
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    share = torch.ones_like(rows)
    if not soft:
        counts = target != ignore_index
        share = counts.to(z)
        if class_weight is not None:
            share = share * class_weight[target * counts]
    rows = rows + z_loss * share * z.logsumexp(1).square()
    if reduction == "none":
        return rows.view(x.shape[:-1])
    return rows.sum() / (share.sum() if reduction == "mean" else 1)


def inputs(rows=9, features=4, classes=203, seed=0):
    x, weight = randn(rows, features, seed=seed), randn(classes, features)
    target = torch.randint(classes, (rows,), generator=generator(seed))
    target[1] = target[4] = -100
    # The ends of the first blocks of classes, and of all.
    target[5:9] = torch.tensor([0, 63, 64, classes - 1])
    return x, weight, target, randn(classes, seed=seed + 1)


def derivatives(function, x, weight, target, bias, **options):
    """The loss, and its gradients for an upstream gradient of no ones."""
    tensors = [
        None if t is None else t.detach().requires_grad_()
        for t in (x, weight, bias)
    ]
    loss = function(tensors[0], tensors[1], target, tensors[2], **options)
    upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 1), dtype=F64)
    loss.backward(upstream[: loss.numel()].view(loss.shape).to(loss))
    return [loss.detach(), *(t.grad for t in tensors if t is not None)]


def agree(got, expect, bound):
    for one, true in zip(got, expect, strict=True):
        assert one.shape == true.shape
        scale = true.abs().max().clamp(min=1e-3)
        assert (one.double() - true).abs().max() <= bound * scale


OPTIONS = [
    dict(zip(("label_smoothing", "softcap", "z_loss"), values, strict=True))
    for values in itertools.product((0.0, 0.3), (None, 2.0), (0.0, 0.2))
]


# --- values and gradients ------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_every_option_with_every_other(options, reduction, prefer, kind):
    x, weight, target, bias = inputs()
    if kind == "probabilities":
        target = 1.5 * randn(9, 203, seed=3).softmax(1)
    for b, class_weight in itertools.product(
        (None, bias), (None, rand(203, seed=5))
    ):
        some = {
            "reduction": reduction,
            "class_weight": class_weight,
            **options,
        }
        arguments = x, weight, target, b
        expect = derivatives(truth, *arguments, **some)
        got = derivatives(
            linear_cross_entropy, *arguments, prefer=prefer, **some
        )
        # A few hundred roundings in float64.
        agree(got, expect, 1e-13)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 20])
@pytest.mark.parametrize("features", [1, 4, 7])
@pytest.mark.parametrize("classes", [1, 64, 65, 300])
def test_all_proportions(rows, features, classes):
    """More rows than features, or fewer: blocks lie differently."""
    x, weight = randn(rows, features), randn(classes, features, seed=1)
    target = torch.arange(rows) % classes
    expect = derivatives(truth, x, weight, target, None)
    for prefer in ("memory", "speed"):
        got = derivatives(
            linear_cross_entropy, x, weight, target, None, prefer=prefer
        )
        agree(got, expect, 1e-13)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("soft", [False, True])
def test_leading_dimensions(batch, soft):
    x, weight = randn(*batch, 4), randn(70, 4)
    target = torch.ones(batch, dtype=torch.int32)
    if soft:
        target = randn(*batch, 70, seed=2).softmax(-1)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(x, weight, target, reduction=reduction)
        some = (
            x.view(-1, 4),
            weight,
            target.reshape(-1, *target.shape[len(batch) :]),
        )
        some = (*some[:2], some[2] if soft else some[2].long())
        expect = truth(*some, reduction=reduction)
        assert loss.shape == (batch if reduction == "none" else ())
        agree([loss.reshape(-1)], [expect.reshape(-1)], 1e-14)


def test_strided_inputs():
    x, weight, target, bias = inputs()
    odd = (
        x.mT.contiguous().mT,
        weight.repeat(1, 2)[:, ::2].flip(1).flip(1),
        target.repeat_interleave(2)[::2],
        bias.repeat_interleave(3)[::3],
    )
    odd = (odd[0], weight.mT.contiguous().mT, *odd[2:])
    expect = derivatives(linear_cross_entropy, x, weight, target, bias)
    agree(derivatives(linear_cross_entropy, *odd), expect, 1e-15)


def test_which_gradients_are_asked_for():
    x, weight, target, bias = inputs()
    expect = derivatives(truth, x, weight, target, bias)[1:]
    for needs in itertools.product((False, True), repeat=3):
        for prefer in ("memory", "speed"):
            tensors = [
                t.clone().requires_grad_(need)
                for t, need in zip((x, weight, bias), needs, strict=True)
            ]
            loss = linear_cross_entropy(
                tensors[0], tensors[1], target, tensors[2], prefer=prefer
            )
            assert loss.requires_grad == any(needs)
            if any(needs):
                loss.backward(f64(0.5).squeeze())
            for t, need, true in zip(tensors, needs, expect, strict=True):
                assert (t.grad is not None) == need
                if need:
                    agree([t.grad], [true], 1e-13)


@pytest.mark.parametrize("gap", [1, 17, 40, 300])
def test_confident_rows_keep_their_digits(gap):
    """Where log p and p - 1 of the target are lost near one."""
    x = f64(1.0).view(1, 1)
    z = f64(*range(-3, 4), gap)
    o = testing.oracle(z.tolist())
    target = torch.tensor([7])
    for smaller in (z.float(), z):
        weight = smaller.view(-1, 1).clone().requires_grad_()
        loss = linear_cross_entropy(x.to(weight), weight, target)
        loss.backward()
        # A few units: the sum, the exponential, and its rounded exponent.
        bound = (8 + gap) * torch.finfo(weight.dtype).eps
        exact = [*o.softmax[:7], -mpmath.fsum(o.softmax[:7])]
        pairs = [(loss, -o.log_softmax[7])]
        pairs += list(zip(weight.grad.view(-1), exact, strict=True))
        for got, true in pairs:
            if abs(true) > torch.finfo(weight.dtype).tiny:
                assert abs(got.item() - true) <= bound * abs(true)


def test_no_worse_than_pytorch():
    """Largest errors against float64, in float32: of rows that differ."""
    x, weight = randn(64, 32), randn(5000, 32, seed=1) / 4
    target = torch.arange(64) * 78
    true = derivatives(truth, x, weight, target, None)
    narrow = x.float(), weight.float(), target, None
    theirs = derivatives(truth, *narrow)
    for prefer in ("memory", "speed"):
        ours = derivatives(linear_cross_entropy, *narrow, prefer=prefer)
        for a, b, t in zip(ours, theirs, true, strict=True):
            errors = [(v.double() - t).abs().max() for v in (a, b)]
            # Products of another order are as good, give or take half.
            least = torch.finfo(F32).eps * t.abs().max() / 2
            assert errors[0] <= max(1.5 * errors[1], least)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_halves_are_computed_in_float32(dtype, prefer):
    x, weight, target, bias = (
        t.to(dtype) if t.is_floating_point() else t for t in inputs()
    )
    exact = x.double(), weight.double(), target, bias.double()
    expect = derivatives(truth, *exact)
    options = {"prefer": prefer}
    got = derivatives(
        linear_cross_entropy, x, weight, target, bias, **options
    )
    assert got[0].dtype == F32
    agree(got[:1], expect[:1], 1e-6)
    for one, true in zip(got[1:], expect[1:], strict=True):
        assert one.dtype == dtype
        # One rounding, and float32 before it.
        bound = torch.finfo(dtype).eps / 2 * true.abs()
        bound += 1e-6 * true.abs().max() + 2.0**-25
        assert ((one.double() - true).abs() <= bound).all()
    for wanted in (dtype, F64):
        loss = linear_cross_entropy(x, weight, target, bias, dtype=wanted)
        assert loss.dtype == wanted
        agree([loss], expect[:1] and [truth(*exact)], 0.01)


# --- special values ------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_rows_that_do_not_count_leave_no_trace(bad, reduction, prefer):
    x, weight, target, bias = inputs()
    class_weight = rand(203) + 0.1
    class_weight[target[7]] = 0
    options = {"reduction": reduction, "class_weight": class_weight}
    expect = derivatives(truth, x, weight, target, bias, **options)
    x[1] = x[4, 2] = x[7] = bad
    for extra in ({}, {"z_loss": 0.0, "softcap": None}):
        got = derivatives(
            linear_cross_entropy,
            *(x, weight, target, bias),
            prefer=prefer,
            **options,
            **extra,
        )
        agree(got, expect, 1e-13)
        assert not got[1][[1, 4, 7]].any()


def test_bad_rows_are_bad_alone():
    x, weight, target, _ = inputs()
    x[0] = math.nan
    loss = linear_cross_entropy(x, weight, target, reduction="none")
    assert loss.isnan().tolist() == [True] + [False] * 8
    x, bias = torch.zeros(3, 2), torch.zeros(5)
    bias[1] = -math.inf
    rows = linear_cross_entropy(
        x,
        torch.ones(5, 2),
        torch.tensor([0, 1, 2]),
        bias,
        reduction="none",
    )
    torch.testing.assert_close(
        rows, torch.tensor([math.log(4), math.inf, math.log(4)])
    )
    for value, kind in ((math.inf, math.isnan), (-math.inf, math.isnan)):
        row = linear_cross_entropy(
            torch.zeros(1, 1),
            torch.zeros(3, 1),
            torch.tensor([1]),
            torch.full((3,), value),
        )
        assert kind(row)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_nothing_to_average(soft, prefer):
    weight = randn(7, 4).requires_grad_()
    x = randn(0, 4).requires_grad_()
    target = torch.zeros(0, 7) if soft else torch.zeros(0).long()
    for reduction, empty in zip(
        REDUCTIONS, (math.nan, 0.0, None), strict=True
    ):
        loss = linear_cross_entropy(
            x, weight, target, reduction=reduction, prefer=prefer
        )
        expect = torch.zeros(0) if empty is None else torch.tensor(empty)
        torch.testing.assert_close(
            loss, expect, equal_nan=True, check_dtype=False
        )
        for gradient in torch.autograd.grad(loss.sum(), (x, weight)):
            assert not gradient.any()


def test_all_ignored():
    x, weight, target, _ = inputs()
    x.fill_(math.nan)
    loss, *parts = derivatives(
        linear_cross_entropy, x, weight, target * 0 - 100, None
    )
    assert loss.isnan()
    assert not any(part.any() for part in parts)


def test_one_class():
    x, weight, target = randn(3, 2), randn(1, 2), torch.zeros(3).long()
    got = derivatives(linear_cross_entropy, x, weight, target, None)
    assert not any(part.any() for part in got)


# --- autograd ------------------------------------------------------------


def small(reduction="mean", **options):
    """The loss as a function of x, weight and bias, and their values."""
    x, weight, target, bias = inputs(rows=9, features=2, classes=70)

    def function(x, weight, bias):
        return linear_cross_entropy(
            x, weight, target, bias, reduction=reduction, **options
        )

    def theirs(x, weight, bias):
        return truth(
            x, weight, target, bias, reduction=reduction, **options
        )

    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    return function, theirs, tensors


REFUSED = r"use cross_entropy\(F.linear\(x, weight, bias\), target\)"


def refused(function, *arguments):
    with pytest.raises(RuntimeError, match=REFUSED):
        function(*arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_refused(reduction):
    function, _, tensors = small(reduction)
    loss = function(*tensors).sum()

    def first():
        return torch.autograd.grad(loss, tensors, create_graph=True)

    refused(first)
    if reduction != "none":
        # Not by what the forward pass has left, either.
        loss = function(*tensors)
        torch.autograd.grad(loss, tensors, retain_graph=True)
        refused(first)
        refused(torch.autograd.functional.hessian, function, tuple(tensors))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batched_gradients_are_refused(reduction):
    function, _, tensors = small(reduction)
    loss, c = function(*tensors), torch.ones(2, dtype=F64)
    refused(
        lambda: torch.autograd.grad(loss, tensors, c, is_grads_batched=True)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_finite_differences(reduction):
    x, weight = randn(3, 2).requires_grad_(), randn(4, 2).requires_grad_()
    target = torch.tensor([0, 3, 1])

    def function(x, w):
        return linear_cross_entropy(
            x, w, target, reduction=reduction, z_loss=0.1
        )

    assert gradcheck(function, (x, weight))


def test_backward_twice():
    """The first pass may take what the forward pass has; not the next."""
    function, theirs, tensors = small()
    expect = torch.autograd.grad(theirs(*tensors), tensors)
    loss = function(*tensors)
    for factor in (3.0, 1.0, -2.0):
        got = torch.autograd.grad(loss * factor, tensors, retain_graph=True)
        agree(got, [factor * part for part in expect], 1e-13)
    loss = function(*tensors)
    torch.autograd.grad(loss, tensors)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


def test_a_weight_changed_in_between_is_noticed():
    function, _, tensors = small()
    loss = function(*tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_gradients_are_the_callers_own():
    """Not views, nor shared with what another pass gives."""
    function, _, tensors = small()
    loss = function(*tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = [part.clone() for part in first]
    second = torch.autograd.grad(loss, tensors)
    for part in first:
        part.zero_()
    agree(second, again, 1e-14)


def test_forward_mode_is_refused():
    function, _, tensors = small()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.detach(), t) for t in tensors]
        refused(function, *duals)


@pytest.mark.parametrize(
    "transform", [func.grad, func.jacrev, func.jacfwd, func.hessian]
)
def test_transforms_are_refused(transform):
    function, _, tensors = small()
    tensors = [t.detach() for t in tensors]
    refused(transform(function), *tensors)
    with torch.no_grad():
        refused(func.vmap(function), *(t[None] for t in tensors))


def test_targets_and_class_weights_have_no_gradients():
    x, weight, target, _ = inputs()
    y = randn(9, 203, seed=3).softmax(1)
    plain, watched = rand(203), rand(203).requires_grad_()
    for t, w in ((target, watched), (y.clone().requires_grad_(), plain)):

        def function(t=t, w=w):
            return linear_cross_entropy(x, weight, t, class_weight=w)

        refused(function)
        with torch.no_grad():
            loss = function()
        detached = [t.detach(), w.detach()]
        agree([loss], [function(*detached)], 1e-15)


def test_checkpoint_and_hooks():
    function, theirs, tensors = small()
    expect = torch.autograd.grad(theirs(*tensors), tensors)
    loss = torch.utils.checkpoint.checkpoint(
        function, *tensors, use_reentrant=False
    )
    agree(torch.autograd.grad(loss, tensors), expect, 1e-13)
    with torch.autograd.graph.save_on_cpu():
        loss = function(*tensors)
    agree(torch.autograd.grad(loss, tensors), expect, 1e-13)


# --- errors --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target": torch.tensor([0, 7])}, IndexError, r"\[0, 6\].*got 7"),
        ({"target": torch.tensor([-1, 0])}, IndexError, "got -1"),
        ({"target": torch.zeros(3).long()}, ValueError, "target"),
        ({"target": torch.zeros(2, 6)}, RuntimeError, "probabilities"),
        ({"target": torch.zeros(2).bool()}, RuntimeError, "indices"),
        ({"target": [0, 1]}, TypeError, "torch.Tensor"),
        ({"x": torch.zeros(2, 3)}, RuntimeError, "D = 3 as in x"),
        ({"x": torch.zeros(())}, RuntimeError, "0-d"),
        ({"x": torch.zeros(2, 4).long()}, NotImplementedError, "dtype"),
        ({"weight": torch.zeros(7, 4).double()}, RuntimeError, "dtype"),
        ({"weight": torch.zeros(7)}, RuntimeError, "weight"),
        ({"bias": torch.zeros(6)}, RuntimeError, "bias"),
        ({"class_weight": torch.ones(6)}, RuntimeError, "class_weight"),
        ({"reduction": "median"}, ValueError, "one of"),
        ({"prefer": "both"}, ValueError, "'memory', 'speed'"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing"),
        ({"softcap": 0}, ValueError, "softcap"),
        ({"softcap": "high"}, TypeError, "softcap"),
        ({"z_loss": -0.1}, ValueError, "z_loss"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index"),
        ({"dtype": torch.int32}, NotImplementedError, "dtype"),
    ],
)
def test_errors(change, error, words):
    arguments = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(7, 4),
        "target": torch.tensor([0, 6]),
        **change,
    }
    with pytest.raises(error, match=words):
        linear_cross_entropy(**arguments)


def test_an_index_that_is_ignored_is_not_out_of_range():
    x, weight, _, _ = inputs()
    target = torch.full((9,), 203)
    target[0] = 2
    loss = linear_cross_entropy(x, weight, target, ignore_index=203)
    agree([loss], [truth(x[:1], weight, target[:1])], 1e-14)


def test_an_infinite_cap_is_none():
    x, weight, target, bias = inputs()
    plain = linear_cross_entropy(x, weight, target, bias)
    capped = linear_cross_entropy(x, weight, target, bias, softcap=math.inf)
    assert torch.equal(plain, capped)


# --- memory --------------------------------------------------------------


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most entries that a tensor has, of those that are made."""

    entries = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                size = t.untyped_storage().nbytes() // t.itemsize
                self.entries = max(self.entries, size)
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_the_logits_are_never_all_there(reduction, prefer):
    rows, features, classes = 400, 8, 3000
    x, weight = randn(rows, features), randn(classes, features)
    target = torch.arange(rows)
    options = {"reduction": reduction, "prefer": prefer}
    with Largest() as mode:
        loss = linear_cross_entropy(x, weight, target, **options)
    # A block of 64 classes, or 2**20 logits.
    block = max(_linear._SIZE, 64 * rows)
    assert mode.entries <= min(block, rows * classes)
    with Largest() as mode:
        derivatives(
            linear_cross_entropy, x, weight, target, None, **options
        )
    assert mode.entries <= min(
        max(block, classes * features), rows * classes
    )
    with Largest() as mode:
        derivatives(truth, x, weight, target, None, reduction=reduction)
    assert mode.entries >= rows * classes
    assert loss.isfinite().all()


CASE = "benchmarks.linear:candidates"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2**20], indirect=True)
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        # What is asked for, in a process of its own: at 2048 rows and 512
        # features blocks and products take a smaller share than here.
        ("MEMORY", 1.0, 1.3),
        ("SPEED", 1.3, 1.7),
        ("REFERENCE", 5.0, 9.0),
    ],
)
def test_peak_memory(monkeypatch, name, least, most):
    # The benchmarks stand beside the tests, and are not installed.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import linear, measure

    sizes = classes, rows, features = 32_768, 512, 256
    peak = measure.peak_memory(
        CASE, getattr(linear, name), *sizes, warm=(600, 300, 8)
    )
    assert least <= peak / ((classes + rows) * features * 4) <= most
