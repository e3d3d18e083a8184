"""Wrong libraries, each a small patch of the right one.

The chapters must notice every one of them: a check that no saboteur makes
fail is an empty check. A saboteur is a function that takes a pytest
`MonkeyPatch`; its docstring says what it does.
"""

import math

import torch

from softmaxlib import (
    _arguments,
    _functions,
    _kernels,
    derivatives,
    functional,
)
from softmaxlib._kernels import Tile

SABOTEURS = {}


def saboteur(chapter):
    """Register a saboteur, with the chapter that should notice it first."""

    def register(function):
        function.chapter = chapter
        SABOTEURS[function.__name__] = function
        return function

    return register


def _replace_kernel(patch, function, kernel):
    """Let the autograd function (and the plain call) use `kernel`."""
    patch.setattr(function, "kernel", staticmethod(kernel))


def _plain_total(tile, top):
    """The sum of all weights, where the library leaves the largest out."""
    sums = []
    for chunk in tile.chunks:
        weights = tile.weights(chunk, top)
        sums.append(weights.sum(-1, keepdim=True))
    return _kernels.add_up(sums), weights


def _shift_by(patch, shift):
    """Use another shift than the largest logit of the row."""
    patch.setattr(Tile, "top", shift)
    patch.setattr(Tile, "total", _plain_total)
    patch.setattr(Tile, "rest", lambda t, top: t.total(top)[0] - 1)


@saboteur("06_stability")
def subtract_the_minimum(patch):
    """Shifts by the smallest logit, so that wide rows overflow."""
    top = Tile.top

    def smallest(tile):
        lows = [
            tile.logits(c).amin(-1, keepdim=True).clone()
            for c in tile.chunks
        ]
        low = torch.cat(lows, -1).amin(-1, keepdim=True)
        return low + 0 * top(tile)

    _shift_by(patch, smallest)


@saboteur("06_stability")
def subtract_the_global_maximum(patch):
    """Shifts every row by the largest logit of the whole batch."""
    top = Tile.top
    _shift_by(patch, lambda t: 0 * top(t) + top(t).amax())


@saboteur("02_definition")
def wrong_axis(patch):
    """Normalises over the next dimension, where there is one."""
    right = _arguments.dimension

    def next_one(function, dim, ndim):
        return (right(function, dim, ndim) + 1) % max(ndim, 1)

    patch.setattr(_arguments, "dimension", next_one)


@saboteur("07_temperature")
def multiply_by_the_temperature(patch):
    """Multiplies the logits by T where it should divide."""
    right = _arguments.temperature

    def reciprocal(function, value):
        value = right(function, value)
        return 1 / value if value else math.inf

    patch.setattr(_arguments, "temperature", reciprocal)


@saboteur("02_definition")
def eps_in_the_denominator(patch):
    """Adds 1e-8 to the sum of the exponentials."""
    total, rest = Tile.total, Tile.rest

    def padded(tile, top):
        value, weights = total(tile, top)
        return value + 1e-8, weights

    patch.setattr(Tile, "total", padded)
    patch.setattr(Tile, "rest", lambda tile, top: rest(tile, top) + 1e-8)


@saboteur("06_stability")
def log_of_softmax(patch):
    """Takes the logarithm of the rounded softmax."""

    def kernel(x, mask, dim, temperature, out):
        _kernels.softmax(x, mask, dim, temperature, out)
        out.log_()

    _replace_kernel(patch, _functions.LogSoftmax, kernel)


@saboteur("06_stability")
def no_promotion(patch):
    """Computes every format in that format."""
    right = _kernels.Scratch.__init__

    def same(scratch, x, size):
        right(scratch, x, size)
        scratch.dtype = x.dtype

    patch.setattr(_kernels.Scratch, "__init__", same)


@saboteur("07_temperature")
def detached_normaliser(patch):
    """Treats the denominator as a constant in the backward pass."""

    def softmax_vjp(y, v, mask, dim, temperature, out):
        scale = _kernels.slope(temperature)
        out.copy_(y * v * scale)

    def log_softmax_vjp(x, v, mask, dim, temperature, out):
        out.copy_(v * _kernels.slope(temperature))

    _replace_kernel(patch, _functions.SoftmaxVJP, softmax_vjp)
    _replace_kernel(patch, _functions.LogSoftmaxVJP, log_softmax_vjp)


@saboteur("03_axioms")
def mask_after_exp(patch):
    """Zeroes masked entries after the sum, without renormalising."""
    right = Tile.logits

    def unmasked(tile, chunk):
        mask, tile.mask = tile.mask, None
        z = right(tile, chunk)
        tile.mask = mask
        return z if mask is None else z.clone()

    patch.setattr(Tile, "logits", unmasked)


@saboteur("02_definition")
def writes_into_its_input(patch):
    """Shifts the logits in place, in the caller's tensor."""
    for name, function in functional._FUNCTIONS.items():
        right = getattr(_kernels, name)

        def kernel(x, mask, dim, temperature, out, right=right):
            right(x, mask, dim, temperature, out)
            if x.numel() and out is not x:
                x.copy_(x - x.amax(dim, keepdim=True))

        _replace_kernel(patch, function, kernel)


@saboteur("02_definition")
def divide_by_the_others(patch):
    """Leaves a class out of its own denominator: odds, not shares."""

    def kernel(x, mask, dim, temperature, out):
        _kernels.softmax(x, mask, dim, temperature, out)
        out.div_(1 - out.double())

    _replace_kernel(patch, _functions.Softmax, kernel)


@saboteur("02_definition")
def base_two(patch):
    """Raises 2, not e, to the logits."""
    for name, function in functional._FUNCTIONS.items():
        right = getattr(_kernels, name)

        def kernel(x, mask, dim, temperature, out, right=right):
            scaled = (x.double() * math.log(2)).to(x.dtype)
            right(scaled, mask, dim, temperature, out)

        _replace_kernel(patch, function, kernel)


@saboteur("02_definition")
def no_exponential(patch):
    """Divides the logits themselves by their sum."""

    def kernel(x, mask, dim, temperature, out):
        z = x if mask is None else x.masked_fill(~mask, 0)
        out.copy_(z / z.sum(dim, keepdim=True))

    _replace_kernel(patch, _functions.Softmax, kernel)


@saboteur("06_stability")
def forgets_to_add_the_maximum_back(patch):
    """Log-sum-exp of the shifted logits, returned as that of the logits."""

    def kernel(x, mask, dim, temperature, out):
        shifted = x - x.amax(dim, keepdim=True)
        _kernels.logsumexp(shifted, mask, dim, temperature, out)

    _replace_kernel(patch, _functions.LogSumExp, kernel)


@saboteur("07_temperature")
def divides_before_shifting(patch):
    """Divides by the temperature in the input's format, then shifts."""
    for name in ("softmax", "log_softmax"):
        right = getattr(_kernels, name)

        def kernel(x, mask, dim, temperature, out, right=right):
            right(x / temperature, mask, dim, 1.0, out)

        _replace_kernel(patch, functional._FUNCTIONS[name], kernel)


# --- derivatives ---------------------------------------------------------


def _patch_jacobian(patch, change):
    """Pass the Jacobian through `change(J, p, dim, 1 / T)`."""
    right = derivatives.SoftmaxJacobian.write

    def write(x, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature).movedim(dim, -1)
        jacobian = right(x, dim, temperature)
        scale = _kernels.slope(temperature)
        return change(jacobian, p, dim, scale).to(x.dtype)

    patch.setattr(derivatives.SoftmaxJacobian, "write", staticmethod(write))


def _patch_product(patch, product):
    """Let JVP and VJP be `product(p, v, dim)` over T."""

    def rows(x, v, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature)
        result = product(p, v.to(p.dtype), dim)
        return (result * _kernels.slope(temperature)).to(x.dtype)

    patch.setattr(derivatives.SoftmaxJVP, "rows", staticmethod(rows))


@saboteur("11_jacobian")
def jacobian_wrong_sign(patch):
    """Jacobian with + p_i p_j off the diagonal."""

    def change(jacobian, p, dim, scale):
        diagonal = torch.diag_embed(jacobian.diagonal(0, -2, -1))
        return 2 * diagonal - jacobian

    _patch_jacobian(patch, change)


@saboteur("11_jacobian")
def jacobian_missing_delta(patch):
    """Jacobian with - p_i p_j on the diagonal, too."""

    def change(jacobian, p, dim, scale):
        return jacobian - torch.diag_embed(p * scale)

    _patch_jacobian(patch, change)


@saboteur("11_jacobian")
def jacobian_of_a_sigmoid(patch):
    """Jacobian with nothing off the diagonal."""

    def change(jacobian, p, dim, scale):
        return torch.diag_embed(jacobian.diagonal(0, -2, -1))

    _patch_jacobian(patch, change)


@saboteur("11_jacobian")
def jacobian_squeezed(patch):
    """Drops the axes of length 1 of the Jacobian."""
    _patch_jacobian(patch, lambda jacobian, *_: jacobian.squeeze())


@saboteur("11_jacobian")
def jacobian_along_the_last_axis(patch):
    """Takes the last axis for the classes, whatever `dim` says."""

    def change(jacobian, p, dim, scale):
        s = p.movedim(-1, dim)
        outer = s.unsqueeze(-1) * s.unsqueeze(-2)
        return (torch.diag_embed(s) - outer) * scale

    _patch_jacobian(patch, change)


@saboteur("11_jacobian")
def jacobian_subtracts_from_one(patch):
    """Computes the diagonal as p (1 - p), which cancels near p = 1."""

    def change(jacobian, p, dim, scale):
        jacobian = jacobian.clone()
        jacobian.diagonal(0, -2, -1).copy_(p * (1 - p) * scale)
        return jacobian

    _patch_jacobian(patch, change)


@saboteur("11_jacobian")
def derivatives_forget_the_temperature(patch):
    """Leaves out the 1/T of every derivative."""
    patch.setattr(_kernels, "slope", lambda temperature: 1.0)


@saboteur("11_jacobian")
def products_are_not_centred(patch):
    """JVP and VJP as p v - p (p . v): the tail cancels."""

    def product(p, v, dim):
        return p * v - p * (p * v).sum(dim, keepdim=True)

    _patch_product(patch, product)


@saboteur("11_jacobian")
def products_with_the_plain_mean(patch):
    """JVP and VJP with the mean of v in place of the mean under p."""
    _patch_product(patch, lambda p, v, dim: p * (v - v.mean(dim, True)))


@saboteur("11_jacobian")
def products_entry_by_entry(patch):
    """JVP and VJP as p (1 - p) v, as for the logistic function."""
    _patch_product(patch, lambda p, v, dim: p * (1 - p) * v)


@saboteur("11_jacobian")
def products_along_the_last_axis(patch):
    """JVP and VJP whose mean is over the last axis, whatever `dim` says."""

    def product(p, v, dim):
        v = v - v.gather(dim, p.argmax(dim, keepdim=True))
        return p * (v - (p * v).sum(-1, keepdim=True))

    _patch_product(patch, product)


@saboteur("11_jacobian")
def second_product_without_covariance(patch):
    """Hessian-vector product that forgets the covariance."""

    def rows(x, u, v, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature)
        u, v = (
            derivatives._deviation(p, t.to(p.dtype), dim) for t in (u, v)
        )
        scale = _kernels.slope(temperature) ** 2
        return (p * u * v * scale).to(x.dtype)

    patch.setattr(derivatives.SoftmaxHVP, "rows", staticmethod(rows))


def _hessian(patch, wrong):
    """Let `softmax_hessian` be made by wrong(p, right, scale)."""
    right = derivatives.SoftmaxHessian.write

    def write(x, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature)
        p = derivatives._last(p, dim)
        scale = _kernels.slope(temperature)
        return wrong(p, right(x, dim, temperature), scale).to(x.dtype)

    patch.setattr(derivatives.SoftmaxHessian, "write", staticmethod(write))


@saboteur("12_hessian")
def hessian_of_the_wrong_sign(patch):
    """Returns minus the second derivative of softmax."""
    _hessian(patch, lambda p, right, scale: -right)


@saboteur("12_hessian")
def hessian_without_a_delta(patch):
    """Forgets the delta_jk in the second derivative of softmax."""

    def wrong(p, right, scale):
        d = torch.eye(p.shape[-1], dtype=p.dtype) - p.unsqueeze(-2)
        pair = p.unsqueeze(-1) * p.unsqueeze(-2)
        inner = d.unsqueeze(-1) * d.unsqueeze(-2) + pair.unsqueeze(-3)
        return p[..., None, None] * inner * scale**2

    _hessian(patch, wrong)


@saboteur("12_hessian")
def hessian_without_any_delta(patch):
    """Returns 2 p_i p_j p_k everywhere: symmetric, and wrong."""

    def wrong(p, right, scale):
        pair = p.unsqueeze(-1) * p.unsqueeze(-2)
        return 2 * p[..., None, None] * pair.unsqueeze(-3) * scale**2

    _hessian(patch, wrong)


@saboteur("12_hessian")
def hessian_as_a_padded_square(patch):
    """Puts one row of each slice into a tensor of zeros."""

    def wrong(p, right, scale):
        square = right.diagonal(0, -3, -2).mT  # entry (i, j) is T_iij
        return torch.diag_embed(square, 0, -3, -1).mT.contiguous()

    _hessian(patch, wrong)


@saboteur("12_hessian")
def hessian_with_one_temperature(patch):
    """Divides the second derivative of softmax by T once, not twice."""
    _hessian(patch, lambda p, right, scale: right / scale)


def _hvp(patch, wrong):
    """Let `softmax_hvp` be made by wrong(p, u, v, dim, scale)."""

    def rows(x, u, v, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature)
        scale = _kernels.slope(temperature)
        return wrong(p, u, v, dim, scale).to(x.dtype)

    patch.setattr(derivatives.SoftmaxHVP, "rows", staticmethod(rows))


def _mean(p, v, dim):
    return (p * v).sum(dim, keepdim=True)


@saboteur("12_hessian")
def hvp_with_one_temperature(patch):
    """Divides the product with the second derivative by T once."""

    def wrong(p, u, v, dim, scale):
        a, b = u - _mean(p, u, dim), v - _mean(p, v, dim)
        return p * (a * b - _mean(p, a * b, dim)) * scale

    _hvp(patch, wrong)


@saboteur("12_hessian")
def curvature_without_the_outer_product(patch):
    """Takes diag(p) for the Jacobian of softmax, and p v for its product."""

    def write(x, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature)
        p = derivatives._last(p, dim) * _kernels.slope(temperature)
        return torch.diag_embed(p).to(x.dtype)

    def rows(x, v, dim, temperature):
        p = derivatives._probabilities(x, dim, temperature)
        return (p * v * _kernels.slope(temperature)).to(x.dtype)

    patch.setattr(derivatives.SoftmaxJacobian, "write", staticmethod(write))
    patch.setattr(derivatives.SoftmaxJVP, "rows", staticmethod(rows))


@saboteur("12_hessian")
def transposed_log_softmax_jacobian(patch):
    """Returns I - p 1^T where it should be I - 1 p^T."""
    right = derivatives.LogSoftmaxJacobian.write

    def write(x, dim, temperature):
        return right(x, dim, temperature).mT.contiguous()

    patch.setattr(
        derivatives.LogSoftmaxJacobian, "write", staticmethod(write)
    )
