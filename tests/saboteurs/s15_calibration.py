"""Wrong libraries for the chapter on calibration."""

import math

import torch

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "15_calibration"


def _both(patch, change):
    """Let the curve and the error see probabilities and targets changed."""
    for name in ("reliability_curve", "calibration_error"):
        known = getattr(softmaxlib, name)

        def wrong(input, target, dim=-1, known=known, **options):
            input, target, options = change(input, target, options)
            return known(input, target, dim, **options)

        replace(patch, name, wrong)


def _fitting(patch, change):
    """Change the temperature that was fitted."""
    known = softmaxlib.TemperatureScaling.fit

    def fit(self, input, target):
        known(self, input, target)
        self.temperature = change(self.temperature, input, target)
        return self

    replace(patch, "TemperatureScaling.fit", fit)


def _each(curve):
    """Gap and number of samples of each bin that has some."""
    full = curve.counts > 0
    gaps = (curve.accuracy - curve.confidence)[full]
    return gaps, curve.counts[full]


def _error(patch, combine):
    """Combine gaps and counts of the bins to another error."""
    curve_of = softmaxlib.reliability_curve

    def error(input, target, dim=-1, *, classwise=False, **options):
        classes = range(input.shape[dim]) if classwise else [None]
        found = [
            combine(
                *_each(
                    curve_of(input, target, dim, class_index=k, **options)
                )
            )
            for k in classes
        ]
        return torch.stack(found).mean().to(input.dtype)

    replace(patch, "calibration_error", error)


# --- the curve and the error ---------------------------------------------


@saboteur(CHAPTER)
def bins_without_their_right_edge(patch):
    """Puts an edge in the bin above it, and confidence 1 in no bin."""
    known = softmaxlib.reliability_curve

    def curve(input, target, dim=-1, *, bins=15, **options):
        c = input.amax(dim)
        if options.get("class_index") is not None:
            c = input.select(dim, options["class_index"])
        found = known(input, target, dim, bins=bins, **options)
        if options.get("strategy", "uniform") == "quantile":
            return found
        place = (c.double() * bins).floor().long().flatten()
        counts = torch.bincount(place, minlength=bins + 1)[:bins]
        return found._replace(counts=counts)

    replace(patch, "reliability_curve", curve)


@saboteur(CHAPTER)
def certain_answers_are_dropped(patch):
    """Leaves confidence 1 out of the last bin, and of the error."""

    def change(input, target, options):
        if input.ndim == 2:
            kept = input.amax(1) < 1
            input, target = input[kept], target[kept]
        return input, target, options

    _both(patch, change)


@saboteur(CHAPTER)
def every_bin_counts_the_same(patch):
    """Takes the plain mean of the gaps, whatever the bins hold."""
    _error(patch, lambda gaps, counts: gaps.abs().mean())


@saboteur(CHAPTER)
def gaps_of_both_signs_cancel(patch):
    """Takes the absolute value after adding up, not before."""

    def combine(gaps, counts):
        return (gaps * counts).sum().abs() / counts.sum()

    _error(patch, combine)


@saboteur(CHAPTER)
def the_largest_gap(patch):
    """Reports the worst bin as if it were the mean."""
    _error(patch, lambda gaps, counts: gaps.abs().max())


@saboteur(CHAPTER)
def squares_of_the_gaps(patch):
    """Squares the gaps, and takes no root."""

    def combine(gaps, counts):
        return (gaps.square() * counts).sum() / counts.sum()

    _error(patch, combine)


@saboteur(CHAPTER)
def class_wise_is_the_top_label(patch):
    """Looks at the largest probability whatever is asked for."""

    def change(input, target, options):
        options.pop("class_index", None)
        options.pop("classwise", None)
        return input, target, options

    _both(patch, change)


@saboteur(CHAPTER)
def error_of_the_wrong_class(patch):
    """Compares with the target that counts from 1."""

    def change(input, target, options):
        return input, (target - 1) % input.shape[-1], options

    _both(patch, change)


@saboteur(CHAPTER)
def one_bin_too_few(patch):
    """Reads the number of bins as that of the edges between them."""

    def change(input, target, options):
        bins = options.get("bins", 15)
        return input, target, options | {"bins": max(bins - 1, 1)}

    _both(patch, change)


@saboteur(CHAPTER)
def always_ten_bins(patch):
    """Ignores how many bins were asked for."""

    def change(input, target, options):
        return input, target, options | {"bins": 10}

    _both(patch, change)


@saboteur(CHAPTER)
def bins_of_equal_width_always(patch):
    """Ignores that bins of equal mass were asked for."""

    def change(input, target, options):
        return input, target, options | {"strategy": "uniform"}

    _both(patch, change)


@saboteur(CHAPTER)
def the_middle_of_the_bin(patch):
    """Takes the middle of a bin for the mean confidence inside."""
    known = softmaxlib.reliability_curve

    def curve(*args, **options):
        found = known(*args, **options)
        middle = (found.edges[1:] + found.edges[:-1]) / 2
        empty = found.counts == 0
        return found._replace(
            confidence=middle.masked_fill(empty, math.nan)
        )

    replace(patch, "reliability_curve", curve)


# --- the temperature -----------------------------------------------------


@saboteur(CHAPTER)
def scaling_multiplies(patch):
    """Multiplies the logits by the temperature."""

    def forward(self, input):
        T = self.temperature
        T = 1 / T if T else math.inf
        return softmaxlib.log_softmax(input, self.dim, temperature=T)

    replace(patch, "TemperatureScaling.forward", forward)


@saboteur(CHAPTER)
def scaling_forgets_its_temperature(patch):
    """Gives the log-probabilities at temperature 1."""

    def forward(self, input):
        return softmaxlib.log_softmax(input, self.dim)

    replace(patch, "TemperatureScaling.forward", forward)


@saboteur(CHAPTER)
def temperature_stays_as_it_was(patch):
    """Returns the layer as it was."""
    replace(patch, "TemperatureScaling.fit", lambda self, *args: self)


@saboteur(CHAPTER)
def fit_returns_the_inverse(patch):
    """Takes 1 / T for the temperature."""

    def change(T, input, target):
        return 1 / T if T else math.inf

    _fitting(patch, change)


@saboteur(CHAPTER)
def fit_on_accuracy(patch):
    """Takes the first temperature of a list that has the best accuracy."""

    def change(T, input, target):
        def accuracy(T):
            hits = (input / T).argmax(1) == target
            return hits.double().mean().item()

        return max((0.5, 1.0, 2.0, 5.0), key=accuracy)

    _fitting(patch, change)


@saboteur(CHAPTER)
def fit_stays_in_a_box(patch):
    """Keeps the temperature between 0.05 and 20."""

    def change(T, input, target):
        return min(max(T, 0.05), 20.0)

    _fitting(patch, change)


@saboteur(CHAPTER)
def fit_stops_early(patch):
    """Takes fifty short steps of gradient descent in T, from 1.5."""

    def change(T, input, target):
        T = 1.5
        for _ in range(50):
            p = torch.softmax(input / T, 1)
            true = input.gather(1, target.unsqueeze(1))
            slope = ((p * input).sum(1) - true[:, 0]).mean()
            T += 0.01 * float(slope) / T**2
        return T

    _fitting(patch, change)
