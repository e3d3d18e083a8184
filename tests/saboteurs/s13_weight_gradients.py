"""Wrong libraries for the chapter on gradients in the weights."""

import math

import torch
from torch.nn import functional as F
from torch.nn.functional import linear

import softmaxlib
from saboteurs import kernel, plain, replace, right, saboteur

CHAPTER = "13_weight_gradients"


# --- losses --------------------------------------------------------------


def _let_gradient(patch, change):
    """Let the gradient in the logits be `change(p, y, dim)`."""

    def wrong(x, target, weight, share, dim, smoothing, out):
        p = plain.softmax(x, None, dim)
        y = plain.targets(x, target, weight, dim, smoothing)
        gradient = change(p, y, dim) * share
        out.copy_(gradient.masked_fill(share == 0, 0))

    kernel(patch, "loss_gradient", wrong)


def _sum(y, dim):
    return y.sum(dim, keepdim=True)


def _sum_always(patch, *names):
    """Let functions sum over the rows, whatever they are asked for."""
    for name in names:
        known = getattr(softmaxlib, name)

        def summed(*arguments, known=known, **options):
            options["reduction"] = "sum"
            return known(*arguments, **options)

        replace(patch, name, summed)


@saboteur(CHAPTER)
def loss_gradient_wrong_sign(patch):
    """Gradient of the cross-entropy as y - p."""
    _let_gradient(patch, lambda p, y, dim: y - _sum(y, dim) * p)


@saboteur(CHAPTER)
def loss_gradient_single_term(patch):
    """Chain rule with one term: y_j (p_j - 1), zero for other classes."""
    _let_gradient(patch, lambda p, y, dim: y * (p - 1))


@saboteur(CHAPTER)
def loss_gradient_ignores_the_sum(patch):
    """p - y, also for targets that do not sum to one."""
    _let_gradient(patch, lambda p, y, dim: p - y)


@saboteur(CHAPTER)
def loss_gradient_normalises_targets(patch):
    """Divides the targets by their sum, in the gradient only."""
    _let_gradient(patch, lambda p, y, dim: p - y / _sum(y, dim))


@saboteur(CHAPTER)
def loss_gradient_subtracts_from_one(patch):
    """p - y in floats: at a confident target it cancels to 0."""
    _let_gradient(patch, lambda p, y, dim: _sum(y, dim) * p - y)


@saboteur(CHAPTER)
def loss_gradient_without_the_mean(patch):
    """Gradients in the logits of the sum, where the mean was asked for."""
    _sum_always(
        patch, "cross_entropy_gradient", "soft_cross_entropy_gradient"
    )


@saboteur(CHAPTER)
def smoothing_over_the_others(patch):
    """Label smoothing that spreads its part over the K - 1 other classes."""
    for name in ("cross_entropy", "cross_entropy_gradient"):
        known = getattr(softmaxlib, name)

        def smoothed(
            input, target, *, label_smoothing=0.0, known=known, **options
        ):
            classes = input.shape[min(input.ndim - 1, 1)]
            label_smoothing *= classes / max(classes - 1, 1)
            return known(
                input,
                target,
                label_smoothing=min(label_smoothing, 1.0),
                **options,
            )

        replace(patch, name, smoothed)


@saboteur(CHAPTER)
def loss_of_clipped_probabilities(patch):
    """Logarithm of probabilities that are kept above 1e-7."""

    def wrong(x, target, weight, dim, smoothing, out):
        p = plain.softmax(x, None, dim).clamp(min=1e-7)
        y = plain.targets(x, target, weight, dim, smoothing)
        out.copy_(-_sum(y * p.log(), dim))

    kernel(patch, "loss", wrong)


@saboteur(CHAPTER)
def loss_is_half(patch):
    """Cross-entropy divided by two, as if it were a square."""
    known = right("loss")

    def wrong(*arguments):
        known(*arguments)
        arguments[-1].div_(2)

    kernel(patch, "loss", wrong)


# --- derivatives in the weights ------------------------------------------


def _logits(x, weight, bias, layout):
    """The samples as (N, D), and their logits (N, K)."""
    x = x.reshape(-1, x.shape[-1])
    return x, linear(x, weight if layout == "kd" else weight.mT, bias)


def _assemble(x, rows, bias, reduction, layout):
    """rows^T x and the sum of the rows, as derivatives are returned."""
    scale = 1 / len(x) if reduction == "mean" else 1.0
    part = rows.mT @ x * scale
    part = part if layout == "kd" else part.mT
    return part, None if bias is None else rows.sum(0) * scale


@saboteur(CHAPTER)
def weight_gradient_transposed(patch):
    """Returns the gradient of the weight in the other layout."""
    known = softmaxlib.weight_gradient

    def transposed(*arguments, **options):
        weight, bias = known(*arguments, **options)
        return weight.mT, bias

    replace(patch, "weight_gradient", transposed)


@saboteur(CHAPTER)
def weight_gradient_reshaped(patch):
    """Reshapes between the layouts, where it should transpose."""
    known = softmaxlib.weight_gradient

    def reshaped(x, weight, *arguments, layout="kd", **options):
        part, bias = known(x, weight, *arguments, layout=layout, **options)
        if layout == "dk":
            part = part.mT.reshape(weight.shape)
        return part, bias

    replace(patch, "weight_gradient", reshaped)


@saboteur(CHAPTER)
def weight_gradient_without_the_mean(patch):
    """Sums over the samples, where the mean was asked for."""
    _sum_always(patch, "weight_gradient", "weight_hvp", "weight_hessian")


@saboteur(CHAPTER)
def weight_gradient_pulls_down_only(patch):
    """Leaves out the label: p x^T where it should be (p - y) x^T."""
    known = softmaxlib.weight_gradient

    def down(
        x, weight, target, bias=None, *, reduction="mean", layout="kd"
    ):
        options = {"reduction": reduction, "layout": layout}
        known(x, weight, target, bias, **options)  # its errors
        x, z = _logits(x, weight, bias, layout)
        return _assemble(x, torch.softmax(z, 1), bias, **options)

    replace(patch, "weight_gradient", down)


@saboteur(CHAPTER)
def weight_gradient_forgets_the_bias(patch):
    """Computes the logits without the bias."""
    known = softmaxlib.weight_gradient

    def without(x, weight, target, bias=None, **options):
        bias = None if bias is None else torch.zeros_like(bias)
        return known(x, weight, target, bias, **options)

    replace(patch, "weight_gradient", without)


@saboteur(CHAPTER)
def weight_hvp_ignores_the_bias_direction(patch):
    """Moves the weight along its direction, and the bias not at all."""
    known = softmaxlib.weight_hvp

    def ignoring(*arguments, bias_direction=None, **options):
        return known(*arguments, **options)

    replace(patch, "weight_hvp", ignoring)


@saboteur(CHAPTER)
def weight_hessian_factors_swapped(patch):
    """Kronecker product in the other order: the other flattening."""
    known = softmaxlib.weight_hessian

    def swapped(x, weight, *arguments, layout="kd", **options):
        other = "dk" if layout == "kd" else "kd"
        return known(x, weight.mT, *arguments, layout=other, **options)

    replace(patch, "weight_hessian", swapped)


@saboteur(CHAPTER)
def weight_hessian_class_by_class(patch):
    """p_k (1 - p_k) x x^T for each class, and nothing between classes."""
    known = softmaxlib.weight_hessian

    def blocks(x, weight, *arguments, layout="kd", **options):
        full = known(x, weight, *arguments, layout=layout, **options)
        classes = 0 if layout == "kd" else 1
        own = torch.ones(weight.shape).cumsum(classes).flatten()
        return full * (own.unsqueeze(0) == own.unsqueeze(1))

    replace(patch, "weight_hessian", blocks)


@saboteur(CHAPTER)
def weight_hessian_of_means(patch):
    """Kronecker product of two means, not the mean of the products."""

    def means(x, weight, bias=None, *, reduction="mean", layout="kd"):
        x, z = _logits(x, weight, bias, layout)
        p = torch.softmax(z, 1)
        jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        moment = x.mT @ x / (len(x) if reduction == "mean" else 1)
        pair = jacobian.mean(0), moment
        pair = pair if layout == "kd" else pair[::-1]
        return torch.kron(*[t.contiguous() for t in pair])

    replace(patch, "weight_hessian", means)


@saboteur(CHAPTER)
def weight_hessian_without_the_rank_one_part(patch):
    """diag(p) in the place of the Jacobian."""

    def product(
        x,
        weight,
        direction,
        bias=None,
        *,
        bias_direction=None,
        reduction="mean",
        layout="kd",
    ):
        rows, z = _logits(x, weight, bias, layout)
        _, change = _logits(x, direction, bias_direction, layout)
        return _assemble(
            rows, torch.softmax(z, 1) * change, bias, reduction, layout
        )

    def matrix(x, weight, bias=None, *, reduction="mean", layout="kd"):
        x, z = _logits(x, weight, bias, layout)
        total = 0
        for row, shares in zip(x, torch.softmax(z, 1), strict=True):
            pair = torch.diag(shares), torch.outer(row, row)
            pair = pair if layout == "kd" else pair[::-1]
            total = total + torch.kron(*pair)
        return total / (len(x) if reduction == "mean" else 1)

    replace(patch, "weight_hvp", product)
    replace(patch, "weight_hessian", matrix)


# --- the model -----------------------------------------------------------


@saboteur(CHAPTER)
def regression_forgets_the_penalty(patch):
    """Minimises the loss alone, whatever the penalty."""
    known = softmaxlib.SoftmaxRegression.fit

    def fit(model, x, target, *, max_iterations=100, **options):
        penalty, model.penalty = model.penalty, 0.0
        # Without a penalty there may be no minimum to arrive at.
        options["max_iterations"] = min(max_iterations, 20)
        try:
            return known(model, x, target, **options)
        finally:
            model.penalty = penalty

    replace(patch, "SoftmaxRegression.fit", fit)


@saboteur(CHAPTER)
def fit_does_nothing(patch):
    """Leaves the weights alone, says converged, and invents a history."""

    def fit(model, x, target, **options):
        model.history = [math.log(model.num_classes), 0.0]
        model.converged = True
        return model

    replace(patch, "SoftmaxRegression.fit", fit)


# --- what the first edition missed ---------------------------------------


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
