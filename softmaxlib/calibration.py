"""Calibration: the reliability curve, its error, and temperature scaling.

Of the predictions made with confidence c, a share c should come out right.
Here is how to see whether they do, and the one-number repair.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from softmaxlib import _blocks, _check
from softmaxlib.functional import log_softmax

__all__ = [
    "ReliabilityCurve",
    "TemperatureScaling",
    "calibration_error",
    "reliability_curve",
]


class ReliabilityCurve(NamedTuple):
    """What :func:`reliability_curve` returns: one entry a bin.

    Attributes:
        confidence: the mean probability in the bin; NaN if it is empty.
        accuracy: the share of its samples that came true; NaN if empty.
        counts: the number of its samples, int64.
        edges: the bounds of the bins, one more than there are bins.

    Example:
        >>> import torch
        >>> from softmaxlib import reliability_curve
        >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
        >>> reliability_curve(p, torch.tensor([0, 0]), bins=2).counts
        tensor([0, 2])

    Drawn in the chapter *Calibration*.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor
    edges: Tensor


def reliability_curve(
    input: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    bins: int = 15,
    strategy: Literal["uniform", "quantile"] = "uniform",
    class_index: int | None = None,
) -> ReliabilityCurve:
    r"""Confidence and accuracy of predictions, bin by bin.

    .. math::
        \text{conf}_b = \frac{1}{n_b} \sum_{n \in b} c_n, \qquad
        \text{acc}_b = \frac{1}{n_b} \sum_{n \in b} [\hat y_n = y_n]

    with the confidence :math:`c_n`, the largest probability of sample n,
    its class :math:`\hat y_n` (the first of several), :math:`y` =
    ``target`` and :math:`n_b` the number of samples in bin b. With
    ``class_index`` = k, :math:`c_n` is the probability of class k and
    :math:`[y_n = k]` stands in the place of :math:`[\hat y_n = y_n]`.

    Args:
        input: probabilities, not logits, of any shape with K entries along
            ``dim``; float16, bfloat16, float32 or float64.
        target: class indices in [0, K), shape of ``input`` without ``dim``,
            any integer dtype.
        dim: the class dimension, in [-ndim, ndim).
        bins: how many bins, at least 1.
        strategy: ``"uniform"`` for bins of equal width on [0, 1];
            ``"quantile"`` for bins of equal mass, whose edges are quantiles
            of the confidences, linearly interpolated.
        class_index: a class, or None for the largest probability.

    Returns:
        A :class:`ReliabilityCurve`, in the dtype of ``input``.

        A bin holds its right edge and not its left one; the first bin holds
        both, so that of equal widths the first has confidence 0 and the last
        has confidence 1. An edge k / bins is rounded to the dtype of
        ``input``: 0.3 is three tenths in every format. Samples of equal
        confidence are never parted: with ties the bins of ``"quantile"``
        have unequal counts, and some may be empty.

    Raises:
        TypeError: ``input`` or ``target`` is not a tensor, an option not an
            int.
        ValueError: a probability is not in [0, 1], ``bins`` is less than
            one, ``class_index`` negative, or ``strategy`` unknown.
        IndexError: ``dim``, a class index or ``class_index`` is out of
            range.
        NotImplementedError: ``input`` is not floating point.
        RuntimeError: ``target`` has another shape, or no integer dtype.

    Accuracy: means are added up in float64 and rounded once. Values are
    read: not for ``torch.vmap``.

    Complexity: O(N K) time for N samples, and a sort for ``"quantile"``; O(N)
    memory.

    Example:
        >>> import torch
        >>> from softmaxlib import reliability_curve
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
        >>> curve = reliability_curve(p, torch.tensor([0, 1, 0]), bins=4)
        >>> curve.accuracy
        tensor([nan, nan, 0., 1.])

    Derived in the chapter *Calibration*. Source: Guo et al. (2017),
    arXiv:1706.04599.
    """
    name = "reliability_curve"
    p, y = _samples(name, input, target, dim)
    _check.shares(name, p)
    if class_index is not None:
        class_index = _check.integer(name, "class_index", class_index, 0)
    sums, edges = _binned(name, p, y, class_index, bins, strategy)
    means, counts = (sums[:2] / sums[2]).to(p.dtype), sums[2].long()
    return ReliabilityCurve(means[0], means[1], counts, edges.to(p.dtype))


def calibration_error(
    input: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    bins: int = 15,
    strategy: Literal["uniform", "quantile"] = "uniform",
    classwise: bool = False,
) -> Tensor:
    r"""The expected calibration error (ECE): the mean gap of the bins.

    .. math::
        \text{ECE} = \sum_b \frac{n_b}{N} \left| \text{acc}_b -
        \text{conf}_b \right|

    with the bins of :func:`reliability_curve` and N samples; if
    ``classwise``, the mean over the classes k of that of ``class_index`` =
    k. It depends on the bins, is biased upwards, most of all with many bins
    and few samples, and does not say whether a prediction is of any use:
    the base rates in the place of every prediction have none.

    Args:
        input, target, dim, bins, strategy: as in :func:`reliability_curve`.
        classwise: whether every class counts, or the largest probability.

    Returns:
        The error, 0-d, in the dtype of ``input``. NaN for no samples.
        Differentiable in ``input``, with the bins held constant.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError,
        RuntimeError: as :func:`reliability_curve`; ``classwise`` is not a
            bool.

    Accuracy: added up in float64 and rounded once.

    Complexity: as :func:`reliability_curve`; a sort a class if both
    ``classwise`` and ``"quantile"``.

    Example:
        >>> import torch
        >>> from softmaxlib import calibration_error
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
        >>> calibration_error(p, torch.tensor([0, 1, 0]))
        tensor(0.3000)

    Derived in the chapter *Calibration*. Sources: Naeini, Cooper and
    Hauskrecht (2015), doi:10.1609/aaai.v29i1.9602; class-wise: Kull et al.
    (2019), arXiv:1910.12656.
    """
    name = "calibration_error"
    p, y = _samples(name, input, target, dim)
    _check.shares(name, p)
    each, errors = _check.flag(name, "classwise", classwise), []
    for k in range(p.shape[1]) if each else [None]:
        (sure, true, counts), _ = _binned(name, p, y, k, bins, strategy)
        # n_b |acc - conf| without the quotients, which empty bins lack.
        errors.append((true - sure).abs().sum() / counts.sum())
    return torch.stack(errors).mean().to(p.dtype)


class TemperatureScaling(nn.Module):
    r"""Temperature scaling: logits divided by one number, fitted once.

    .. math::
        \hat T = \arg\min_T \; -\frac1N \sum_n \log
        \operatorname{softmax}(z_n / T)_{y_n}

    The loss is convex in :math:`\beta = 1/T`, with slope
    :math:`\frac1N \sum_n (\sum_i p_{ni} z_{ni} - z_{n y_n})`, whose sign
    change is bracketed in :math:`\log \beta` and found by Newton's method.
    Fit it on samples that the model was not trained on. It changes no
    decision.

    Args:
        dim: the class dimension.
        temperature: a number in [0, inf].

    Attributes:
        temperature: a Python float; it is in ``state_dict()`` as a float64
            tensor, and no conversion such as ``half()`` rounds it.

    Raises:
        TypeError: ``dim`` is not an int, ``temperature`` not a number.
        ValueError: ``temperature`` is negative or NaN.

    Shape: any, to the same shape: the log-probabilities at the temperature,
        which are logits, too. Up to a constant for each row they are
        ``input`` / T, and they exist at T = 0 and T = inf.

    Example:
        >>> import torch
        >>> from softmaxlib import TemperatureScaling
        >>> z = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
        >>> scaling = TemperatureScaling().fit(z, torch.tensor([0, 0, 1]))
        >>> round(scaling.temperature, 4)  # 3 / log 2
        4.3281
        >>> scaling(z)[0].exp()
        tensor([0.6667, 0.3333])

    Derived in the chapter *Calibration*. Source: Guo et al. (2017),
    arXiv:1706.04599.
    """

    def __init__(self, dim: int = -1, *, temperature: float = 1.0):
        super().__init__()
        name = type(self).__name__
        self.dim = _check.integer(name, "dim", dim)
        self.temperature = _check.temperature(name, temperature)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, temperature={self.temperature}"

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.temperature, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.temperature = float(state)

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, temperature=self.temperature)

    @torch.no_grad()
    def fit(self, input: Tensor, target: Tensor) -> "TemperatureScaling":
        """Find the temperature of the smallest mean loss; returns itself.

        The minimum is at a finite T > 0 if and only if some sample's target
        lacks the largest logit, and the mean logit of the targets exceeds
        the mean of all logits (each sample's mean over its classes). Where
        one of the two fails, the infimum is a limit, and that is the result:
        T = 0 if every target has the largest logit (separable), T = inf if
        the targets' mean logit does not exceed the other. Where both fail,
        all logits of every sample are equal, and T = 1.

        Args:
            input: logits with K entries along the class dimension.
            target: class indices in [0, K), shape of ``input`` without the
                class dimension.

        A class of logit -inf is out of the running in its sample.

        Raises:
            ValueError: there is no sample, a logit is NaN or +inf, or that
                of a target is -inf. Others as :func:`reliability_curve`.

        Accuracy: computed in float64; a relative error of 1e-12, or of the
        rounding of the slope over its derivative in log T if that is more.

        Complexity: O(N K) time for each of the 5 to 20 slopes, at most some
        hundred; memory of a few copies of the logits in float64.
        """
        name = f"{type(self).__name__}.fit"
        z, y = _samples(name, input, target, self.dim)
        z, possible = _blocks.widen(z), z > -math.inf
        gaps = (z - z.gather(1, y.unsqueeze(1))).masked_fill_(~possible, 0)
        down = z - z.amax(1, keepdim=True)

        def newton(T: float) -> tuple[float, float]:
            p = torch.softmax(down / T, 1)
            mean = (p * gaps).sum(1, keepdim=True)
            spread = (gaps - mean).square_().mul_(p).sum(1)
            slope = mean.mean()
            return float(slope), float(-slope / spread.mean())

        cold = float(gaps.amax(1).mean())
        hot = float((gaps.sum(1) / possible.sum(1)).mean())
        _check.finite_loss(name, cold + hot)
        limit = 0.0 if hot < 0 else math.inf if cold > 0 else 1.0
        self.temperature = _zero(newton) if hot < 0 < cold else limit
        return self


# --- what they share -----------------------------------------------------


def _samples(
    name: str, input: Any, target: Any, dim: Any
) -> tuple[Tensor, Tensor]:
    """Rows (N, K) and class indices (N) of the samples."""
    x = _check.logits(name, input)
    x = x if x.ndim else x.unsqueeze(0)
    dim = _check.dimension(name, dim, x.ndim)
    y = _check.tensor(name, "target", target)
    y = _check.class_indices(name, y, x, dim, soft=False).flatten()
    rows = x.movedim(dim, -1).reshape(len(y), x.shape[dim])
    _check.in_range(name, y, rows.shape[1])
    return rows, y


def _binned(
    name: str, p: Tensor, y: Tensor, k: int | None, bins: Any, strategy: Any
) -> tuple[Tensor, Tensor]:
    """Sums of the confidences, of what came true, of ones; and the edges."""
    bins = _check.integer(name, "bins", bins, 1)
    _check.choice(name, "strategy", strategy, "uniform", "quantile")
    c, guess = p.max(1) if k is None else (p[:, k], k)
    wide, cuts = _blocks.widen(c), torch.arange(bins + 1, device=p.device)
    if strategy == "uniform" or not len(c):
        edges = (_blocks.widen(cuts) / bins).to(p.dtype).to(wide.dtype)
    else:
        # The rank of a quantile in integers: a whole one is no mixture.
        last, ranked = len(c) - 1, wide.detach().sort().values
        low, part = cuts * last // bins, _blocks.widen(cuts * last % bins)
        high = ranked[(low + 1).clamp(max=last)]
        edges = torch.lerp(ranked[low], high, part / bins)
    place = torch.bucketize(wide.detach().contiguous(), edges[1:-1])
    values = torch.stack(
        [wide, (y == guess).to(wide), torch.ones_like(wide)]
    )
    return wide.new_zeros(3, bins).index_add(1, place, values), edges


def _zero(newton: Callable[[float], tuple[float, float]]) -> float:
    """The T of slope zero; `newton` gives slope and Newton step in 1 / T.

    In log(1 / T), from T = 1 outwards until the zero is between two points,
    then Newton steps, or halves of the bracket where such a step is more
    than half of the one before. The bracket is never narrower than the last
    step was long, so that no step leaves it.
    """
    low, high, at, step = -math.inf, math.inf, 0.0, 0.5
    for _ in range(200):
        T = math.exp(min(max(-at, -709.0), 709.0))  # all but 0 and inf
        slope, change = newton(T)
        if slope == 0 or abs(step) <= 1e-13:
            break
        low, high = (low, at) if slope > 0 else (at, high)
        last, step = step, T * change
        if math.isinf(high - low):
            step = math.copysign(2 * last, -slope)
        elif not 0 < abs(step) < abs(last) / 2:
            step = (low + high) / 2 - at
        at += step
    return T
