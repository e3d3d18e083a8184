"""Wrong libraries for the chapter on the softmax function."""

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

CHAPTER = "02_definition"
VALUES = ("softmax", "log_softmax", "logsumexp")
# Those whose last arguments are the temperature and `out`.
ABOUT_SOFTMAX = (
    "softmax",
    "log_softmax",
    "softmax_vjp",
    "log_softmax_vjp",
    "softmax_jvp",
    "softmax_hvp",
    "softmax_jacobian",
    "log_softmax_jacobian",
    "softmax_hessian",
)


# --- noticed by every check of a statement about softmax -----------------


def _at_another_temperature(patch, change):
    """Another softmax, with the derivatives that belong to it."""
    for name in ABOUT_SOFTMAX:
        known = right(name)

        def wrong(*arguments, known=known):
            *others, temperature, out = arguments
            known(*others, change(temperature), out)

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def uniform(patch):
    """Gives every class that takes part the same probability."""
    _at_another_temperature(patch, lambda temperature: math.inf)


@saboteur(CHAPTER)
def doubled_temperature(patch):
    """Divides the logits by twice the temperature."""
    _at_another_temperature(patch, lambda temperature: 2 * temperature)


@saboteur(CHAPTER)
def hard_arg_max(patch):
    """Gives all probability to the first of the largest logits."""

    def winner(x, mask, dim):
        if not x.shape[dim]:
            return x
        z = x if mask is None else x.masked_fill(~mask, -math.inf)
        index = z.argmax(dim, keepdim=True)
        alone = torch.full_like(x, -math.inf)
        return alone.scatter(dim, index, x.gather(dim, index))

    for name in ABOUT_SOFTMAX:
        if name == "softmax_vjp":  # from the output, which is hard already
            continue
        known = right(name)
        masked = name in ("softmax", "log_softmax", "log_softmax_vjp")

        def wrong(x, *arguments, known=known, masked=masked):
            mask = arguments[-4] if masked else None
            known(winner(x, mask, arguments[-3]), *arguments)

        kernel(patch, name, wrong)


# --- the mistakes of the chapter -----------------------------------------


@saboteur(CHAPTER)
def wrong_axis(patch):
    """Normalises over the next dimension, where there is one."""
    known = right_check("dimension")

    def next_one(function, dim, ndim):
        return (known(function, dim, ndim) + 1) % max(ndim, 1)

    check(patch, "dimension", next_one)


@saboteur(CHAPTER)
def a_default_dimension(patch):
    """Guesses the dimension from the rank where none is given."""
    for name in ("softmax", "log_softmax"):
        known = getattr(softmaxlib, name)

        def guessing(input, dim=None, known=known, **options):
            if dim is None:
                dim = 0 if input.ndim in (0, 1, 3) else 1
            return known(input, dim, **options)

        replace(patch, name, guessing)
    for name in ("Softmax", "LogSoftmax"):
        known = getattr(softmaxlib, name).__init__

        def init(layer, dim=1, *, known=known, **options):
            known(layer, dim, **options)

        replace(patch, f"{name}.__init__", init)


@saboteur(CHAPTER)
def eps_in_the_denominator(patch):
    """Adds 1e-8 to the sum of the exponentials."""
    for name in VALUES:
        formula = getattr(plain, name)

        def wrong(x, mask, dim, temperature, out, formula=formula):
            out.copy_(formula(x, mask, dim, temperature, eps=1e-8))

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def writes_into_its_input(patch):
    """Shifts the logits in place, in the caller's tensor."""
    for name in VALUES:
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known):
            known(x, mask, dim, temperature, out)
            if x.numel() and out is not x:
                x.copy_(x - x.amax(dim, keepdim=True))

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def divide_by_the_others(patch):
    """Leaves a class out of its own denominator: odds, not shares."""
    known = right("softmax")

    def wrong(x, mask, dim, temperature, out):
        known(x, mask, dim, temperature, out)
        out.div_(1 - out.double())

    kernel(patch, "softmax", wrong)


@saboteur(CHAPTER)
def base_two(patch):
    """Raises 2, not e, to the logits."""
    for name in VALUES:
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known):
            scaled = (x.double() * math.log(2)).to(x.dtype)
            known(scaled, mask, dim, temperature, out)

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def no_exponential(patch):
    """Divides the logits themselves by their sum."""

    def wrong(x, mask, dim, temperature, out):
        z = x if mask is None else x.masked_fill(~mask, 0)
        out.copy_(z / z.sum(dim, keepdim=True))

    kernel(patch, "softmax", wrong)


# --- what the first edition missed ---------------------------------------


@saboteur("02_definition")
def casts_the_result(patch):
    """Casts the result to `dtype`, not the input, where both are floats."""
    right = softmaxlib.softmax

    def late(input, dim, *, dtype=None, **options):
        if dtype is None or not input.is_floating_point():
            return right(input, dim, dtype=dtype, **options)
        return right(input, dim, **options).to(dtype)

    replace(patch, "softmax", late)


@saboteur("02_definition")
def layer_with_a_default_axis(patch):
    """A layer that takes the last axis where nobody names one."""

    class Guessing(softmaxlib.Softmax):
        def __init__(self, dim=-1, *args, **options):
            super().__init__(dim, *args, **options)

    replace(patch, "Softmax", Guessing)


@saboteur("02_definition")
def mask_as_a_logit(patch):
    """Writes -inf for masked entries: a fully masked row becomes NaN."""
    right = softmaxlib.softmax

    def filled(input, dim, *, mask=None, **options):
        if mask is not None:
            input = input.masked_fill(~mask, -math.inf)
        return right(input, dim, **options)

    replace(patch, "softmax", filled)


@saboteur("02_definition")
def absent_means_zero(patch):
    """Masked entries count as logits 0."""
    right = softmaxlib.softmax

    def dense(input, dim, *, mask=None, **options):
        if mask is not None:
            input = input.masked_fill(~mask, 0)
        return right(input, dim, **options)

    replace(patch, "softmax", dense)


@saboteur("02_definition")
def log_of_the_rounded_softmax(patch):
    """Takes the logarithm after the softmax has underflowed."""
    right = softmaxlib.softmax

    def logarithm(input, dim, **options):
        return right(input, dim, **options).log()

    replace(patch, "log_softmax", logarithm)


@saboteur("02_definition")
def naive_formula_is_the_stable_one(patch):
    """The textbook formula, repaired: the foil does not overflow."""
    replace(patch, "naive_softmax", softmaxlib.softmax)
