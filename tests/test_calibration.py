"""softmaxlib.calibration: bins, their error, and the fitted temperature."""

import io
import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from drawn import f64, generator, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from torch.autograd import gradcheck
from torch.nn import functional as peer

import softmaxlib
from softmaxlib import (
    ReliabilityCurve,
    TemperatureScaling,
    calibration_error,
    reliability_curve,
    softmax,
)

inf, nan = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STRATEGIES = ["uniform", "quantile"]


def case(n=200, classes=4, *, scale=2.5, seed=0, dtype=torch.float64):
    """Logits `scale` times too large, and targets."""
    z = randn(n, classes, seed=seed)
    y = torch.multinomial(torch.softmax(z, 1), 1, generator=generator(seed))
    return (scale * z).to(dtype), y[:, 0]


def two_classes(confidence):
    """Rows whose class 1 has the given probabilities."""
    c = torch.as_tensor(confidence)
    return torch.stack([1 - c, c], 1)


def by_loops(c, came_true, bins, strategy):
    """(sum of confidences, of what came true, count) a bin, in fractions."""
    c = [Fraction(v) for v in c]
    edges = [Fraction(k / bins) for k in range(bins + 1)]
    if strategy == "quantile":
        ranked, last = sorted(c), len(c) - 1
        edges = []
        for k in range(bins + 1):
            low, part = divmod(Fraction(k * last, bins), 1)
            high = min(int(low) + 1, last)
            edge = (1 - part) * ranked[int(low)] + part * ranked[high]
            edges.append(edge)
    sums = [[Fraction(0), 0, 0] for _ in range(bins)]
    for v, hit in zip(c, came_true, strict=True):
        b = next(
            i for i in range(bins) if i == bins - 1 or v <= edges[i + 1]
        )
        for i, part in enumerate((v, int(hit), 1)):
            sums[b][i] += part
    return sums


# --- the bins ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2, 3, 10, 15, 100])
def test_an_edge_belongs_to_the_bin_below(bins, dtype):
    # Each edge as its reader writes it, rounded to the format.
    c = torch.tensor([k / bins for k in range(bins + 1)], dtype=dtype)
    p, y = two_classes(c), torch.ones(bins + 1, dtype=torch.int64)
    curve = reliability_curve(p, y, bins=bins, class_index=1)
    assert curve.counts.tolist() == [2] + [1] * (bins - 1)
    assert curve.edges.tolist() == c.tolist()
    assert curve.accuracy.eq(1).all()
    if bins > 1:
        assert curve.confidence[1:].tolist() == c[2:].tolist()


def test_certainty_is_in_the_outermost_bins():
    p = two_classes(f64(0.0, 1.0, 0.0, 1.0, 0.5))
    y = torch.tensor([1, 1, 0, 0, 1])
    curve = reliability_curve(p, y, bins=4, class_index=1)
    assert curve.confidence[[0, 1, 3]].tolist() == [0, 0.5, 1]
    assert curve.accuracy[[0, 1, 3]].tolist() == [0.5, 1, 0.5]
    assert curve.counts.tolist() == [2, 1, 0, 2]


shares = st.one_of(
    st.floats(0, 1), st.integers(0, 12).map(lambda k: k / 12)
)


@given(
    st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=20),
    st.integers(1, 13),
    st.sampled_from(STRATEGIES),
)
def test_curve_and_error_as_in_fractions(pairs, bins, strategy):
    c, came_true = zip(*pairs, strict=True)
    exact = by_loops(c, came_true, bins, strategy)
    p, y = two_classes(f64(*c)), torch.tensor(came_true).long()
    options = {"bins": bins, "strategy": strategy}
    curve = reliability_curve(p, y, class_index=1, **options)
    assert isinstance(curve, ReliabilityCurve)
    # An interpolated edge is rounded. Between different values it is beyond
    # doubt which is below it, but for a gap of a few units in the last place.
    gaps = np.diff(np.unique(c))
    if strategy == "uniform" or not gaps.size or gaps.min() > 1e-9:
        assert curve.counts.tolist() == [n for *_, n in exact]
        for b, (sure, true, n) in enumerate(exact):
            if n:
                # 20 terms below 1 added up, one quotient: 22 u.
                assert abs(curve.confidence[b] - float(sure / n)) < 5e-15
                assert abs(curve.accuracy[b] - true / n) < 5e-15
            else:
                assert curve.confidence[b].isnan()
                assert curve.accuracy[b].isnan()
        gap = sum(abs(t - s) for s, t, _ in exact) / len(c)
        exact = by_loops(
            [float(v) for v in p[:, 0]], [not t for t in came_true],
            bins, strategy,
        )  # fmt: skip
        other = sum(abs(t - s) for s, t, _ in exact) / len(c)
        low = np.diff(np.unique(p[:, 0]))
        if strategy == "uniform" or not low.size or low.min() > 1e-9:
            error = calibration_error(p, y, classwise=True, **options)
            assert abs(error - float(gap + other) / 2) < 1e-14


@given(
    st.lists(st.tuples(shares, st.booleans()), min_size=2, max_size=20),
    st.integers(1, 9),
)
def test_equal_confidences_stay_together(pairs, bins):
    c = [v for v, _ in pairs] * 2  # everything is there twice
    y = torch.zeros(len(c), dtype=torch.int64)
    curve = reliability_curve(
        two_classes(f64(*c)), y, bins=bins, class_index=1,
        strategy="quantile",
    )  # fmt: skip
    assert (curve.counts % 2 == 0).all()
    assert curve.counts.sum() == len(c)
    assert (curve.edges.diff() >= 0).all()
    assert curve.edges[0] == min(c)
    assert curve.edges[-1] == max(c)


@pytest.mark.parametrize("n", [7, 30, 100, 101])
@pytest.mark.parametrize("bins", [1, 4, 7])
def test_bins_of_equal_mass(n, bins):
    p = two_classes(rand(n, seed=n))
    y = torch.zeros(n, dtype=torch.int64)
    curve = reliability_curve(
        p, y, bins=bins, class_index=1, strategy="quantile"
    )
    # Of n samples n - 1 lie above the least; the first bin has both ends.
    assert curve.counts.max() - curve.counts.min() <= 2
    assert curve.counts.min() >= (n - 1) // bins
    quantiles = np.quantile(p[:, 1], np.linspace(0, 1, bins + 1))
    # Mixed of two numbers below 1, in whichever way.
    np.testing.assert_allclose(curve.edges, quantiles, rtol=0, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bins", [1, 5, 10, 16])
@pytest.mark.parametrize("class_index", range(4))
def test_curve_as_scikit_learn(class_index, bins, strategy):
    z, y = case()
    p = softmax(z, 1)
    accuracy, confidence = calibration_curve(
        (y == class_index).numpy(),
        p[:, class_index].numpy(),
        n_bins=bins,
        strategy=strategy,
    )
    curve = reliability_curve(
        p, y, bins=bins, strategy=strategy, class_index=class_index
    )
    full = curve.counts > 0
    # The same sums of 200 terms, in another order: 200 u.
    close = {"rtol": 0, "atol": 3e-14}
    np.testing.assert_allclose(curve.accuracy[full], accuracy, **close)
    np.testing.assert_allclose(curve.confidence[full], confidence, **close)


# --- the error -----------------------------------------------------------


def test_twenty_predictions_by_hand():
    # Ten at 0.9 with 6 right, ten at 0.6 with 6 right (facts, exercise 1).
    p = two_classes(f64(*[0.9] * 10, *[0.6] * 10))
    y = torch.tensor(([1] * 6 + [0] * 4) * 2)
    for bins in (2, 10, 15):
        error = calibration_error(p, y, bins=bins)
        # 0.9 and 0.6 share a bin of two, where the mean is 0.75.
        assert abs(error - 0.15) < 1e-15
    curve = reliability_curve(p, y, bins=10)
    assert curve.counts.tolist() == [0] * 5 + [10, 0, 0, 10, 0]
    assert curve.accuracy[5] == curve.accuracy[8] == 0.6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_top_label_error_is_that_of_the_winner(strategy):
    z, y = case(seed=1)
    p = softmax(z, 1)
    c, best = p.max(1)
    options = {"bins": 7, "strategy": strategy}
    exact = by_loops(c.tolist(), (best == y).tolist(), 7, strategy)
    gap = sum(abs(t - s) for s, t, _ in exact) / len(c)
    error = calibration_error(p, y, **options)
    assert abs(error - float(gap)) < 3e-14
    # No bins can hide the gap between mean confidence and accuracy.
    assert error >= abs(c.mean() - (best == y).double().mean()) - 1e-14
    curve = reliability_curve(p, y, **options)
    gaps = (curve.accuracy - curve.confidence).abs() * curve.counts
    assert abs(gaps.nansum() / len(c) - error) < 3e-14


def test_the_first_of_several_winners_counts():
    p = torch.tensor([[0.4, 0.4, 0.2]] * 2)
    curve = reliability_curve(p, torch.tensor([0, 1]), bins=1)
    assert curve.accuracy.tolist() == [0.5]


def test_classwise_is_the_mean_over_the_classes():
    z, y = case(seed=2)
    p = softmax(z, 1)
    for strategy in STRATEGIES:
        options = {"strategy": strategy, "bins": 6}
        each = []
        for k in range(4):
            binary = two_classes(p[:, k])
            curve = reliability_curve(
                binary, (y == k).long(), class_index=1, **options
            )
            gaps = (curve.accuracy - curve.confidence).abs() * curve.counts
            each.append(gaps.nansum() / len(y))
        error = calibration_error(p, y, classwise=True, **options)
        assert abs(error - sum(each) / 4) < 3e-14


def test_base_rates_have_no_error_and_no_skill():
    y = torch.tensor([0, 0, 0, 1])
    p = f64(0.75, 0.25).expand(4, 2)
    for classwise in (False, True):
        assert calibration_error(p, y, classwise=classwise) == 0


def test_the_class_dimension_may_be_anywhere():
    z = randn(2, 3, 5, seed=4)
    p = softmax(z, 1)
    y = torch.randint(3, (2, 5), generator=generator(4))
    flat = p.movedim(1, -1).reshape(-1, 3)
    for function in (calibration_error, reliability_curve):
        ours, theirs = function(p, y, 1), function(flat, y.flatten())
        for a, b in (
            zip(ours, theirs, strict=True)
            if isinstance(ours, tuple)
            else [(ours, theirs)]
        ):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert calibration_error(p[0, :, 0], y[0, 0]).ndim == 0
    fitted = TemperatureScaling(1).fit(z, y).temperature
    again = TemperatureScaling().fit(z.movedim(1, -1), y).temperature
    assert fitted == again


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_rounded_once(strategy, dtype):
    z, y = case(dtype=dtype)
    p = softmax(z, 1)
    options = {"bins": 8, "strategy": strategy}
    error = calibration_error(p, y, **options)
    exact = calibration_error(p.double(), y, **options)
    assert error.dtype == dtype
    assert error == exact.to(dtype)
    curve = reliability_curve(p, y, **options)
    wide = reliability_curve(p.double(), y, **options)
    for part, right in zip(curve, wide, strict=True):
        right = right.to(part.dtype)
        torch.testing.assert_close(
            part, right, rtol=0, atol=0, equal_nan=True
        )
    kinds = [part.dtype for part in curve]
    assert kinds == [dtype, dtype, torch.int64, dtype]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_samples(strategy):
    p, y = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    for classwise in (False, True):
        options = {"strategy": strategy, "classwise": classwise}
        assert calibration_error(p, y, **options).isnan()
    curve = reliability_curve(p, y, bins=3, strategy=strategy)
    assert curve.counts.tolist() == [0, 0, 0]
    assert curve.confidence.isnan().all()
    assert curve.accuracy.isnan().all()


@pytest.mark.parametrize("classwise", [False, True])
def test_the_error_has_a_gradient(classwise):
    z, y = case(12)
    p = softmax(z, 1).requires_grad_()
    assert gradcheck(
        lambda p: calibration_error(p, y, classwise=classwise, bins=3), p
    )
    # Empty bins do not spoil it.
    calibration_error(p, y, classwise=classwise, bins=500).backward()
    assert p.grad.isfinite().all()
    assert p.grad.any()


@pytest.mark.parametrize("function", [calibration_error, reliability_curve])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"input": [[0.5, 0.5]]},
            TypeError,
            "input must be a torch.Tensor",
        ),
        ({"input": f64(2.0, -1.0)}, ValueError, r"in \[0, 1\].* got -1.0"),
        ({"input": f64(nan, 0.5)}, ValueError, r"in \[0, 1\].* got nan"),
        ({"input": f64(0.5, 1.5)}, ValueError, r"got 1.5"),
        ({"input": torch.tensor([1, 0])}, NotImplementedError, "dtype="),
        ({"target": 1}, TypeError, "target must be a torch.Tensor"),
        ({"target": torch.tensor(2)}, IndexError, "out of range.* got 2"),
        ({"target": torch.tensor(-1)}, IndexError, "out of range.* got -1"),
        ({"target": f64(0.5)[0]}, RuntimeError, "an integer dtype, got"),
        (
            {"target": torch.tensor(True)},
            RuntimeError,
            "integer dtype, got",
        ),
        ({"target": torch.tensor([0])}, ValueError, "shape"),
        ({"dim": 1}, IndexError, "dim out of range"),
        ({"bins": 0}, ValueError, "bins must be at least 1, got 0"),
        ({"bins": 2.5}, TypeError, "bins must be an int"),
        ({"strategy": "width"}, ValueError, "'uniform', 'quantile', got"),
    ],
)
def test_what_is_refused(function, change, error, message):
    arguments = {"input": f64(0.5, 0.5), "target": torch.tensor(1)}
    with pytest.raises(error, match=message) as raised:
        function(**arguments | change)
    assert function.__name__ in str(raised.value)


def test_what_else_is_refused():
    p, y = f64(0.5, 0.5), torch.tensor(1)
    with pytest.raises(TypeError, match="classwise must be a bool"):
        calibration_error(p, y, classwise=1)
    with pytest.raises(ValueError, match="class_index must be at least 0"):
        reliability_curve(p, y, class_index=-1)
    with pytest.raises(IndexError, match="out of bounds"):
        reliability_curve(p, y, class_index=2)
    with pytest.raises(IndexError):
        calibration_error(f64(1.0)[0], y)


# --- temperature ---------------------------------------------------------


def exact_temperature(z, y, guess):
    """The root of the slope, by the secant method with 60 digits."""
    with mpmath.workdps(60):
        rows = [
            ([mpmath.mpf(v) for v in row if v != -inf], mpmath.mpf(row[t]))
            for row, t in zip(z, y, strict=True)
        ]

        def slope(log_beta):
            beta, total = mpmath.exp(log_beta), mpmath.mpf(0)
            for row, true in rows:
                w = [mpmath.exp(beta * (v - max(row))) for v in row]
                mean = mpmath.fdot(w, [v - true for v in row])
                total += mean / mpmath.fsum(w)
            return total

        start = -mpmath.log(guess)
        return mpmath.exp(-mpmath.findroot(slope, start, verify=False))


def fit(z, y):
    z = torch.as_tensor(z, dtype=torch.float64)
    return TemperatureScaling().fit(z, torch.as_tensor(y)).temperature


# Hard ones: a mixture of scales, of gaps beyond reach of a first guess, of
# nearly separable and nearly random rows, and impossible classes.
HARD = [
    ([[3.0, 0.0]] * 3, [0, 0, 1]),
    ([[1.0, 0.0]] * 1000, [0] * 999 + [1]),
    ([[0.0, 1e-12], [1.0, 0.0], [1.0, 0.0]], [0, 0, 0]),
    ([[1e-8, 0.0], [1.0, 0.0], [1.0, 0.0]], [0, 0, 1]),
    ([[1e4, 0.0], [1.0, 0.0], [1.0, 0.0]], [0, 0, 1]),
    ([[700.0, 0.0, 1.0]] * 5, [0, 0, 0, 0, 2]),
    ([[1e100, 0.0]] * 3, [0, 0, 1]),
    ([[1e200, 0.0]] * 3, [0, 0, 1]),
    ([[1e-100, 0.0]] * 3, [0, 0, 1]),
    ([[1e-290, 0.0]] * 3, [0, 0, 1]),
    ([[2.0, 1.0, -inf], [1.0, 2.0, 0.0]], [0, 0]),
    ([[1.0, 0.9, -50.0], [0.0, 3.0, 3.0]], [1, 1]),
]


@pytest.mark.parametrize(("z", "y"), HARD)
def test_hard_temperatures_against_mpmath(z, y):
    T = fit(z, y)
    exact = exact_temperature(z, y, T)
    # As promised, where the slope is no small difference of large terms: one
    # of these cancels to 1e-8 of its terms.
    bound = 1e-9 if [1e-8, 0.0] in z else 1e-12
    assert abs(T / exact - 1) < bound


@settings(max_examples=30)  # mpmath is slow
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_random_temperatures_against_mpmath(seed, scale):
    z, y = case(12, 3, scale=scale, seed=seed)
    T = fit(z, y)
    if 0 < T < inf:
        exact = exact_temperature(z.tolist(), y.tolist(), T)
        # 36 terms of the slope, each within some ulp, over its derivative:
        # with 12 samples it may be a hundred times smaller than they are.
        assert abs(T / exact - 1) < 1e-11
    assert fit(z * 1024, y) == pytest.approx(1024 * T, rel=1e-11)
    assert fit(z + 3, y) == pytest.approx(T, rel=1e-8)  # z is rounded


def test_when_the_minimum_is_finite():
    """All pairs of rows in {0, 1, 2}^2, and all targets."""
    rows = list(itertools.product(range(3), repeat=2))
    count = dict.fromkeys(["finite", "cold", "hot", "any"], 0)
    for z in itertools.product(rows, repeat=2):
        for y in itertools.product(range(2), repeat=2):
            true = [row[t] for row, t in zip(z, y, strict=True)]
            at_top = all(
                t == max(row) for t, row in zip(true, z, strict=True)
            )
            mean = Fraction(sum(map(sum, z)), 2)
            better = sum(true) > mean
            T = fit(z, y)
            if not at_top and better:
                count["finite"] += 1
                assert 0 < T < inf
                losses = [
                    peer.cross_entropy(
                        f64(*z) / t,
                        torch.tensor(y),
                    ).item()
                    for t in (T, 0.9 * T, 1.1 * T)
                ]
                assert losses[0] <= min(losses)
            elif not at_top:
                count["hot"] += 1
                assert T == inf
            elif better:
                count["cold"] += 1
                assert T == 0
            else:
                count["any"] += 1
                assert T == 1
    assert min(count.values()) > 0
    assert sum(count.values()) == 324


def test_as_scikit_learn():
    z, y = case(400, 5, seed=3)
    model = LogisticRegression(C=1e6).fit(z[:200], y[:200])
    peers = CalibratedClassifierCV(
        FrozenEstimator(model), method="temperature", ensemble=False
    ).fit(z[200:].numpy(), y[200:].numpy())
    scores = torch.from_numpy(model.decision_function(z[200:]))
    scaling = TemperatureScaling().fit(scores, y[200:])
    calibrator = peers.calibrated_classifiers_[0].calibrators[0]
    assert abs(scaling.temperature * calibrator.beta_ - 1) < 1e-6
    theirs = peers.predict_proba(z[200:].numpy())
    assert np.abs(scaling(scores).exp().numpy() - theirs).max() < 1e-6


def test_a_model_is_calibrated_on_its_own_training_set():
    # Unpenalised, W itself is free: no multiple of it is better.
    z, y = case(300, 3, seed=5)
    model = LogisticRegression(C=inf, tol=1e-10, max_iter=1000).fit(z, y)
    scores = torch.from_numpy(model.decision_function(z))
    # That of the optimiser, which stops at a gradient of 1e-10 or so.
    assert abs(TemperatureScaling().fit(scores, y).temperature - 1) < 1e-6


def test_a_factor_is_found_and_no_decision_changes():
    z, y = case(2000, 10, scale=1.0, seed=6)
    before = TemperatureScaling().fit(z, y).temperature
    scaling = TemperatureScaling().fit(2.5 * z, y)
    assert scaling.temperature == pytest.approx(2.5 * before, rel=1e-12)
    after = scaling(2.5 * z)
    assert after.argmax(1).equal(z.argmax(1))
    assert after.argsort(1).equal(z.argsort(1))
    error = [calibration_error(softmax(x, 1), y) for x in (2.5 * z, after)]
    assert error[1] < error[0] / 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fit_is_in_float64(dtype):
    z, y = case(dtype=dtype)
    assert fit(z, y) == TemperatureScaling().fit(z, y).temperature
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fit(z, y) == TemperatureScaling().fit(z, y).temperature
    z.requires_grad_()
    TemperatureScaling().fit(z, y)
    assert z.grad is None


def test_few_slopes_are_needed(monkeypatch):
    count, known = [0], torch.softmax

    def counting(*args, **options):
        count[0] += 1
        return known(*args, **options)

    monkeypatch.setattr(torch, "softmax", counting)
    for scale in (0.01, 0.5, 1.0, 2.0, 10.0, 1000.0):
        z, y = case(scale=scale)
        count[0] = 0
        fit(z, y)
        assert count[0] <= 20
    for z, y in HARD:
        count[0] = 0
        fit(z, y)
        assert count[0] <= 120


def test_the_layer_gives_log_probabilities():
    z = randn(4, 3)
    for T in (0.0, 0.5, 1.0, 3.0, inf):
        layer = TemperatureScaling(temperature=T)
        expected = softmaxlib.log_softmax(z, 1, temperature=T)
        assert layer(z).equal(expected)
        # They are logits: softmax gives the probabilities back.
        p = softmax(layer(z), 1)
        torch.testing.assert_close(p, softmax(z, 1, temperature=T))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), TemperatureScaling())
    model(torch.ones(1, 3))[0, 0].backward()
    assert model[0].weight.grad is not None


def test_the_temperature_is_part_of_the_state():
    z, y = case()
    fitted = torch.nn.Sequential(TemperatureScaling().fit(z, y))
    T = fitted[0].temperature
    stream = io.BytesIO()
    torch.save(fitted.half().state_dict(), stream)
    stream.seek(0)
    fresh = torch.nn.Sequential(TemperatureScaling(1))
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert fresh[0].temperature == T
    assert type(T) is float
    assert fresh(z).equal(fitted(z))
    assert repr(fresh[0]) == f"TemperatureScaling(dim=1, temperature={T})"
    compiled = torch.compile(fitted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), fitted(z))


@pytest.mark.parametrize(
    ("z", "y", "error", "message"),
    [
        (
            torch.zeros(0, 2),
            torch.zeros(0).long(),
            ValueError,
            "one sample",
        ),
        (f64(nan, 1.0), torch.tensor(0), ValueError, "finite logits"),
        (f64(inf, 1.0), torch.tensor(0), ValueError, "finite logits"),
        (f64(-inf, 1.0), torch.tensor(0), ValueError, "finite logits"),
        (f64(-inf, -inf), torch.tensor(0), ValueError, "finite logits"),
        (f64(0.0, 1.0), f64(0.0, 1.0), RuntimeError, "integer dtype"),
        (f64(0.0, 1.0), torch.tensor(2), IndexError, "out of range"),
        (
            torch.tensor([0, 1]),
            torch.tensor(0),
            NotImplementedError,
            "dtype",
        ),
        ([0.0], torch.tensor(0), TypeError, "a torch.Tensor"),
    ],
)
def test_what_cannot_be_fitted(z, y, error, message):
    scaling = TemperatureScaling(temperature=3.0)
    with pytest.raises(error, match=message) as raised:
        scaling.fit(z, y)
    assert "TemperatureScaling.fit()" in str(raised.value)
    assert scaling.temperature == 3


def test_options_of_the_layer():
    with pytest.raises(ValueError, match="temperature"):
        TemperatureScaling(temperature=-1.0)
    with pytest.raises(TypeError, match=r"TemperatureScaling\(\): dim"):
        TemperatureScaling(None)
    with pytest.raises(TypeError, match="temperature"):
        TemperatureScaling(temperature="warm")
