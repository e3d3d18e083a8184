"""Wrong libraries that chapter 14 notices: what goes wrong in training."""

import math
import warnings

import torch
from torch.nn import functional as F

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "14_training"


def _let_fit(patch, change):
    """Another fit: change(right, model, x, target, options)."""
    right = softmaxlib.SoftmaxRegression.fit

    def fit(model, x, target, **options):
        change(right, model, x, target, options)
        return model

    replace(patch, "SoftmaxRegression.fit", fit)


def _with_penalty(patch, factor):
    """Fit with the penalty times factor(x, target, options)."""

    def change(right, model, x, target, options):
        penalty = model.penalty
        model.penalty = penalty * factor(x, target, options)
        try:
            right(model, x, target, **options)
        finally:
            model.penalty = penalty

    _let_fit(patch, change)


@saboteur(CHAPTER)
def penalty_not_divided(patch):
    """Adds the penalty to the sum of the losses, not to their mean."""
    _with_penalty(patch, lambda x, target, options: 1 / len(x))


@saboteur(CHAPTER)
def penalty_without_the_half(patch):
    """Penalises the square of the weights, not half of it."""
    _with_penalty(patch, lambda x, target, options: 2.0)


@saboteur(CHAPTER)
def mean_over_the_number_of_samples(patch):
    """Divides weighted losses by N, not by the sum of their weights."""

    def factor(x, target, options):
        weight = options.get("class_weight")
        if weight is None:
            return 1.0
        return len(target) / weight[target].sum().item()

    _with_penalty(patch, factor)


@saboteur(CHAPTER)
def penalty_on_the_bias(patch):
    """Penalises the bias as it does the weights."""

    def change(right, model, x, target, options):
        if model.bias is None or not model.penalty:
            right(model, x, target, **options)
            return
        longer = F.pad(x, (0, 1), value=1.0)
        other = softmaxlib.SoftmaxRegression(
            longer.shape[-1],
            model.num_classes,
            bias=False,
            penalty=model.penalty,
            dtype=x.dtype,
        )
        weight = torch.cat([model.weight, model.bias[:, None]], 1)
        other.weight.data.copy_(weight.detach())
        right(other, longer, target, **options)
        model.weight.data.copy_(other.weight[:, :-1].detach())
        model.bias.data.copy_(other.weight[:, -1].detach())
        model.history, model.converged = other.history, other.converged

    _let_fit(patch, change)


@saboteur(CHAPTER)
def class_weights_are_ignored(patch):
    """Takes class weights and counts every sample once."""

    def change(right, model, x, target, options):
        options.pop("class_weight", None)
        right(model, x, target, **options)

    _let_fit(patch, change)


@saboteur(CHAPTER)
def class_weights_are_inverted(patch):
    """Divides by the weight of a class where it should multiply."""

    def change(right, model, x, target, options):
        if options.get("class_weight") is not None:
            options["class_weight"] = 1 / options["class_weight"]
        right(model, x, target, **options)

    _let_fit(patch, change)


@saboteur(CHAPTER)
def fit_with_a_loose_tolerance(patch):
    """Calls a gradient of 1e-2 the minimum."""

    def change(right, model, x, target, options):
        right(model, x, target, **options | {"tolerance": 1e-2})

    _let_fit(patch, change)


@saboteur(CHAPTER)
def fit_that_says_nothing(patch):
    """Swallows the warning that there is no minimum."""

    def change(right, model, x, target, options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right(model, x, target, **options)

    _let_fit(patch, change)


@saboteur(CHAPTER)
def fit_converges_when_all_is_right(patch):
    """Takes a training set without a mistake for a minimum."""

    def change(right, model, x, target, options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right(model, x, target, **options)
        if target.ndim == 1 and (model.predict(x) == target).all():
            model.converged = True

    _let_fit(patch, change)


@saboteur(CHAPTER)
def fit_leaves_the_bias_alone(patch):
    """Fits the weights and keeps the bias at its start."""

    def change(right, model, x, target, options):
        bias, model.bias = model.bias, None
        try:
            right(model, x, target, **options)
        finally:
            model.bias = bias

    _let_fit(patch, change)


@saboteur(CHAPTER)
def history_without_the_start(patch):
    """Records the objective after each step, and not where it began."""

    def change(right, model, x, target, options):
        right(model, x, target, **options)
        model.history = model.history[1:]

    _let_fit(patch, change)


@saboteur(CHAPTER)
def history_of_the_loss_alone(patch):
    """Leaves the penalty out of the history."""

    def change(right, model, x, target, options):
        right(model, x, target, **options)
        square = model.weight.detach().square().sum().item()
        model.history[-1] -= model.penalty / 2 * square

    _let_fit(patch, change)


@saboteur(CHAPTER)
def probabilities_by_softmax_twice(patch):
    """A model that applies softmax to its probabilities."""
    right = softmaxlib.SoftmaxRegression.predict_proba

    def twice(model, x):
        return torch.softmax(right(model, x), -1)

    replace(patch, "SoftmaxRegression.predict_proba", twice)


@saboteur(CHAPTER)
def probabilities_by_sigmoids(patch):
    """A sigmoid for each class where one softmax belongs."""

    def each(model, x):
        return torch.sigmoid(model.forward(x))

    replace(patch, "SoftmaxRegression.predict_proba", each)


@saboteur(CHAPTER)
def loss_applies_softmax_first(patch):
    """A cross-entropy that takes the softmax of its logits twice."""
    right = softmaxlib.cross_entropy

    def twice(input, target, **options):
        dim = min(input.ndim - 1, 1)
        return right(torch.softmax(input, dim), target, **options)

    replace(patch, "cross_entropy", twice)


@saboteur(CHAPTER)
def loss_without_the_logarithm(patch):
    """The mean of -p_t: NLL of probabilities."""
    right = softmaxlib.cross_entropy

    def plain(input, target, **options):
        if target.is_floating_point() or options:
            return right(input, target, **options)
        return F.nll_loss(torch.softmax(input, -1), target)

    replace(patch, "cross_entropy", plain)


@saboteur(CHAPTER)
def soft_loss_normalises_its_targets(patch):
    """Divides several labels by their number: one label's worth of loss."""
    right = softmaxlib.soft_cross_entropy

    def one(input, target, dim=-1, **options):
        total = target.sum(dim, keepdim=True).clamp(min=math.ulp(0))
        return right(input, target / total, dim, **options)

    replace(patch, "soft_cross_entropy", one)


@saboteur(CHAPTER)
def fit_of_the_first_tag(patch):
    """Fits several labels of a sample by the first of them alone."""

    def change(right, model, x, target, options):
        if target.is_floating_point():
            target = target.argmax(-1)
        right(model, x, target, **options)

    _let_fit(patch, change)
