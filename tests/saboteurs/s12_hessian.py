"""Wrong libraries for the chapter on the Hessian."""

import torch

import softmaxlib
from saboteurs import kernel, plain, replace, right, saboteur
from saboteurs.s11_jacobian import spoil_dense

CHAPTER = "12_hessian"


def _spoil(patch, change):
    spoil_dense(patch, "softmax_hessian", change)


@saboteur(CHAPTER)
def hessian_of_the_wrong_sign(patch):
    """Returns minus the second derivative of softmax."""
    _spoil(patch, lambda known, p, scale: -known)


@saboteur(CHAPTER)
def hessian_without_a_delta(patch):
    """Forgets the delta_jk in the second derivative of softmax."""

    def change(known, p, scale):
        d = torch.eye(p.shape[-1], dtype=p.dtype) - p.unsqueeze(-2)
        pair = p.unsqueeze(-1) * p.unsqueeze(-2)
        inner = d.unsqueeze(-1) * d.unsqueeze(-2) + pair.unsqueeze(-3)
        return p[..., None, None] * inner * scale**2

    _spoil(patch, change)


@saboteur(CHAPTER)
def hessian_without_any_delta(patch):
    """Returns 2 p_i p_j p_k everywhere: symmetric, and wrong."""

    def change(known, p, scale):
        pair = p.unsqueeze(-1) * p.unsqueeze(-2)
        return 2 * p[..., None, None] * pair.unsqueeze(-3) * scale**2

    _spoil(patch, change)


@saboteur(CHAPTER)
def hessian_as_a_padded_square(patch):
    """Puts one row of each slice into a tensor of zeros."""

    def change(known, p, scale):
        square = known.diagonal(0, -3, -2).mT  # entry (i, j) is T_iij
        return torch.diag_embed(square, 0, -3, -1).mT

    _spoil(patch, change)


@saboteur(CHAPTER)
def hessian_with_one_temperature(patch):
    """Divides the second derivative of softmax by T once, not twice."""
    _spoil(patch, lambda known, p, scale: known / scale)


@saboteur(CHAPTER)
def hvp_with_one_temperature(patch):
    """Divides the product with the second derivative by T once."""

    def wrong(x, u, v, dim, temperature, out):
        p = plain.softmax(x, None, dim, temperature)
        u, v = (t - plain.mean(p, t, dim) for t in (u.double(), v.double()))
        product = p * (u * v - plain.mean(p, u * v, dim))
        out.copy_(product * plain.slope(temperature))

    kernel(patch, "softmax_hvp", wrong)


@saboteur(CHAPTER)
def curvature_without_the_outer_product(patch):
    """Takes diag(p) for the Jacobian of softmax, and p v for its product."""

    def jacobian(x, dim, temperature, out):
        p = plain.softmax(x, None, dim, temperature).movedim(dim, -1)
        out.copy_(torch.diag_embed(p * plain.slope(temperature)))

    def product(x, v, dim, temperature, out):
        p = plain.softmax(x, None, dim, temperature)
        out.copy_(p * v * plain.slope(temperature))

    kernel(patch, "softmax_jacobian", jacobian)
    kernel(patch, "softmax_jvp", product)


@saboteur(CHAPTER)
def curvature_along_the_last_axis(patch):
    """Multiplies by the Hessian of log-sum-exp over the last axis."""
    known = softmaxlib.logsumexp_hvp

    def last(input, tangent, dim):
        return known(input, tangent, -1)

    replace(patch, "logsumexp_hvp", last)


@saboteur(CHAPTER)
def transposed_log_softmax_jacobian(patch):
    """Returns I - p 1^T where it should be I - 1 p^T."""
    known = right("log_softmax_jacobian")

    def wrong(x, dim, temperature, out):
        known(x, dim, temperature, out)
        out.copy_(out.mT.clone())

    kernel(patch, "log_softmax_jacobian", wrong)


# --- what the first edition missed ---------------------------------------


@saboteur("12_hessian")
def log_softmax_jacobian_without_its_temperature(patch):
    """Forgets the 1/T of the Jacobian of log-softmax."""
    right = softmaxlib.log_softmax_jacobian

    def wrong(input, dim, *, temperature=1.0):
        return right(input, dim, temperature=temperature) * temperature

    replace(patch, "log_softmax_jacobian", wrong)


@saboteur("12_hessian")
def log_softmax_jacobian_subtracts_from_one(patch):
    """Takes 1 - p for the diagonal, which cancels where p is near 1."""
    right = softmaxlib.log_softmax_jacobian

    def wrong(input, dim, *, temperature=1.0):
        result = right(input, dim, temperature=temperature).clone()
        p = softmaxlib.softmax(input, dim, temperature=temperature)
        p = p.movedim(dim, -1)
        result.diagonal(0, -2, -1).copy_((1 - p) / temperature)
        return result

    replace(patch, "log_softmax_jacobian", wrong)


@saboteur("12_hessian")
def curvature_about_the_plain_mean(patch):
    """Centres with the plain mean where the mean under p is due."""

    def wrong(input, tangent, dim):
        p = torch.softmax(input, dim)
        return p * (tangent - tangent.mean(dim, keepdim=True))

    replace(patch, "logsumexp_hvp", wrong)


@saboteur("12_hessian")
def curvature_that_cancels(patch):
    """Computes p v - p (p . v), which rounds a confident row to 0."""

    def wrong(input, tangent, dim):
        p = torch.softmax(input, dim)
        return p * tangent - p * (p * tangent).sum(dim, keepdim=True)

    replace(patch, "logsumexp_hvp", wrong)


@saboteur("12_hessian")
def second_product_about_the_plain_mean(patch):
    """Centres the directions of the second product with plain means."""

    def wrong(input, cotangent, tangent, dim, *, temperature=1.0):
        p = softmaxlib.softmax(input, dim, temperature=temperature)
        u = cotangent - cotangent.mean(dim, keepdim=True)
        v = tangent - tangent.mean(dim, keepdim=True)
        both = u * v
        mean = (p * both).sum(dim, keepdim=True)
        return p * (both - mean) / temperature**2

    replace(patch, "softmax_hvp", wrong)
