"""Wrong Jacobians and products, for chapter 11."""

import torch

from saboteurs import replace, saboteur
from softmaxlib import softmax, softmax_jacobian, softmax_jvp, softmax_vjp


@saboteur("11_jacobian")
def jacobian_of_the_first_slice(patch):
    """Gives every slice of a batch the Jacobian of the first one."""

    def wrong(input, dim, *, temperature=1.0):
        right = softmax_jacobian(input, dim, temperature=temperature)
        flat = right.reshape(-1, *right.shape[-2:])
        return flat[:1].expand_as(flat).reshape(right.shape)

    replace(patch, "softmax_jacobian", wrong)


@saboteur("11_jacobian")
def jacobian_in_single_precision(patch):
    """Computes float64 Jacobians in float32."""

    def wrong(input, dim, *, temperature=1.0):
        found = softmax_jacobian(
            input.float(), dim, temperature=temperature
        )
        return found.to(input.dtype)

    replace(patch, "softmax_jacobian", wrong)


@saboteur("11_jacobian")
def jacobian_without_its_tail(patch):
    """Sets entries of the Jacobian below 1e-12 to zero."""

    def wrong(input, dim, *, temperature=1.0):
        right = softmax_jacobian(input, dim, temperature=temperature)
        return torch.where(right.abs() < 1e-12, 0, right)

    replace(patch, "softmax_jacobian", wrong)


@saboteur("11_jacobian")
def jacobian_of_the_neighbour(patch):
    """Moves the off-diagonal edges of the Jacobian by one class."""

    def wrong(input, dim, *, temperature=1.0):
        right = softmax_jacobian(input, dim, temperature=temperature)
        return right.roll((1, 1), (-2, -1))

    replace(patch, "softmax_jacobian", wrong)


@saboteur("11_jacobian")
def products_of_the_unchanged_constant(patch):
    """JVP and VJP as p v: the mean is never subtracted."""

    def wrong(input, vector, dim, *, temperature=1.0):
        p = softmax(input, dim, temperature=temperature)
        return p * vector / temperature

    replace(patch, "softmax_jvp", wrong)
    replace(patch, "softmax_vjp", wrong)


@saboteur("11_jacobian")
def products_that_cancel(patch):
    """JVP and VJP by the plain line, which loses the tail."""

    def wrong(input, vector, dim, *, temperature=1.0):
        p = softmax(input, dim, temperature=temperature)
        mean = (p * vector).sum(dim, keepdim=True)
        return p * (vector - mean) / temperature

    replace(patch, "softmax_jvp", wrong)
    replace(patch, "softmax_vjp", wrong)


@saboteur("11_jacobian")
def jvp_holds_the_probabilities(patch):
    """JVP whose probabilities are constants: its derivative is zero."""

    def wrong(input, tangent, dim, *, temperature=1.0):
        p = softmax(input.detach(), dim, temperature=temperature)
        mean = (p * tangent).sum(dim, keepdim=True)
        held = p * (tangent - mean) / temperature
        return held + 0 * softmax_jvp(
            input, tangent, dim, temperature=temperature
        )

    replace(patch, "softmax_jvp", wrong)


@saboteur("11_jacobian")
def vjp_of_the_other_sign(patch):
    """VJP that returns minus the product."""

    def wrong(input, cotangent, dim, *, temperature=1.0):
        right = softmax_vjp(input, cotangent, dim, temperature=temperature)
        return -right

    replace(patch, "softmax_vjp", wrong)
