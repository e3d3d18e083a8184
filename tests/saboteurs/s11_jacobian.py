"""Wrong libraries for the chapter on the Jacobian."""

import math

import torch

import softmaxlib
from saboteurs import kernel, plain, replace, right, saboteur
from softmaxlib import softmax, softmax_jacobian, softmax_jvp, softmax_vjp

CHAPTER = "11_jacobian"


def spoil_dense(patch, name, change):
    """Pass Jacobian or Hessian through `change(it, p, 1 / T)`."""
    known = right(name)

    def wrong(x, dim, temperature, out):
        known(x, dim, temperature, out)
        p = plain.softmax(x, None, dim, temperature).movedim(dim, -1)
        out.copy_(change(out.clone(), p, plain.slope(temperature)))

    kernel(patch, name, wrong)


def _let_product(patch, product):
    """Let JVP and VJP be `product(p, v, dim)` over T."""

    def wrong(x, v, dim, temperature, out):
        p = plain.softmax(x, None, dim, temperature)
        out.copy_(product(p, v.double(), dim) * plain.slope(temperature))

    kernel(patch, "softmax_jvp", wrong)


@saboteur(CHAPTER)
def jacobian_wrong_sign(patch):
    """Jacobian with + p_i p_j off the diagonal."""

    def change(jacobian, p, scale):
        diagonal = torch.diag_embed(jacobian.diagonal(0, -2, -1))
        return 2 * diagonal - jacobian

    spoil_dense(patch, "softmax_jacobian", change)


@saboteur(CHAPTER)
def jacobian_missing_delta(patch):
    """Jacobian with - p_i p_j on the diagonal, too."""

    def change(jacobian, p, scale):
        return jacobian - torch.diag_embed(p * scale)

    spoil_dense(patch, "softmax_jacobian", change)


@saboteur(CHAPTER)
def jacobian_of_a_sigmoid(patch):
    """Jacobian with nothing off the diagonal."""

    def change(jacobian, p, scale):
        return torch.diag_embed(jacobian.diagonal(0, -2, -1))

    spoil_dense(patch, "softmax_jacobian", change)


@saboteur(CHAPTER)
def jacobian_squeezed(patch):
    """Drops the axes of length 1 of the Jacobian."""
    known = softmaxlib.softmax_jacobian

    def squeezed(*arguments, **options):
        return known(*arguments, **options).squeeze()

    replace(patch, "softmax_jacobian", squeezed)


@saboteur(CHAPTER)
def jacobian_along_the_last_axis(patch):
    """Takes the last axis for the classes, whatever `dim` says."""
    known = softmaxlib.softmax_jacobian

    def last(input, dim, *, temperature=1.0):
        right_one = known(input, dim, temperature=temperature)
        if input.ndim < 2 or dim % input.ndim == input.ndim - 1:
            return right_one
        p = softmaxlib.softmax(input, dim, temperature=temperature)
        outer = p.unsqueeze(-1) * p.unsqueeze(-2)
        return (torch.diag_embed(p) - outer) * plain.slope(temperature)

    replace(patch, "softmax_jacobian", last)


@saboteur(CHAPTER)
def jacobian_subtracts_from_one(patch):
    """Computes the diagonal as p (1 - p), which cancels near p = 1."""

    def change(jacobian, p, scale):
        jacobian.diagonal(0, -2, -1).copy_(p * (1 - p) * scale)
        return jacobian

    spoil_dense(patch, "softmax_jacobian", change)


@saboteur(CHAPTER)
def derivatives_forget_the_temperature(patch):
    """Leaves out the 1/T of every derivative."""
    orders = {
        "softmax_vjp": 1,
        "log_softmax_vjp": 1,
        "softmax_jvp": 1,
        "softmax_jacobian": 1,
        "log_softmax_jacobian": 1,
        "softmax_hvp": 2,
        "softmax_hessian": 2,
    }
    for name, order in orders.items():
        known = right(name)

        def wrong(*arguments, known=known, order=order):
            known(*arguments)
            *_, temperature, out = arguments
            if 0 < temperature < math.inf:
                out.copy_(out.double() * temperature**order)

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def products_are_not_centred(patch):
    """JVP and VJP as p v - p (p . v): the tail cancels."""
    _let_product(patch, lambda p, v, dim: p * v - p * plain.mean(p, v, dim))


@saboteur(CHAPTER)
def products_with_the_plain_mean(patch):
    """JVP and VJP with the mean of v in place of the mean under p."""
    _let_product(patch, lambda p, v, dim: p * (v - v.mean(dim, True)))


@saboteur(CHAPTER)
def products_entry_by_entry(patch):
    """JVP and VJP as p (1 - p) v, as for the logistic function."""
    _let_product(patch, lambda p, v, dim: p * (1 - p) * v)


@saboteur(CHAPTER)
def products_along_the_last_axis(patch):
    """JVP and VJP whose mean is over the last axis, whatever `dim` says."""
    for name in ("softmax_jvp", "softmax_vjp"):
        known = getattr(softmaxlib, name)

        def last(input, v, dim, *, temperature=1.0, known=known):
            right_one = known(input, v, dim, temperature=temperature)
            if input.ndim < 2 or dim % input.ndim == input.ndim - 1:
                return right_one
            p = softmaxlib.softmax(input, dim, temperature=temperature)
            product = p * (v - plain.mean(p, v, -1))
            return product * plain.slope(temperature)

        replace(patch, name, last)


@saboteur(CHAPTER)
def second_product_without_covariance(patch):
    """Hessian-vector product that forgets the covariance."""

    def wrong(x, u, v, dim, temperature, out):
        p = plain.softmax(x, None, dim, temperature)
        u, v = (t - plain.mean(p, t, dim) for t in (u.double(), v.double()))
        out.copy_(p * u * v * plain.slope(temperature) ** 2)

    kernel(patch, "softmax_hvp", wrong)


# --- what the first edition missed ---------------------------------------


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
