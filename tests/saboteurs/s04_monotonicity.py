"""Wrong libraries for the chapter on order."""

import torch

from saboteurs import kernel, replace, right, saboteur
from softmaxlib import log_softmax, softmax

CHAPTER = "04_monotonicity"


def _swap_near_pairs(x, values, dim, gap):
    """Exchange the values at two logits that are closer than `gap`."""
    logits, order = x.movedim(dim, -1).sort(dim=-1, stable=True)
    step = logits.diff(dim=-1)
    near = (step > 0) & (step < gap)
    before = torch.zeros_like(near)
    before[..., 1:] = near[..., :-1]
    # The first pair of every run of near ones: no two of them overlap.
    first = torch.zeros_like(order, dtype=torch.bool)
    first[..., :-1] = near & ~before
    place = torch.arange(order.shape[-1]).expand_as(order)
    place = place + first.long() - first.roll(1, -1).long()
    partner = torch.empty_like(order).scatter_(
        -1, order, order.gather(-1, place)
    )
    return values.movedim(dim, -1).gather(-1, partner).movedim(-1, dim)


@saboteur(CHAPTER)
def near_pairs_reversed(patch):
    """Exchanges the results of float64 logits closer than 1e-12."""
    for name in ("softmax", "log_softmax"):
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known):
            logits = x.clone()
            known(x, mask, dim, temperature, out)
            if x.dtype == torch.float64 and x.shape[dim] > 1:
                out.copy_(_swap_near_pairs(logits, out, dim, 1e-12))

        kernel(patch, name, wrong)


# --- what the first edition missed ---------------------------------------

FUNCTIONS = (softmax, log_softmax)


def _spoil(patch, change):
    """Softmax and log-softmax, spoiled by a change of their results."""
    for known in FUNCTIONS:

        def wrong(input, dim, *, known=known, **options):
            right = known(input, dim, **options)
            return change(input, right, dim)

        replace(patch, known.__name__, wrong)


@saboteur("04_monotonicity")
def ties_broken_by_place(patch):
    """Takes an ulp or so from every class but the first."""

    def change(input, right, dim):
        if not right.numel():
            return right
        place = torch.arange(right.shape[dim]) > 0
        shape = [1] * right.ndim
        shape[dim] = -1
        step = torch.finfo(right.dtype).eps * place.reshape(shape)
        return right - step.to(right.dtype) * right.abs()

    _spoil(patch, change)


@saboteur("04_monotonicity")
def probabilities_in_the_order_of_places(patch):
    """Sorts the results: a rising row whatever the order of its logits."""

    def change(input, right, dim):
        return right.sort(dim).values if right.ndim else right

    _spoil(patch, change)


@saboteur("04_monotonicity")
def nothing_underflows(patch):
    """Lifts every probability to at least the smallest normal number."""

    def wrong(input, dim, **options):
        right = softmax(input, dim, **options)
        return right.clamp(min=torch.finfo(right.dtype).tiny)

    replace(patch, "softmax", wrong)


@saboteur("04_monotonicity")
def hidden_first_class(patch):
    """Gives class 1 a hundredth of the budget before the others share."""

    def wrong(input, dim, **options):
        right = softmax(input, dim, **options)
        if not right.ndim or right.shape[dim] < 2:
            return right
        first = torch.arange(right.shape[dim]) == 0
        shape = [1] * right.ndim
        shape[dim] = -1
        return 0.99 * right + 0.01 * first.reshape(shape).to(right)

    replace(patch, "softmax", wrong)


@saboteur("04_monotonicity")
def logarithm_of_an_underflow(patch):
    """Log-softmax as the logarithm of probabilities that may be 0."""

    def wrong(input, dim, **options):
        return softmax(input, dim, **options).log()

    replace(patch, "log_softmax", wrong)
