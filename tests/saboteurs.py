"""Wrong libraries, each a small patch of the right one.

The chapters must notice every one of them: a check that no saboteur makes
fail is an empty check. A saboteur is a function that takes a pytest
`MonkeyPatch`; its docstring says what it does.
"""

import math

import torch

import softmaxlib
from softmaxlib import (
    _arguments,
    _functions,
    _kernels,
    derivatives,
    functional,
    loss,
    regression,
    sampling,
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


# --- sampling ------------------------------------------------------------


@saboteur("08_sampling")
def sample_too_warm(patch):
    """Draws by inversion at 1.1 times the temperature."""
    right = sampling._invert

    def warmer(x, n, temperature, generator):
        return right(x, n, temperature * 1.1, generator)

    patch.setattr(sampling, "_invert", warmer)


@saboteur("08_sampling")
def gaussian_noise(patch):
    """Adds Gaussian noise, of the variance of Gumbel noise."""

    def gaussian(shape, like, generator):
        noise = like.new_empty(shape).normal_(generator=generator)
        return noise * (math.pi / math.sqrt(6))

    patch.setattr(sampling, "_gumbel", gaussian)


@saboteur("08_sampling")
def top_k_off_by_one(patch):
    """Drops the winner of the noisy logits and returns ranks 2 to k + 1."""
    right = sampling.gumbel_top_k

    def shifted(input, k, dim=-1, **options):
        if k == 0 or k >= input.shape[dim]:
            return right(input, k, dim, **options).roll(1, dim)
        return right(input, k + 1, dim, **options).narrow(dim, 1, k)

    patch.setattr(sampling, "gumbel_top_k", shifted)
    patch.setattr(softmaxlib, "gumbel_top_k", shifted)


# --- losses and weights --------------------------------------------------


def _let_gradient(patch, change):
    """Pass p - y through `change(gradient, p, y, share)`, classes last."""

    def index(x, target, share, dim, out):
        y = torch.zeros_like(x, dtype=torch.float64)
        write(x, y.scatter(dim, target, 1), share, dim, out)

    def write(x, y, share, dim, out):
        p = torch.softmax(x.double(), dim)
        s = y.double().sum(dim, keepdim=True)
        out.copy_(change(s * p - y, p, y.double(), dim) * share)

    patch.setattr(loss.IndexGradient, "kernel", staticmethod(index))
    patch.setattr(loss.SoftGradient, "kernel", staticmethod(write))


def _replace(patch, name, function):
    """Put a function in the place of a public one, wherever it is used."""
    for module in (softmaxlib, loss, regression):
        if hasattr(module, name):
            patch.setattr(module, name, function)


@saboteur("13_weight_gradients")
def loss_gradient_wrong_sign(patch):
    """Gradient of the cross-entropy as y - p."""
    _let_gradient(patch, lambda g, p, y, dim: -g)


@saboteur("13_weight_gradients")
def loss_gradient_single_term(patch):
    """Chain rule with one term: y_j (p_j - 1), zero for other classes."""
    _let_gradient(patch, lambda g, p, y, dim: y * (p - 1))


@saboteur("13_weight_gradients")
def loss_gradient_ignores_the_sum(patch):
    """p - y, also for targets that do not sum to one."""
    _let_gradient(patch, lambda g, p, y, dim: p - y)


@saboteur("13_weight_gradients")
def loss_gradient_normalises_targets(patch):
    """Divides the targets by their sum, in the gradient only."""
    _let_gradient(
        patch, lambda g, p, y, dim: p - y / y.sum(dim, keepdim=True)
    )


@saboteur("13_weight_gradients")
def loss_gradient_subtracts_from_one(patch):
    """p - y in floats: at a confident target it cancels to 0."""
    _let_gradient(patch, lambda g, p, y, dim: g)


@saboteur("13_weight_gradients")
def loss_gradient_without_the_mean(patch):
    """Gradients in the logits of the sum, where the mean was asked for."""
    for name in ("cross_entropy_gradient", "soft_cross_entropy_gradient"):
        right = getattr(loss, name)

        def summed(*args, right=right, **options):
            options["reduction"] = "sum"
            return right(*args, **options)

        _replace(patch, name, summed)


@saboteur("13_weight_gradients")
def smoothing_over_the_others(patch):
    """Label smoothing that spreads its part over the K - 1 other classes."""

    def smoothed(right):
        def function(input, target, *, label_smoothing=0.0, **options):
            classes = input.shape[min(input.ndim - 1, 1)]
            label_smoothing *= classes / max(classes - 1, 1)
            label_smoothing = min(label_smoothing, 1)
            return right(
                input, target, label_smoothing=label_smoothing, **options
            )

        return function

    for name in ("cross_entropy", "cross_entropy_gradient"):
        _replace(patch, name, smoothed(getattr(loss, name)))


@saboteur("13_weight_gradients")
def loss_of_clipped_probabilities(patch):
    """Logarithm of probabilities that are kept above 1e-7."""

    def soft(x, y, dim, out):
        p = torch.softmax(x.double(), dim).clamp(min=1e-7)
        out.copy_(-(y * p.log()).sum(dim, keepdim=True))

    def index(x, target, dim, out):
        p = torch.softmax(x.double(), dim).clamp(min=1e-7)
        out.copy_(-p.log().gather(dim, target))

    patch.setattr(loss.IndexLoss, "kernel", staticmethod(index))
    patch.setattr(loss.SoftLoss, "kernel", staticmethod(soft))


@saboteur("13_weight_gradients")
def loss_is_half(patch):
    """Cross-entropy divided by two, as if it were a square."""
    for function in (loss.IndexLoss, loss.SoftLoss):
        right = function.kernel

        def kernel(*args, right=right):
            right(*args)
            args[-1].div_(2)

        patch.setattr(function, "kernel", staticmethod(kernel))


@saboteur("13_weight_gradients")
def weight_gradient_transposed(patch):
    """Returns the gradient of the weight in the other layout."""
    right = regression._Case.finish

    def finish(case, weight, bias):
        weight, bias = right(case, weight, bias)
        return weight.mT, bias

    patch.setattr(regression._Case, "finish", finish)


@saboteur("13_weight_gradients")
def weight_gradient_reshaped(patch):
    """Reshapes between the layouts, where it should transpose."""
    right = regression._Case.finish

    def finish(case, weight, bias):
        layout, case.layout = case.layout, "kd"
        weight, bias = right(case, weight, bias)
        case.layout = layout
        if layout == "dk":
            weight = weight.reshape(weight.shape[::-1])
        return weight, bias

    patch.setattr(regression._Case, "finish", finish)


@saboteur("13_weight_gradients")
def weight_gradient_without_the_mean(patch):
    """Sums over the samples, where the mean was asked for."""
    right = regression._Case.__init__

    def init(case, *args):
        right(case, *args)
        case.scale = 1.0

    patch.setattr(regression._Case, "__init__", init)


@saboteur("13_weight_gradients")
def weight_gradient_pulls_down_only(patch):
    """Leaves out the label: p x^T where it should be (p - y) x^T."""

    def difference(case, z, target):
        return torch.softmax(z, 1)

    patch.setattr(regression._Case, "difference", difference)


@saboteur("13_weight_gradients")
def weight_gradient_forgets_the_bias(patch):
    """Computes the logits without the bias."""

    def logits(case, rows=slice(None), weight=None, bias=None):
        weight = case.weight if weight is None else weight
        return case.x[rows] @ weight.mT

    patch.setattr(regression._Case, "logits", logits)


@saboteur("13_weight_gradients")
def weight_hessian_factors_swapped(patch):
    """Kronecker product in the other order: the other flattening."""
    right = regression.weight_hessian

    def swapped(x, weight, *args, layout="kd", **options):
        other = "dk" if layout == "kd" else "kd"
        return right(x, weight.mT, *args, layout=other, **options)

    _replace(patch, "weight_hessian", swapped)


@saboteur("13_weight_gradients")
def weight_hessian_class_by_class(patch):
    """p_k (1 - p_k) x x^T for each class, and nothing between classes."""
    right = regression.weight_hessian

    def blocks(x, weight, *args, layout="kd", **options):
        full = right(x, weight, *args, layout=layout, **options)
        classes = 0 if layout == "kd" else 1
        own = torch.ones(weight.shape).cumsum(classes).flatten()
        return full * (own.unsqueeze(0) == own.unsqueeze(1))

    _replace(patch, "weight_hessian", blocks)


@saboteur("13_weight_gradients")
def weight_hessian_of_means(patch):
    """Kronecker product of two means, not the mean of the products."""

    def means(x, weight, bias=None, *, reduction="mean", layout="kd"):
        w = weight if layout == "kd" else weight.mT
        p = torch.softmax(torch.nn.functional.linear(x, w, bias), 1)
        jacobian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(
            0
        )
        moment = x.mT @ x / (len(x) if reduction == "mean" else 1)
        pair = (jacobian, moment) if layout == "kd" else (moment, jacobian)
        return torch.kron(*[t.contiguous() for t in pair])

    _replace(patch, "weight_hessian", means)


@saboteur("13_weight_gradients")
def weight_hessian_without_the_rank_one_part(patch):
    """diag(p) in the place of the Jacobian."""

    def diagonal(p, change, dim):
        return p * change

    patch.setattr(regression, "_weighted_deviation", diagonal)
    patch.setattr(regression, "_is_confident", lambda p: False)

    def wrong(x, weight, bias=None, *, reduction="mean", layout="kd"):
        w = weight if layout == "kd" else weight.mT
        p = torch.softmax(torch.nn.functional.linear(x, w, bias), 1)
        total = 0
        for row, shares in zip(x, p, strict=True):
            pair = torch.diag(shares), torch.outer(row, row)
            pair = pair if layout == "kd" else pair[::-1]
            total = total + torch.kron(*pair)
        return total / (len(x) if reduction == "mean" else 1)

    _replace(patch, "weight_hessian", wrong)


@saboteur("13_weight_gradients")
def regression_forgets_the_penalty(patch):
    """Newton steps on the loss alone, whatever the penalty."""

    def gradient(model, x, target):
        part, bias = regression.weight_gradient(
            x, model.weight, target, model.bias
        )
        return model._flatten(part, bias)

    patch.setattr(regression.SoftmaxRegression, "_gradient", gradient)
