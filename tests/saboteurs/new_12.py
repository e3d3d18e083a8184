"""What goes wrong in second derivatives."""

import torch

import softmaxlib
from saboteurs import replace, saboteur


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
