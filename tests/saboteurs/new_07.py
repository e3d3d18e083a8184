"""More wrong libraries for the chapter on temperature."""

import torch

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "07_temperature"


@saboteur(CHAPTER)
def zero_temperature_picks_the_first_winner(patch):
    """Gives everything to the first of several largest logits at T = 0."""
    known = softmaxlib.softmax

    def wrong(input, dim, *, temperature=1.0, **options):
        p = known(input, dim, temperature=temperature, **options)
        if temperature == 0 and p.numel() and not p.isnan().any():
            first = p.argmax(dim, keepdim=True)
            p = torch.zeros_like(p).scatter(dim, first, 1.0)
        return p

    replace(patch, "softmax", wrong)


@saboteur(CHAPTER)
def adds_a_small_number_to_the_temperature(patch):
    """Divides by T + 1e-8, so that T = 0 needs no branch."""
    known = softmaxlib.softmax

    def wrong(input, dim, *, temperature=1.0, **options):
        return known(input, dim, temperature=temperature + 1e-8, **options)

    replace(patch, "softmax", wrong)


@saboteur(CHAPTER)
def log_softmax_forgets_the_temperature(patch):
    """Shifts and sums at temperature 1, whatever was asked for."""
    known = softmaxlib.log_softmax

    def wrong(input, dim, *, temperature=1.0, **options):
        return known(input, dim, **options)

    replace(patch, "log_softmax", wrong)


@saboteur(CHAPTER)
def masks_after_normalising(patch):
    """Sets masked probabilities to 0 and forgets to renormalise."""
    known = softmaxlib.softmax

    def wrong(input, dim, *, mask=None, **options):
        p = known(input, dim, **options)
        return p if mask is None else p.where(mask, 0.0)

    replace(patch, "softmax", wrong)
