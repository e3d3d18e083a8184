"""Wrong libraries that chapter 02 must notice."""

import math

import softmaxlib
from saboteurs import replace, saboteur


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
def function_with_a_default_axis(patch):
    """Takes the last axis where nobody names one."""
    right = softmaxlib.softmax

    def guessing(input, dim=-1, **options):
        return right(input, dim, **options)

    replace(patch, "softmax", guessing)


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
