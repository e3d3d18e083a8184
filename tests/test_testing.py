"""The tools of the checks must themselves be able to fail."""

import json
import math

import hypothesis
import mpmath
import pytest
import torch
from hypothesis import strategies as st

from softmaxlib import softmax, testing


def test_attack_counts_and_measures():
    @testing.attack("thm-x", st.integers(0, 9), cases=40, bound=9, note="n")
    def evidence(n):
        return n

    assert evidence.label == "thm-x"
    assert 10 <= evidence.cases <= 41
    assert evidence.worst == 9
    assert "worst deviation 9 of 9 allowed; n" in str(evidence)
    bundle = evidence._repr_mimebundle_()
    assert bundle["text/plain"] == repr(evidence)
    assert json.loads(bundle[testing.Evidence.MIME])["label"] == "thm-x"


def test_attack_finds_and_shrinks():
    with pytest.raises(AssertionError, match=r"thm-x: .*\(51,\)"):

        @testing.attack("thm-x", st.integers(0, 1000), bound=50)
        def _(n):
            return n

    with pytest.raises(AssertionError):

        @testing.attack("thm-x", st.integers(0, 1000))
        def _(n):
            assert n < 500

    with pytest.raises(AssertionError, match="nan"):

        @testing.attack("thm-x", st.just(math.nan), bound=1e300)
        def _(x):
            return x

    with pytest.raises(TypeError, match="bound"):

        @testing.attack("thm-x", st.integers())
        def _(n):
            return 0.0


def test_attack_is_deterministic():
    seen = []
    for _ in range(2):
        values = []
        testing.attack("thm-x", testing.logits())(values.append)
        seen.append([v.tolist() for v in values])
    assert seen[0] == seen[1]


def test_enumeration():
    evidence = testing.enumerate_cases(
        "thm-x", [(1, 2), (3, 4)], lambda a, b: b - a, bound=1
    )
    assert (evidence.cases, evidence.worst) == (2, 1)
    assert evidence.how == "enumeration"
    plain = testing.enumerate_cases("thm-x", range(3), lambda n: None)
    assert plain.worst is None
    with pytest.raises(AssertionError, match="exceeds"):
        testing.enumerate_cases("thm-x", [2], float, bound=1)
    with pytest.raises(AssertionError, match="nan"):
        testing.enumerate_cases("thm-x", [math.nan], float, bound=1)
    with pytest.raises(AssertionError, match="no case"):
        testing.enumerate_cases("thm-x", [], float, bound=1)
    with pytest.raises(TypeError, match="bound"):
        testing.enumerate_cases("thm-x", [1], float)


def test_smallest():
    assert testing.smallest(st.integers(), lambda n: n > 6) == 7
    with pytest.raises(hypothesis.errors.NoSuchExample):
        testing.smallest(st.integers(0, 3), lambda n: n > 6)


@pytest.mark.parametrize(
    "kind", ["real", "integer", "tied", "near", "offset", "wide"]
)
def test_logits(kind):
    strategy = testing.logits(
        min_classes=2, max_classes=5, magnitude=9.0, kinds=(kind,)
    )

    @testing.attack("thm-x", strategy, cases=60)
    def _(z):
        assert z.dtype == torch.float64
        assert 2 <= len(z) <= 5
        assert z.abs().max() <= 11
        if kind == "integer":
            assert torch.equal(z, z.round())
        if kind == "tied":
            assert (z == z[0]).all()


def test_logits_refuses_unknown_kinds():
    with pytest.raises(ValueError, match="unknown kind"):
        testing.smallest(testing.logits(kinds=("odd",)), lambda z: True)


def test_distributions():
    @testing.attack("thm-x", testing.distributions(), bound=1e-15)
    def _(p):
        assert (p > 0).all()
        return abs(math.fsum(p.tolist()) - 1)


def test_oracle_is_exact_where_floats_give_up():
    o = testing.oracle(torch.tensor([700.0, 0.0]))
    with mpmath.workdps(700):
        expect = -mpmath.log1p(mpmath.exp(-700))
        assert abs(o.log_softmax[0] / expect - 1) < 1e-30
        assert abs(o.logsumexp - 700 + expect) < 1e-300
        assert abs(mpmath.fsum(o.softmax) - 1) < 1e-40
    half = testing.oracle([1.0, 2.0], 0.5)
    with mpmath.workdps(30):
        assert abs(half.softmax[1] - 1 / (1 + mpmath.exp(-2))) < 1e-28


def test_ulp_error():
    one = torch.tensor([1.0], dtype=torch.float32)
    eps = mpmath.mpf(2) ** -23
    assert testing.ulp_error(one, [mpmath.mpf(1)]) == 0
    assert testing.ulp_error(one, [1 + eps]) == 1
    # Below a power of two the spacing halves.
    assert testing.ulp_error(one, [1 - eps / 2]) == 1
    tiny = mpmath.mpf(2) ** -60
    with mpmath.workprec(100):
        assert 0 < testing.ulp_error(one, [1 - tiny]) < 1e-9
    assert testing.ulp_error(one, [1 + eps], scale=2) == 0.5
    assert testing.ulp_error(one * math.nan, [mpmath.mpf(1)]) == math.inf
    assert testing.ulp_error(one * math.inf, [mpmath.mpf(1)]) == math.inf
    assert testing.ulp_error(one * math.inf, [mpmath.mpf(10) ** 39]) == 0
    assert testing.ulp_error(one * -math.inf, [mpmath.mpf(10) ** 39]) > 1
    assert testing.ulp_error(one * 0, [mpmath.mpf(2) ** -149]) == 1
    assert testing.ulp_error(torch.empty(0), []) == 0
    with pytest.raises(ValueError, match="1 computed values, 2 exact"):
        testing.ulp_error(one, [mpmath.mpf(1)] * 2)
    half = torch.tensor([2.0], dtype=torch.float16)
    assert testing.ulp_error(half, [2 + mpmath.mpf(2) ** -9]) == 1


def test_the_oracle_catches_a_wrong_softmax():
    z = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    exact = testing.oracle(z).softmax
    assert testing.ulp_error(softmax(z, 0), exact) < 3
    assert testing.ulp_error(softmax(z * (1 + 1e-14), 0), exact) > 10
