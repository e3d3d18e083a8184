"""Wrong libraries that see what softmax cannot see, for chapter 05."""

import torch

from saboteurs import replace, saboteur
from softmaxlib import log_softmax, logsumexp, softmax

FUNCTIONS = (softmax, log_softmax)


def _of_changed_logits(patch, change):
    """Softmax and log-softmax of other logits than those given."""
    for known in FUNCTIONS:

        def wrong(input, dim, *, known=known, **options):
            return known(change(input, dim), dim, **options)

        replace(patch, known.__name__, wrong)


@saboteur("05_invariance")
def last_logit_taken_for_zero(patch):
    """Takes the logits for those of the gauge whose last one is 0."""

    def change(input, dim):
        last = torch.arange(input.shape[dim]) == input.shape[dim] - 1
        shape = [1] * input.ndim
        shape[dim] = -1
        return input.masked_fill(last.reshape(shape), 0)

    _of_changed_logits(patch, change)


@saboteur("05_invariance")
def logits_are_standardised(patch):
    """Divides the logits by the largest magnitude in their row."""

    def change(input, dim):
        largest = input.detach().abs().amax(dim, keepdim=True)
        return input / largest.where(largest > 0, torch.ones_like(largest))

    _of_changed_logits(patch, change)


@saboteur("05_invariance")
def high_levels_lose_bits(patch):
    """Rounds rows with a logit above 16 to eighths."""

    def change(input, dim):
        high = input.detach().abs().amax(dim, keepdim=True) > 16
        return torch.where(high, torch.round(input * 8) / 8, input)

    _of_changed_logits(patch, change)


@saboteur("05_invariance")
def last_bit_depends_on_the_level(patch):
    """Adds one spacing to the probabilities of rows above level 0."""

    def wrong(input, dim, **options):
        right = softmax(input, dim, **options)
        above = input.detach().amin(dim, keepdim=True) > 0
        up = torch.nextafter(right.detach(), torch.ones_like(right)) - right
        return right + torch.where(above, up, 0).detach()

    replace(patch, "softmax", wrong)


@saboteur("05_invariance")
def rivals_are_their_maximum(patch):
    """Log-sum-exp as the largest logit, without the other rivals."""

    def wrong(input, dim, keepdim=False, **options):
        return input.amax(dim, keepdim)

    replace(patch, "logsumexp", wrong)


@saboteur("05_invariance")
def logarithms_are_not_normalised(patch):
    """Log-softmax as the logits minus the largest: only a gauge."""

    def wrong(input, dim, *, temperature=1.0, **options):
        right = log_softmax(input, dim, temperature=temperature, **options)
        return right - right.amax(dim, keepdim=True)

    replace(patch, "log_softmax", wrong)


@saboteur("05_invariance")
def temperatures_add(patch):
    """Forgets the temperature whenever the logits are log-probabilities."""

    for known in FUNCTIONS:

        def wrong(input, dim, *, temperature=1.0, known=known, **options):
            total = logsumexp(input.detach(), dim)
            if temperature and (total.abs() < 1e-9).all():
                temperature = 1.0
            return known(input, dim, temperature=temperature, **options)

        replace(patch, known.__name__, wrong)
