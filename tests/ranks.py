"""What the processes of test_distributed.py run, each with its rank.

The same numbers are drawn everywhere; a rank takes its slice of them and
compares with what one process makes of all.
"""

import contextlib
import datetime
import math
import os

import torch
from drawn import generator, randn
from torch import distributed
from torch.nn import functional as peer

import softmaxlib as library

INF, NAN = math.inf, math.nan
# Of float64: of sums in another order, relative to their largest term.
BOUND = 1e-13


def part(rank, sizes):
    """The classes of a rank."""
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def logits(classes, dtype=torch.float64):
    """Rows of every kind, shape (10, K), K at least 4."""
    x = randn(10, classes, seed=0) * 4
    x[1, 1] = 60  # confident
    x[2, : classes // 2] = -INF  # fully masked slices
    x[3, classes // 2 :] = -INF
    x[4] = -INF
    x[5, 2] = INF
    x[6, 3] = NAN
    x[7] += 1e4
    x[8, 0] = 800  # the others underflow
    return x.to(dtype)


def close(ours, theirs, least=1e-300):
    """As near as float64 allows, or rounded alike but for the last bit.

    The error is relative, but to no less than `least`.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    double = ours.dtype == torch.float64
    bound = BOUND if double else torch.finfo(ours.dtype).eps
    a, b = ours.detach().double(), theirs.detach().double()
    special = ~b.isfinite()
    assert torch.equal(a[special].nan_to_num(7), b[special].nan_to_num(7))
    a, b = a[~special], b[~special]
    assert ((a - b).abs() <= bound * b.abs().clamp(min=least)).all(), (a, b)


def same(x, group=None):
    """Bit by bit the same on every rank."""
    found = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, x.detach(), group=group)
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for y in found)


def compared(rank, sizes, x, ours, theirs, whole=True, least=1e-300):
    """Values of a function of logits (N, K); the gradients to compare."""
    here = part(rank, sizes)
    full = x.clone().requires_grad_()
    mine = x[:, here].clone().requires_grad_()
    expect, got = theirs(full), ours(mine)
    cotangent = randn(*expect.shape, seed=1).to(x.dtype)
    (expected,) = torch.autograd.grad(expect, full, cotangent)
    if whole:
        same(got)
    else:
        expect, cotangent = expect[:, here], cotangent[:, here]
    close(got, expect, least)
    return torch.autograd.grad(got, mine, cotangent)[0], expected[:, here]


def logsumexp(rank, sizes, dtype):
    x = logits(sum(sizes), dtype)

    def theirs(z):
        # In float64, as theirs rounds the gradient of a row twice.
        return library.logsumexp(z.double(), 1).to(dtype)

    def ours(z):
        return library.parallel_logsumexp(z, 1)

    close(*compared(rank, sizes, x, ours, theirs))
    here = x[:, part(rank, sizes)]
    kept = library.parallel_logsumexp(here.T, -2, keepdim=True)
    assert torch.equal(kept.nan_to_num(7), ours(here)[None].nan_to_num(7))


def softmax(rank, sizes, dtype, temperature):
    x = logits(sum(sizes), dtype)
    x[8] = x[0] + 30
    options = {"temperature": temperature}

    def ours(z):
        return library.parallel_softmax(z, 1, **options)

    def theirs(z):
        return library.softmax(z, 1, **options)

    if dtype == torch.float64:
        # An ulp for each unit of the range: here 80 / T at most where the
        # result is not beyond the format.
        x[1, 1] = 20
    gradient, expected = compared(rank, sizes, x, ours, theirs, whole=False)
    gradient, expected = gradient.double(), expected.double()
    assert torch.equal(gradient.isnan(), expected.isnan())
    # The mean of cotangents up to 4 under probabilities that are rounded.
    eps = torch.finfo(dtype).eps
    p = library.softmax(x.double(), 1, **options)[:, part(rank, sizes)]
    slope = 1 / temperature if temperature else 0.0
    # In float64 these may be wrong by an ulp for each unit of the range.
    ulps = 1 + 80 * slope if dtype == torch.float64 else 1
    allowed = eps * (ulps * expected.abs() + 8 * slope * p)
    assert (
        (gradient - expected).abs().nan_to_num(0) <= allowed.nan_to_num(1)
    ).all(), (gradient, expected, allowed)


def confident_softmax(rank, sizes):
    """Where one class has all but e**-40, the derivative is not lost."""
    x = torch.zeros(1, sum(sizes), dtype=torch.float64)
    x[0, 1] = 40
    close(
        *compared(
            rank,
            sizes,
            x,
            lambda z: library.parallel_softmax(z, 1),
            lambda z: library.softmax(z, 1),
            whole=False,
        )
    )


def targets(classes, ignored):
    """One of every kind for the rows of `logits`."""
    t = torch.randint(classes, (10,), generator=generator(2))
    # Ignored; the winner; in a masked slice; at -inf; at +inf; ignored.
    t[1], t[2], t[3], t[5] = 1, 0, classes - 1, 2
    t[0] = t[6] = ignored
    return t


def cross_entropy(rank, sizes, dtype, options):
    classes = sum(sizes)
    ignored = options.get("ignore_index", -100)
    x, target = logits(classes, dtype), targets(classes, ignored)
    if options.get("reduction") != "none":
        finite = [0, 1, 2, 7, 8, 9]
        x, target = (
            x[finite],
            target[finite].masked_fill(x[finite, 0] == -INF, 3),
        )

    def ours(z):
        return library.parallel_cross_entropy(z, target, **options)

    def theirs(z):
        return library.cross_entropy(z, target, **options)

    # Smoothed, a loss is good to 2**-50 of logits of 1e4, and what is near
    # zero in a gradient has cancelled.
    smooth = "label_smoothing" in options and dtype == torch.float64
    least = 100 if smooth else 1e-300
    gradients = compared(rank, sizes, x, ours, theirs, least=least)
    close(*gradients, 1 if "label_smoothing" in options else 1e-300)


def shapes(rank, sizes):
    """Classes along dimension 1 of several, and a single row."""
    here, classes = part(rank, sizes), sum(sizes)
    x = randn(2, classes, 3, 1, seed=0)
    t = torch.randint(classes, (2, 3, 1), generator=generator(1))
    ours = library.parallel_cross_entropy(x[:, here], t, reduction="none")
    close(ours, library.cross_entropy(x, t, reduction="none"))
    x, t = x[0, :, 0, 0], t[0, 0, 0].to(torch.uint8)
    for reduction in ("mean", "none"):
        ours = library.parallel_cross_entropy(
            x[here], t, reduction=reduction
        )
        close(ours, library.cross_entropy(x, t.long()))
    assert library.parallel_softmax(x[here], 0).shape == x[here].shape
    nothing = library.parallel_cross_entropy(
        x[here][None, :][:0], t[None][:0]
    )
    assert nothing.isnan()


def layer(rank, sizes, dtype=torch.float64, batch=(6,)):
    """Samples, weight, bias, targets; the last two of this rank, too."""
    classes = sum(sizes)
    x = randn(*batch, 5, seed=0).to(dtype)
    w, b = randn(classes, 5, seed=1).to(dtype), randn(classes, seed=2)
    b[: classes // 2] -= 30
    t = torch.randint(classes, batch, generator=generator(3))
    t.view(-1)[0] = -100
    return x, w, b.to(dtype), t


def leaves(*tensors):
    return [
        None if t is None else t.clone().requires_grad_() for t in tensors
    ]


def linear(rank, sizes, options, with_bias=True, batch=(6,)):
    here = part(rank, sizes)
    x, w, b, t = layer(rank, sizes, batch=batch)
    b = b if with_bias else None
    t = t.masked_fill(t == -100, options.get("ignore_index", -100))
    if not batch:
        t = t.clamp(min=0)
    full = leaves(x, w, b)
    z = peer.linear(*full).view(-1, sum(sizes))
    expect = library.cross_entropy(z, t.flatten(), **options)
    mine = leaves(x, w[here], None if b is None else b[here])
    got = library.parallel_linear_cross_entropy(
        *mine[:2], t, mine[2], **options
    )
    same(got)
    none = options.get("reduction") == "none"
    assert got.shape == (t.shape if none else ())
    # Of sums of five products of about one.
    close(got.flatten(), expect.view(got.numel()), 1)
    cotangent = randn(*got.shape, seed=4)
    wanted = [i for i in range(3) if full[i] is not None]
    expected = torch.autograd.grad(
        expect, [full[i] for i in wanted], cotangent.view(expect.shape)
    )
    for _ in range(2):  # the second time without the logits that were kept
        found = torch.autograd.grad(
            got, [mine[i] for i in wanted], cotangent, retain_graph=True
        )
        same(found[0])
        close(found[0], expected[0], 10)
        for a, b in zip(found[1:], expected[1:], strict=True):
            close(a, b[here], 10)


def linear_masked(rank, sizes):
    """A slice whose bias is -inf, NaN in a row that is ignored."""
    here = part(rank, sizes)
    if not sum(sizes[1:]):
        return
    x, w, b, t = layer(rank, sizes)
    b[part(0, sizes)] = -INF
    t[1:] = sum(sizes) - 1
    x[0] = NAN
    expect = library.cross_entropy(peer.linear(x, w, b), t)
    mine = leaves(x, w[here], b[here])
    got = library.parallel_linear_cross_entropy(*mine[:2], t, mine[2])
    close(got, expect, 1)
    gradients = torch.autograd.grad(got, mine)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][0].any()
    if rank == 0:
        assert not gradients[1].any()


def linear_halves(rank, sizes):
    """Products, sums and all-reduces are float32, and so is x's gradient."""
    here = part(rank, sizes)
    x, w, b, t = layer(rank, sizes, torch.bfloat16)
    full = leaves(x.float(), w.float(), b.float())
    expect = peer.cross_entropy(peer.linear(*full), t)
    expected = torch.autograd.grad(expect, full)
    mine = leaves(x, w[here], b[here])
    got = library.parallel_linear_cross_entropy(*mine[:2], t, mine[2])
    found = torch.autograd.grad(got, mine)
    close(got, expect.bfloat16())
    # Rounded once to eight digits, and float32 before that.
    close(found[0], expected[0].bfloat16(), 1e-3)
    close(found[1], expected[1][here].bfloat16(), 1e-3)


def some_gradients(rank, sizes):
    """Where only one of the tensors is asked for."""
    here = part(rank, sizes)
    x, w, _, t = layer(rank, sizes)
    for i in range(2):
        mine = [x, w[here].clone()]
        mine[i] = mine[i].clone().requires_grad_()
        library.parallel_linear_cross_entropy(*mine, t).backward()
        assert mine[i].grad.isfinite().all()
    with torch.no_grad():
        library.parallel_linear_cross_entropy(x, w[here], t)


@contextlib.contextmanager
def counted():
    """The sizes of all-reduces; all-gathers of tensors are not allowed."""
    sizes, known = [], distributed.all_reduce

    def wrapped(value, *arguments, **options):
        sizes.append(tuple(value.shape))
        return known(value, *arguments, **options)

    distributed.all_reduce = wrapped
    try:
        yield sizes
    finally:
        distributed.all_reduce = known


def communication(rank, sizes):
    """How much is said: (forward, backward) of each function."""
    here = part(rank, sizes)
    x, w, _, t = layer(rank, sizes)
    z = randn(6, sum(sizes), seed=5)[:, here]
    z, x, w = leaves(z, x, w[here])
    calls = {
        "logsumexp": lambda: library.parallel_logsumexp(z, 1),
        "softmax": lambda: library.parallel_softmax(z, 1),
        "cross_entropy": lambda: library.parallel_cross_entropy(z, t),
        "linear": lambda: library.parallel_linear_cross_entropy(x, w, t),
    }
    found = {}
    for name, call in calls.items():
        with counted() as forward:
            y = call().sum()
        with counted() as backward:
            y.backward()
        found[name] = forward, backward
    return found


# --- what goes wrong -----------------------------------------------------


def message(call, kind=RuntimeError):
    """Of the error that a call raises."""
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def refusal(rank, sizes, case):
    """One rank, number 1, is wrong: what every rank says."""
    here = part(rank, sizes)
    x, w, b, t = layer(rank, sizes)
    z = randn(6, sum(sizes), seed=5)[:, here]
    odd = rank == 1
    calls = {
        "dtype": lambda: library.parallel_logsumexp(
            z.float() if odd else z, 1
        ),
        "rows": lambda: library.parallel_softmax(z[:5] if odd else z, 1),
        "dim": lambda: library.parallel_softmax(z, 2 if odd else 1),
        "type": lambda: library.parallel_logsumexp(1 if odd else z, 1),
        "temperature": lambda: library.parallel_softmax(
            z, 1, temperature=2 if odd else 1
        ),
        "gradient": lambda: library.parallel_softmax(
            z.clone().requires_grad_(odd), 1
        ),
        "targets": lambda: library.parallel_cross_entropy(
            z, t.flip(0) if odd else t
        ),
        "reduction": lambda: library.parallel_cross_entropy(
            z, t, reduction="sum" if odd else "mean"
        ),
        "bias": lambda: library.parallel_linear_cross_entropy(
            x, w[here], t, b[here] if odd else None
        ),
        "features": lambda: library.parallel_linear_cross_entropy(
            x, w[here, :4] if odd else w[here], t
        ),
    }
    said = message(calls[case], Exception)
    # Nothing is left over that would disturb the next call.
    close(library.parallel_logsumexp(z, 1).exp(), together(z).exp())
    return said


def together(z):
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, z)
    return library.logsumexp(torch.cat(found, 1), 1)


def everybody_wrong(rank, sizes):
    """What all of them say, at once."""
    z = randn(6, sum(sizes), seed=5)[:, part(rank, sizes)]
    t = torch.full((6,), sum(sizes))
    y = library.parallel_logsumexp(z.clone().requires_grad_(), 1)
    outside = library.parallel_logsumexp
    lonely = distributed.new_group([0])

    def twice():
        x = z.clone().requires_grad_()
        loss = library.parallel_cross_entropy(x, t - 1)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        g.sum().backward()

    said = {
        "range": message(
            lambda: library.parallel_cross_entropy(z, t), IndexError
        ),
        "probabilities": message(
            lambda: library.parallel_cross_entropy(z, z.softmax(1)),
            NotImplementedError,
        ),
        "integers": message(
            lambda: outside(z.long(), 1), NotImplementedError
        ),
        "0-d": message(lambda: outside(torch.tensor(1.0), 0)),
        "twice": message(twice),
        "vmap": message(
            lambda: torch.vmap(lambda z: outside(z, 1))(z[None]),
            NotImplementedError,
        ),
        "group": rank and message(lambda: outside(z, 1, group=lonely)),
    }
    assert y.requires_grad
    return said


def late(rank, sizes, seconds):
    """Rank 1 raises instead of taking part: what the others say."""
    limit = datetime.timedelta(seconds=seconds)
    group = distributed.new_group(timeout=limit)
    x, w, _, t = layer(rank, sizes)
    if rank == 1:
        return "ValueError: out of order"
    return message(
        lambda: library.parallel_linear_cross_entropy(
            x, w[part(rank, sizes)], t, group=group
        )
    )


def dies(rank, sizes):
    """Rank 1 is gone between forward and backward."""
    z = randn(6, sum(sizes), seed=5)[:, part(rank, sizes)].requires_grad_()
    y = library.parallel_softmax(z, 1)
    if rank == 1:
        os._exit(1)
    y.sum().backward()


def compiled(rank, sizes):
    """A compiler goes round, and compiles what stands beside."""
    z = randn(6, sum(sizes), seed=5)[:, part(rank, sizes)]

    def function(z):
        return library.parallel_softmax(2 * z, 1).log()

    x, y = leaves(z, z)
    found = torch.compile(function, backend="eager")(x)
    close(found, function(y))
    for each in (found, function(y)):
        each[:, 0].sum().backward()
    close(x.grad, y.grad)


# --- DTensor -------------------------------------------------------------


def dtensors(rank, sizes):
    """In and out; PyTorch cuts seven classes unevenly."""
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (len(sizes),))
    z, t = randn(6, 7, seed=0), torch.arange(6)
    full = z.clone().requires_grad_()
    x = distribute_tensor(z, mesh, [Shard(1)]).requires_grad_()
    calls = [
        (library.parallel_logsumexp, library.logsumexp, (1,)),
        (library.parallel_softmax, library.softmax, (1,)),
        (library.parallel_cross_entropy, library.cross_entropy, (t,)),
    ]
    for ours, theirs, arguments in calls:
        got, expect = ours(x, *arguments), theirs(full, *arguments)
        assert isinstance(got, DTensor)
        sharded = ours is library.parallel_softmax
        assert got.placements == (
            (Shard(1),) if sharded else (Replicate(),)
        )
        close(got.full_tensor(), expect)
        (got**2).sum().backward()
        (expect**2).sum().backward()
        assert x.grad.placements == (Shard(1),)
        # Smaller terms cancel in the derivative of softmax.
        close(x.grad.full_tensor(), full.grad, 1)
        x.grad = full.grad = None
    w, b, s = randn(7, 5, seed=1), randn(7, seed=2), randn(6, 5, seed=3)
    full = leaves(s, w, b)
    places = [Replicate()], [Shard(0)], [Shard(0)]
    mine = [
        distribute_tensor(v, mesh, p).requires_grad_()
        for v, p in zip((s, w, b), places, strict=True)
    ]
    target = distribute_tensor(t, mesh, [Replicate()])
    loss = library.parallel_linear_cross_entropy(*mine[:2], target, mine[2])
    assert loss.placements == (Replicate(),)
    expect = peer.cross_entropy(peer.linear(*full), t)
    close(loss.full_tensor(), expect, 1)
    loss.backward()
    expect.backward()
    for a, b, place in zip(mine, full, places, strict=True):
        assert list(a.grad.placements) == place
        close(a.grad.full_tensor(), b.grad, 1)
    whole = distribute_tensor(z, mesh, [Replicate()])
    return message(lambda: library.parallel_softmax(whole, 1))


def autocast(rank, sizes):
    """Results in the formats of PyTorch's own functions."""
    x, w, _, t = layer(rank, sizes, torch.bfloat16)
    z = (x @ w.T)[:, part(rank, sizes)]
    w = w[part(rank, sizes)]
    with torch.autocast("cpu"):
        return [
            library.parallel_logsumexp(z, 1).dtype == z.logsumexp(1).dtype,
            library.parallel_softmax(z, 1).dtype == z.softmax(1).dtype,
            library.parallel_cross_entropy(z, t).dtype == torch.float32,
            library.parallel_linear_cross_entropy(x, w, t).dtype
            == torch.float32,
        ]
