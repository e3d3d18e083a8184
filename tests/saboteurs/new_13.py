"""What goes wrong in losses, weight gradients and fits."""

import torch
from torch.nn import functional as F

import softmaxlib
from saboteurs import replace, saboteur


def _probabilities_by(patch, change):
    """Let every gradient be made from change(z, dim), not from softmax."""

    def soft_gradient(input, target, dim=-1, *, reduction="mean"):
        s = target.sum(dim, keepdim=True)
        g = s * change(input, dim) - target
        rows = input.numel() // max(input.shape[dim], 1)
        return g / rows if reduction == "mean" else g

    def gradient(input, target, *, reduction="mean", **options):
        dim = min(input.ndim - 1, 1)
        x = input.detach().clone().requires_grad_()
        with torch.enable_grad():
            F.cross_entropy(
                x, target, reduction="sum", **options
            ).backward()
        g = x.grad + change(input, dim) - torch.softmax(input, dim)
        rows = max(target.numel(), 1)
        return g / rows if reduction == "mean" else g

    def weights(
        x, weight, target, bias=None, *, reduction="mean", layout="kd"
    ):
        w = weight if layout == "kd" else weight.mT
        rows = x.reshape(-1, x.shape[-1])
        z = F.linear(rows, w, bias)
        if target.is_floating_point():
            y = target.reshape(-1, len(w))
        else:
            y = F.one_hot(target.reshape(-1), len(w)).to(z)
        g = soft_gradient(z, y, 1, reduction=reduction)
        part = g.mT @ rows
        part = part if layout == "kd" else part.mT
        return part, None if bias is None else g.sum(0)

    replace(patch, "soft_cross_entropy_gradient", soft_gradient)
    replace(patch, "cross_entropy_gradient", gradient)
    replace(patch, "weight_gradient", weights)


@saboteur("13_weight_gradients")
def gradients_of_uniform_probabilities(patch):
    """Takes 1/K for every probability in every gradient of the loss."""
    _probabilities_by(patch, lambda z, dim: torch.softmax(0 * z, dim))


@saboteur("13_weight_gradients")
def gradients_at_twice_the_temperature(patch):
    """Takes the softmax of z/2 in every gradient of the loss."""
    _probabilities_by(patch, lambda z, dim: torch.softmax(z / 2, dim))


@saboteur("13_weight_gradients")
def gradients_of_the_hard_arg_max(patch):
    """Takes the one-hot arg max for the probabilities in every gradient."""

    def change(z, dim):
        top = z.argmax(dim, keepdim=True)
        return torch.zeros_like(z).scatter_(dim, top, 1.0)

    _probabilities_by(patch, change)


@saboteur("13_weight_gradients")
def class_weights_over_the_number_of_rows(patch):
    """Divides the mean of weighted rows by N, not by their weights."""
    right = softmaxlib.cross_entropy_gradient

    def by_count(input, target, *, weight=None, **options):
        if weight is None:
            return right(input, target, **options)
        g = right(input, target, weight=weight, reduction="sum")
        return g / target.numel()

    replace(patch, "cross_entropy_gradient", by_count)


@saboteur("13_weight_gradients")
def ignored_rows_are_counted(patch):
    """Divides by all rows, the ignored ones included."""
    right = softmaxlib.cross_entropy_gradient

    def by_all(input, target, *, ignore_index=-100, **options):
        g = right(input, target, ignore_index=ignore_index, **options)
        share = (target != ignore_index).double().mean().to(g)
        return g * share

    replace(patch, "cross_entropy_gradient", by_all)


@saboteur("13_weight_gradients")
def weight_gradient_of_hard_targets_only(patch):
    """Takes the arg max of a target distribution for its label."""
    right = softmaxlib.weight_gradient

    def hard(x, weight, target, *args, **options):
        if target.is_floating_point():
            target = target.argmax(-1)
        return right(x, weight, target, *args, **options)

    replace(patch, "weight_gradient", hard)


@saboteur("13_weight_gradients")
def fit_that_starts_over(patch):
    """Sets all parameters to zero before it fits."""
    right = softmaxlib.SoftmaxRegression.fit

    def fit(model, *args, **options):
        for parameter in model.parameters():
            parameter.data.zero_()
        return right(model, *args, **options)

    replace(patch, "SoftmaxRegression.fit", fit)


@saboteur("13_weight_gradients")
def fit_that_always_converges(patch):
    """Says that it has converged, however few steps it was given."""
    right = softmaxlib.SoftmaxRegression.fit

    def fit(model, *args, **options):
        right(model, *args, **options)
        model.converged = True
        return model

    replace(patch, "SoftmaxRegression.fit", fit)


@saboteur("13_weight_gradients")
def fit_that_stops_after_a_step(patch):
    """One Newton step, called the minimum."""
    right = softmaxlib.SoftmaxRegression.fit

    def fit(model, *args, **options):
        options["max_iterations"] = 1
        right(model, *args, **options)
        model.converged = True
        return model

    replace(patch, "SoftmaxRegression.fit", fit)


@saboteur("13_weight_gradients")
def hessian_of_uniform_probabilities(patch):
    """Takes 1/K for every probability in the curvature of the weights."""
    dense, product = softmaxlib.weight_hessian, softmaxlib.weight_hvp

    def hessian(x, weight, bias=None, **options):
        return dense(x, 0 * weight, None, **options)

    def hvp(x, weight, direction, bias=None, **options):
        bias = None if bias is None else 0 * bias
        return product(x, 0 * weight, direction, bias, **options)

    replace(patch, "weight_hessian", hessian)
    replace(patch, "weight_hvp", hvp)
