"""Wrong libraries for the chapter on temperature."""

import math

from saboteurs import check, kernel, plain, right, right_check, saboteur

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
