"""Draws from the softmax: powered chi-square tests, and the edges.

The seed is 0 everywhere, and a sampler is rejected at p < 1e-6: at that
level a right one is rejected for no seed that one would think of, and the
numbers of draws are such that the wrong ones below are far beyond it.
"""

import doctest
import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from softmaxlib import _blocks, sampling
from softmaxlib.sampling import gumbel_max, gumbel_top_k, sample

F16, BF16 = torch.float16, torch.bfloat16
F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan
SAMPLERS = (sample, gumbel_max)
ALL = (sample, gumbel_max, gumbel_top_k)
# The logits of the chapter on sampling.
Z = torch.tensor([2.0, 1.0, 3.0, 5.0, 4.0], dtype=F64)
ALARM = 1e-6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact(z, temperature=1.0):
    """Probabilities by NumPy in float64, independent of the library."""
    z = np.asarray(z, float)
    w = np.exp((z - z.max()) / temperature)
    return w / w.sum()


def p_value(draws, p):
    """Chi-square test of draws against probabilities.

    Classes expected fewer than 5 times are pooled.
    """
    counts = np.bincount(draws.flatten().numpy(), minlength=len(p))
    assert len(counts) == len(p)
    assert not counts[p == 0].any()
    expect = p * counts.sum()
    rare = expect < 5
    observed, expect = (
        np.append(v[~rare], v[rare].sum()) for v in (counts, expect)
    )
    keep = expect > 0
    observed, expect = observed[keep], expect[keep]
    statistic = ((observed - expect) ** 2 / expect).sum()
    return scipy.stats.chi2.sf(statistic, len(expect) - 1)


def logits(classes, seed=0, dtype=F64):
    return torch.randn(classes, generator=generator(seed), dtype=dtype)


# --- the distribution ----------------------------------------------------


@pytest.mark.parametrize("draw", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_right_temperature(draw, temperature):
    draws = draw(Z, 10**5, temperature=temperature, generator=generator())
    assert p_value(draws, exact(Z, temperature)) > ALARM


# Few classes and many, few draws and many, weights in either format.
@pytest.mark.parametrize(
    ("classes", "draws", "calls"),
    [
        (2, 10**5, 1),
        (8, 10**5, 1),
        (12, 10**4, 1),
        (16, 10**5, 1),
        (32, 10**5, 1),
        (33, 10**5, 1),
        (100, 200, 100),
        (100, 10**5, 1),
        (5000, 10**5, 1),
        (32768, 512, 40),
    ],
)
def test_any_number_of_classes_and_draws(classes, draws, calls):
    g = generator()
    for dtype in (F32, F64):
        z = logits(classes, dtype=dtype)
        y = torch.cat([sample(z, draws, generator=g) for _ in range(calls)])
        assert p_value(y, exact(z.double())) > ALARM


# In one block and in several.
@pytest.mark.parametrize("classes", [5, 20, 40])
@pytest.mark.parametrize("n", [300, 2000, 60_000])
def test_batches_have_their_own_distributions(classes, n):
    z = torch.randn(6, classes, generator=generator(), dtype=F64)
    y = torch.cat(
        [sample(z, n, generator=generator(s)) for s in range(3)], -1
    )
    for row, draws in zip(z, y, strict=True):
        assert p_value(draws, exact(row)) > ALARM
    assert (
        p_value(
            y[0] * classes + y[1],
            np.outer(exact(z[0]), exact(z[1])).ravel(),
        )
        > ALARM
    )


@pytest.mark.parametrize("draw", SAMPLERS)
def test_a_temperature_of_1_1_is_detected(draw):
    draws = draw(Z, 10**5, temperature=1.1, generator=generator())
    assert p_value(draws, exact(Z)) < ALARM


def noisy_max(noise):
    return (Z + noise).argmax(-1)


def test_gaussian_noise_is_detected():
    shape = (10**5, 5)
    rng = np.random.default_rng(0)
    # Of the same mean (it does not matter) and variance.
    normal = rng.normal(0.5772156649, math.pi / 6**0.5, shape)
    assert p_value(noisy_max(torch.from_numpy(normal)), exact(Z)) < ALARM
    right = torch.from_numpy(rng.gumbel(size=shape))
    assert p_value(noisy_max(right), exact(Z)) > ALARM


@pytest.mark.parametrize("classes", [20, 40])
def test_sequences_are_independent(classes):
    # Draws that are not independent show in neighbours, in distant ones, or
    # in pairs of rows.
    z = torch.zeros(2, classes, dtype=F64)
    y = sample(z, 50_000, generator=generator())
    uniform = np.full(classes**2, classes**-2.0)
    assert p_value(y[0] * classes + y[1], uniform) > ALARM
    for lag in (1, 2, 25_000):
        pairs = y[:, :-lag] * classes + y[:, lag:]
        assert p_value(pairs, uniform) > ALARM
    # Many short calls: a fixed position is as random as any other.
    z = torch.zeros(500, classes, dtype=F64)
    y = sample(z, 512, generator=generator())
    for place in (0, 255, 511):
        assert p_value(y[:, place], np.full(classes, 1 / classes)) > ALARM
    pairs = y[:, 0] * classes + y[:, 1]
    assert p_value(pairs * 10 // classes**2, np.full(10, 1 / 10)) > ALARM


def test_sorted_draws_are_detected():
    y = sample(torch.zeros(2, 40), 50_000, generator=generator())
    uniform = np.full(1600, 1 / 1600)
    assert p_value(y[0] * 40 + y[1], uniform) > ALARM
    y = y.sort().values
    assert p_value(y[0] * 40 + y[1], uniform) < ALARM


# --- without replacement -------------------------------------------------


def plackett_luce(p, k):
    """Probabilities of ordered k-tuples, in lexicographic order."""
    orders = list(itertools.permutations(range(len(p)), k))
    values = []
    for order in orders:
        left, value = 1.0, 1.0
        for i in order:
            value *= p[i] / left
            left -= p[i]
        values.append(value)
    return orders, np.array(values)


def tuple_p_value(draws, p):
    """Test draws (k, n) against Plackett-Luce."""
    orders, values = plackett_luce(p, len(draws))
    number = {order: i for i, order in enumerate(orders)}
    where = [number[tuple(d)] for d in draws.t().tolist()]
    return p_value(torch.tensor(where), values)


def top_k(z, k, n, **options):
    batch = z.unsqueeze(-1).expand(-1, n)
    return gumbel_top_k(batch, k, 0, generator=generator(), **options)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_is_plackett_luce(k):
    assert tuple_p_value(top_k(Z, k, 50_000), exact(Z)) > ALARM


def test_top_k_at_another_temperature():
    draws = top_k(Z, 2, 50_000, temperature=2.0)
    assert tuple_p_value(draws, exact(Z, 2.0)) > ALARM
    assert tuple_p_value(draws, exact(Z)) < ALARM


def test_an_off_by_one_in_top_k_is_detected():
    three = top_k(Z, 3, 50_000)
    assert tuple_p_value(three[:2], exact(Z)) > ALARM
    assert tuple_p_value(three[1:], exact(Z)) < ALARM
    # The wrong class from an index that is off by one.
    assert tuple_p_value((three[:2] + 1) % 5, exact(Z)) < ALARM


def test_top_k_where_the_winner_is_far_above():
    # Added to logits of -1e17, the noise would be rounded away.
    z = torch.tensor([1e17, 0.0, 1.0, 2.0], dtype=F64)
    for scale in (1.0, 1e290, 1e-300, 2.0**-1000):
        draws = top_k(z * scale, 2, 20_000, temperature=scale)
        assert (draws[0] == 0).all()
        assert p_value(draws[1] - 1, exact(z[1:])) > ALARM
    # Beyond the range of float64, the order is that of the logits.
    z = torch.tensor([-2.0, 0.0, -INF, -1.0], dtype=F64)
    for temperature in (5e-324, 1e-310):
        draws = top_k(z, 3, 50, temperature=temperature)
        assert (draws == torch.tensor([[1], [3], [0]])).all()


# --- limits, masks, classes that cannot be -------------------------------


@pytest.mark.parametrize("draw", SAMPLERS)
@pytest.mark.parametrize("classes", [4, 40, 40_000])
def test_limits_of_the_temperature(draw, classes):
    n = 2000 if classes < 1000 else (700 if draw is sample else 20)
    z = torch.full((classes,), -1.0)
    z[1::2] = 2.0
    z[0] = -INF
    y = draw(z, n, temperature=0, generator=generator())
    assert (y % 2 == 1).all()
    if classes < 1000:
        p = np.where(z == 2, 2 / classes, 0)
        assert p_value(y, p) > ALARM
    for cold in (5e-324, 1e-45, 1e-20):
        y = draw(z, n, temperature=cold, generator=generator())
        assert (y % 2 == 1).all()
    y = draw(z, n, temperature=INF, generator=generator())
    assert (y != 0).all()
    if classes < 1000:
        p = np.where(z > -INF, 1 / (classes - 1), 0)
        assert p_value(y, p) > ALARM


@pytest.mark.parametrize("draw", SAMPLERS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_extreme_logits(draw, dtype):
    big = torch.finfo(dtype).max
    z = torch.tensor([-big, big, big, -big], dtype=dtype)
    for temperature in (1e-3, 1.0):
        y = draw(z, 2000, temperature=temperature, generator=generator())
        assert p_value(y, np.array([0, 0.5, 0.5, 0])) > ALARM
    # The difference overflows, its quotient does not: the exponents are 0
    # and -2.
    y = draw(z, 2000, temperature=big, generator=generator())
    assert p_value(y, exact([-1, 1, 1, -1])) > ALARM


def test_limits_of_top_k():
    z = torch.tensor([1.0, 3.0, 3.0, 2.0, -INF], dtype=F64)
    draws = top_k(z, 4, 10_000, temperature=0)
    assert (draws[2] == 3).all()
    assert (draws[3] == 0).all()
    half = np.array([0, 0.5, 0.5, 0, 0])
    assert p_value(draws[0], half) > ALARM
    assert (draws[0] + draws[1] == 3).all()
    draws = top_k(z, 4, 10_000, temperature=INF)
    assert tuple_p_value(draws, np.full(4, 1 / 4)) > ALARM


@pytest.mark.parametrize("draw", ALL)
def test_masks(draw):
    z = torch.tensor([[1.0, NAN, 0.0, 2.0], [INF, 0.5, 0.5, -1.0]])
    mask = torch.tensor([[True, False, True, False], [False, *[True] * 3]])
    z_inf = z.masked_fill(~mask, -INF)
    for temperature in (0, 0.7, 1, INF):
        options = {"temperature": temperature}
        y = draw(z, 2, mask=mask, generator=generator(), **options)
        assert mask.gather(-1, y).all()
        expect = draw(z_inf, 2, generator=generator(), **options)
        assert torch.equal(y, expect)
    # Broadcast.
    column = torch.tensor([False, False, True, True])
    y = draw(z, 2, mask=column, generator=generator())
    assert (y >= 2).all()
    if draw is not gumbel_top_k:
        y = draw(z[0], 5000, mask=mask[0], generator=generator())
        assert p_value(y, exact([1.0, -INF, 0.0, -INF])) > ALARM


@pytest.mark.parametrize("classes", [4, 64, 40_000])
def test_no_class_of_probability_zero(classes):
    # Weights [0, 10, 3, 0]: zeros at both ends and in between.
    z = torch.full((classes,), -INF)
    z[1::3], z[2::3], z[-1] = math.log(10), math.log(3), -INF
    possible = z > -INF
    for n in (100, 10**5):
        assert possible[sample(z, n, generator=generator())].all()
    n = 10**5 if classes < 100 else 30
    assert possible[gumbel_max(z, n, generator=generator())].all()
    k = int(possible.sum())
    y = gumbel_top_k(z, k, generator=generator())
    assert torch.equal(y.sort().values, possible.nonzero().squeeze(1))


def constant_uniform(patch, value):
    """Let every uniform number be `value`, which no seed would show."""

    def fill(tensor, *args, **options):
        return tensor.fill_(value)

    patch.setattr(torch.Tensor, "uniform_", fill)


@pytest.mark.parametrize("value", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("classes", [6, 60, 40_000])
def test_the_smallest_and_the_largest_uniform(monkeypatch, value, classes):
    constant_uniform(monkeypatch, value)
    z = logits(classes)
    z[0] = z[-1] = z[classes // 2] = -INF
    for shift in range(20):
        w = z * (1 + shift / 7)
        for temperature in (1, 0.7):
            y = sample(w.expand(2, -1), 3, temperature=temperature)
            assert (w[y] > -INF).all()
            y = sample(w.float(), 600, temperature=temperature)
            assert (w[y] > -INF).all()
            assert (w[sample(w, 3, temperature=temperature)] > -INF).all()
        assert (w[gumbel_max(w, 3)] > -INF).all()
        assert (w[gumbel_top_k(w, 3)] > -INF).all()


@pytest.mark.parametrize("value", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("classes", [6, 40_000])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_weight_that_underflows_is_none(
    monkeypatch, value, classes, dtype
):
    constant_uniform(monkeypatch, value)
    z = torch.full((classes,), -1000.0, dtype=dtype)
    z[[2, classes - 3]] = 0.3
    expect = classes - 3 if value else 2
    for temperature in (1, 0.7):
        y = sample(z.expand(2, -1), 4, temperature=temperature)
        assert (y == expect).all()


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 0.75])
def test_on_a_border_the_upper_class_is_drawn(monkeypatch, value):
    constant_uniform(monkeypatch, value)
    z = torch.zeros(6)
    z[[1, 4]] = -INF
    y = sample(z, 3)
    assert (y == [0, 2, 3, 5][round(4 * value)]).all()


def test_the_largest_uniform_stays_below_any_total():
    # In exact arithmetic 1 - 2**-53 times a total is below it; rounded, too.
    rng = np.random.default_rng(0)
    total = rng.uniform(1, 2, 10**5)
    total[:2] = 1, np.nextafter(2, 1)
    total *= 2.0 ** rng.integers(-1, 40, len(total))
    assert ((1 - 2.0**-53) * total < total).all()


def test_all_bits_are_random():
    # In pairs from either place of the first.
    z = torch.zeros(16, dtype=F64)
    y = sample(z, 2**19, generator=generator()).view(-1, 2)
    assert p_value(y[:, 0] * 16 + y[:, 1], np.full(256, 1 / 256)) > ALARM
    y = y.flatten()[1:-1].view(-1, 2)
    assert p_value(y[:, 0] * 16 + y[:, 1], np.full(256, 1 / 256)) > ALARM


def test_sums_added_in_parallel_are_mended(monkeypatch):
    # As a scan in blocks may leave them: 0.3 + 0.3 + 0 rounded otherwise.
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.3, 0.0]], dtype=F64)
    sums = torch.tensor([[0.0, 0.3, 0.30000001, 0.6, 0.5999]], dtype=F64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda tensor, dim: sums)
    mended = sampling._ascending(weights)
    assert (mended.diff() >= 0).all()
    assert torch.equal(mended.diff() > 0, weights[:, 1:] > 0)


# --- shapes, formats, streams --------------------------------------------


@pytest.mark.parametrize("draw", ALL)
def test_shapes(draw):
    x = torch.randn(2, 3, 4, generator=generator())
    for dim in range(-3, 3):
        for n in (0, 1, 2):
            shape = list(x.shape)
            shape[dim] = n
            y = draw(x, n, dim, generator=generator())
            assert y.shape == tuple(shape)
            assert y.shape == torch.topk(x, n, dim).indices.shape
            assert y.dtype == torch.int64
            assert y.is_contiguous()
            assert not y.numel() or y.max() < x.shape[dim]
    assert draw(torch.tensor(3.0), 1).tolist() == [0]
    assert draw(torch.tensor(3.0), 0).shape == (0,)
    assert draw(torch.randn(0, 4), 3).shape == (0, 3)
    assert draw(torch.randn(4, 0), 3, 0).shape == (3, 0)
    assert draw(torch.randn(0, 0), 3).shape == (0, 3)
    assert draw(torch.randn(2, 0), 0).shape == (2, 0)
    assert draw(torch.full((2, 4), NAN), 0).shape == (2, 0)


@pytest.mark.parametrize("draw", SAMPLERS)
def test_one_class(draw):
    assert not draw(torch.tensor([-7.0]), 1000).any()


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("n", [3, 700])
def test_layout_does_not_matter(draw, n):
    x = torch.randn(2, 3, 800, generator=generator())
    expect = draw(x, n, generator=generator())
    again = draw(x, n, -1, generator=generator())
    assert torch.equal(again, expect)
    other = draw(x, n, generator=generator(1))
    assert not torch.equal(other, expect)
    for dim in (0, 1):
        y = draw(x.movedim(-1, dim), n, dim, generator=generator())
        assert torch.equal(y.movedim(dim, -1), expect)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(draw(strided, n, generator=generator()), expect)
    flat = draw(x.reshape(6, -1), n, generator=generator())
    assert torch.equal(flat.view_as(expect), expect)


def test_layout_does_not_matter_beyond_float64():
    # Long float32 rows, whose exponentials depend on where a vector ends.
    x = torch.full((7, 4103), -5.3)
    x[:, 0] = 0
    x[:, -1] = -torch.rand(7, generator=generator(2)) * 0.6
    expect = sample(x, 37_000, generator=generator(11))
    y = sample(x.t().contiguous(), 37_000, 0, generator=generator(11))
    assert torch.equal(y.t(), expect)


@pytest.mark.parametrize("draw", ALL)
def test_a_default_device_does_not_matter(draw):
    x = torch.randn(2, 40, generator=generator())
    for z in (x, x[0], x[0, :5]):
        for temperature in (0, 0.7, 1, INF):
            options = {"temperature": temperature}
            expect = draw(z, 5, generator=generator(), **options)
            with torch.device("meta"):
                y = draw(z, 5, generator=generator(), **options)
            assert torch.equal(y, expect)


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e40, INF])
def test_any_temperature(temperature):
    z = torch.tensor([1.0, 2, -INF, 2, 0], dtype=F64)
    p = {0: [0, 0.5, 0, 0.5, 0], 1e-40: [0, 0.5, 0, 0.5, 0]}
    wanted = np.array(p.get(temperature, [0.25, 0.25, 0, 0.25, 0.25]))
    for rows in (z, z.expand(3, 5)):
        for n in (1000, 5000):
            y = sample(
                rows, n, temperature=temperature, generator=generator()
            )
            assert p_value(y, wanted) > ALARM


@pytest.mark.parametrize("draw", ALL)
def test_the_global_generator(draw):
    x = torch.randn(50, generator=generator())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = draw(x, 20)
        torch.manual_seed(5)
        assert torch.equal(draw(x, 20), first)
    assert torch.equal(draw(x, 20, generator=generator(5)), first)


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_formats(draw, dtype):
    # Up to 4096 classes all are computed in float64.
    z = torch.randn(3, 30, generator=generator()).to(dtype)
    y = draw(z, 20, temperature=0.3, generator=generator())
    expect = draw(z.double(), 20, temperature=0.3, generator=generator())
    assert torch.equal(y, expect)


def test_long_rows_in_half_precision():
    z = torch.full((40_000,), -20.0, dtype=F16)
    z[[7, 39_999]] = 5.0
    # The others share 40000 e^-25 = 6e-7 of the probability.
    y = sample(z, 600, generator=generator())
    assert set(y.tolist()) == {7, 39_999}
    y = sample(z.bfloat16(), 100, generator=generator())
    assert set(y.tolist()) == {7, 39_999}


@pytest.mark.parametrize("draw", ALL)
def test_blocks(draw, monkeypatch):
    z = torch.randn(7, 30, generator=generator(), dtype=F64)
    z[3] = -INF
    z[3, 4:14] = 0
    monkeypatch.setattr(_blocks, "SIZE", 64)
    y = draw(z, 10, generator=generator())
    assert y.shape == (7, 10)
    assert y[3].min() >= 4
    assert y[3].max() < 14
    if draw is not gumbel_top_k:
        y = draw(z, 4000, generator=generator())
        for row, draws in zip(z, y, strict=True):
            assert p_value(draws, exact(row)) > ALARM
    z[5, 1] = NAN
    with pytest.raises(ValueError, match="row \\(5,\\) of input holds NaN"):
        draw(z, 2)


@pytest.mark.parametrize(
    "shape", [(600, 1000), (3, 200, 1000), (2, 300_000)]
)
def test_no_block_is_larger_than_a_row_need_be(monkeypatch, shape):
    # So that no float64 copy of a large batch arises.
    right, sizes = sampling._invert, []

    def spy(x, n, *args):
        sizes.append(len(x) * max(x.shape[-1], n))
        return right(x, n, *args)

    monkeypatch.setattr(sampling, "_invert", spy)
    x = torch.zeros(shape)
    for n in (1, 5000):
        sizes.clear()
        y = sample(x, n, generator=generator())
        assert y.shape == (*shape[:-1], n)
        assert len(sizes) > 1
        assert max(sizes) <= max(2**18, shape[-1])


@pytest.mark.parametrize("draw", ALL)
def test_the_input_is_left_alone(draw):
    for z in (logits(30), logits(5000), logits(5000, dtype=F32)):
        z.requires_grad_()
        before, version = z.detach().clone(), z._version
        mask = torch.ones(len(z), dtype=torch.bool)
        for t in (0, 0.5, 1, 1e308, INF):
            y = draw(z, 3, temperature=t)
            draw(z, 3, temperature=t, mask=mask)
            assert not y.requires_grad
        assert torch.equal(z, before)
        assert z._version == version
        assert mask.all()


# --- errors --------------------------------------------------------------


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("temperature", [0, 0.5, 1, 1e305, INF])
@pytest.mark.parametrize("classes", [3, 50, 5000, 50_000])
def test_rows_without_a_distribution(draw, temperature, classes):
    bad = {
        NAN: "holds NaN; mask the entry",
        INF: "holds \\+inf; mask the entry",
    }
    name = draw.__name__
    n = 600 if draw is sample else 2

    def refused(z, words, **options):
        with pytest.raises(ValueError, match=f"^{name}\\(\\): {words}"):
            draw(z, n, temperature=temperature, **options)

    none_of = "has 0 of {} classes to draw from, logits that are -inf or"

    for dtype in (F32, F64):
        for value, words in bad.items():
            z = torch.zeros(classes, dtype=dtype)
            z[1] = value
            refused(z, f"input {words}")
        z = torch.full((classes,), -INF, dtype=dtype)
        refused(z, f"input {none_of.format(classes)}")
    if classes <= 50:
        z = torch.zeros(2, classes, 3)
        z[1, :, 2] = -INF
        with pytest.raises(
            ValueError, match=r"row \(1, 2\) of input has 0 of"
        ):
            draw(z, 2, 1, temperature=temperature)
        z = torch.zeros(classes)
        none = torch.zeros(classes, dtype=torch.bool)
        refused(z, f"input {none_of.format(classes)}", mask=none)


@pytest.mark.parametrize("draw", ALL)
def test_errors(draw):
    name = re.escape(f"{draw.__name__}(): ")
    count = "k" if draw is gumbel_top_k else "num_samples"
    z = torch.zeros(3)

    def refused(kind, words, *args, **options):
        with pytest.raises(kind, match="^" + name + words):
            draw(*args, **options)

    refused(TypeError, "input must be a torch.Tensor", [1.0], 2)
    refused(NotImplementedError, "input must be of dtype", z.long(), 2)
    for value in (2.0, True, np.True_, None, "2", (2,), torch.tensor(2)):
        refused(TypeError, f"{count} must be an int, got", z, value)
    refused(ValueError, f"{count} must be at least 0, got -1", z, -1)
    refused(IndexError, "dim out of range", z, 2, 1)
    refused(TypeError, "dim must be an int", z, 2, None)
    refused(ValueError, "temperature must be in", z, 2, temperature=-1)
    refused(ValueError, "temperature must be in", z, 2, temperature=NAN)
    beyond = "temperature must be a float or inf"
    refused(ValueError, beyond, z, 2, temperature=10**400)
    refused(TypeError, "temperature must be", z, 2, temperature="hot")
    refused(TypeError, "mask must be of dtype bool", z, 2, mask=z)
    refused(RuntimeError, "mask must be broad", z, 2, mask=z[:2] == 0)
    none = r"input has 0 of 0 classes to draw from"
    refused(ValueError, rf"row \(0,\) of {none}", torch.zeros(2, 0), 1)
    refused(ValueError, none, torch.zeros(0), 1)
    with pytest.raises(TypeError):
        draw(z, 2, generator=0)
    with pytest.raises(TypeError):
        draw(z, 2, 0, 1.0)


def test_k_is_at_most_the_number_of_classes():
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, -INF, 1.0]])
    words = r"row \(1,\) of input has 2 of 3 .* at least 3; .* a smaller k"
    for temperature in (0, 1, INF):
        with pytest.raises(ValueError, match=words):
            gumbel_top_k(z, 3, temperature=temperature)
    mask = torch.tensor([True, False, True])
    with pytest.raises(ValueError, match="input has 2 of 3"):
        gumbel_top_k(z[0], 3, mask=mask)
    with pytest.raises(ValueError, match="has 3 of 3 .* at least 4"):
        gumbel_top_k(z[:1], 4)


# --- however it is called ------------------------------------------------


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16])
def test_integers_of_numpy(draw, kind):
    x = torch.randn(3, 4, generator=generator())
    y = draw(x, kind(2), kind(0), generator=generator())
    assert torch.equal(y, draw(x, 2, 0, generator=generator()))


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_vmap_is_refused_in_words(draw, randomness):
    x = torch.randn(3, 4, generator=generator())
    words = rf"^{draw.__name__}\(\): torch.vmap.* as leading dimensions"

    def refused(function, *args):
        with pytest.raises(RuntimeError, match=words):
            torch.vmap(function, randomness=randomness)(*args)

    refused(lambda z: draw(z, 2), x)
    refused(lambda m: draw(x[0], 2, mask=m), x < 9)
    # Under another transform, too.
    refused(torch.func.grad(lambda z: z[draw(z, 2)].sum()), x)


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("temperature", [0, 0.7, 1, INF])
def test_other_transforms_see_draws_as_constants(draw, temperature):
    x = torch.randn(3, 4, generator=generator(), dtype=F64)
    options = {"temperature": temperature}
    y = draw(x, 2, generator=generator(), **options)
    drawn = torch.zeros_like(x).scatter_add_(
        1, y, torch.ones(3, 2, dtype=F64)
    )

    def total(z):
        return z.gather(
            1, draw(z, 2, generator=generator(), **options)
        ).sum()

    assert torch.equal(torch.func.grad(total)(x), drawn)
    # Small integers, whose sum is exact.
    tangent = torch.arange(12, dtype=F64).view(3, 4)
    change = torch.func.jvp(total, (x,), (tangent,))[1]
    assert torch.equal(change, (tangent * drawn).sum())
    with torch.inference_mode():
        z = x.clone()
        assert torch.equal(draw(z, 2, generator=generator(), **options), y)


@pytest.mark.parametrize("draw", ALL)
def test_shapes_without_values(draw):
    x = torch.randn(3, 4, 5, generator=generator())
    for dim, shape in ((-1, (3, 4, 2)), (0, (2, 4, 5))):
        y = draw(x.to("meta"), 2, dim, mask=x.to("meta") < 9)
        assert y.is_meta
        assert (y.shape, y.dtype) == (shape, torch.int64)
        assert y.is_contiguous()
        with FakeTensorMode() as mode:
            y = draw(mode.from_tensor(x), 2, dim)
        assert isinstance(y, FakeTensor)
        assert (y.shape, y.dtype) == (shape, torch.int64)


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("classes", [40, 5000])
def test_autocast_changes_nothing(draw, dtype, classes):
    x = logits(classes).to(dtype)
    for temperature in (0.7, 1):
        options = {"temperature": temperature}
        expect = draw(x, 20, generator=generator(), **options)
        with torch.autocast("cpu", dtype=BF16):
            y = draw(x, 20, generator=generator(), **options)
        assert torch.equal(y, expect)


@pytest.mark.parametrize("draw", ALL)
def test_a_compiler_breaks_its_graph(draw):
    x = torch.randn(3, 40, generator=generator())
    expect = draw(2 * x, 5, generator=generator()) + 1
    torch.compiler.reset()
    function = torch.compile(
        lambda z, g: draw(2 * z, 5, generator=g) + 1, backend="eager"
    )
    assert torch.equal(function(x, generator()), expect)
    with pytest.raises(ValueError, match=r"row \(1,\) of input holds NaN"):
        function(x.index_fill(0, torch.tensor([1]), NAN), generator())


@pytest.mark.parametrize("draw", ALL)
def test_a_trace_is_refused_in_words(draw):
    with pytest.raises(RuntimeError, match="torch.jit.trace would keep"):
        torch.jit.trace(lambda z: draw(z, 2), torch.zeros(3, 4))


@pytest.mark.parametrize("draw", ALL)
def test_a_second_thread(draw):
    x = torch.randn(3, 40, generator=generator())
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(draw, x, 5, generator=generator())
    assert torch.equal(call.result(), draw(x, 5, generator=generator()))


def test_examples():
    assert doctest.testmod(sampling).failed == 0
