"""Wrong libraries for the chapter on temperature."""

import math

import torch

import softmaxlib
from saboteurs import (
    check,
    kernel,
    plain,
    replace,
    right,
    right_check,
    saboteur,
)

CHAPTER = "07_temperature"


@saboteur(CHAPTER)
def multiply_by_the_temperature(patch):
    """Multiplies the logits by T where it should divide."""
    known = right_check("temperature")

    def reciprocal(function, value):
        value = known(function, value)
        return 1 / value if value else math.inf

    check(patch, "temperature", reciprocal)


@saboteur(CHAPTER)
def detached_normaliser(patch):
    """Treats the denominator as a constant in the backward pass."""

    def softmax_vjp(y, v, mask, dim, temperature, out):
        out.copy_(y * v * plain.slope(temperature))

    def log_softmax_vjp(x, v, mask, dim, temperature, out):
        out.copy_(v * plain.slope(temperature))

    kernel(patch, "softmax_vjp", softmax_vjp)
    kernel(patch, "log_softmax_vjp", log_softmax_vjp)


@saboteur(CHAPTER)
def divides_before_shifting(patch):
    """Divides by the temperature in the input's format, then shifts."""
    for name in ("softmax", "log_softmax"):
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known):
            known(x / temperature, mask, dim, 1.0, out)

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def infinite_temperature_forgets_the_impossible(patch):
    """Gives 1/K at T = inf to logits of -inf, too."""
    for name in ("softmax", "log_softmax"):
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known):
            if temperature == math.inf:
                x = x.masked_fill(x == -math.inf, 0)
            known(x, mask, dim, temperature, out)

        kernel(patch, name, wrong)


# --- what the first edition missed ---------------------------------------


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
