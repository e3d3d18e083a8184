"""Wrong normalisers and a fit that does not fit, for chapter 10."""

import math

import torch

import softmaxlib
from saboteurs import replace, saboteur
from softmaxlib import logsumexp, softmax


@saboteur("10_exponential_family")
def logsumexp_of_the_mean(patch):
    """Log-sum-exp that divides the sum by the number of classes."""

    def wrong(input, dim, keepdim=False, **options):
        right = logsumexp(input, dim, keepdim, **options)
        return right - math.log(input.shape[dim])

    replace(patch, "logsumexp", wrong)


@saboteur("10_exponential_family")
def logsumexp_is_the_maximum(patch):
    """Log-sum-exp that returns the largest logit."""

    def wrong(input, dim, keepdim=False, **options):
        return input.amax(dim, keepdim)

    replace(patch, "logsumexp", wrong)


@saboteur("10_exponential_family")
def softmax_of_minus_the_logits(patch):
    """Softmax of -z: the lowest score wins."""

    def wrong(input, dim, **options):
        return softmax(-input, dim, **options)

    replace(patch, "softmax", wrong)


@saboteur("10_exponential_family")
def softmax_of_shares(patch):
    """Divides scores by their sum, after lifting the lowest to 0."""

    def wrong(input, dim, *, temperature=1.0, **options):
        shares = input - input.amin(dim, keepdim=True) + temperature
        return shares / shares.sum(dim, keepdim=True)

    replace(patch, "softmax", wrong)


@saboteur("10_exponential_family")
def softmax_of_half_the_first_logit(patch):
    """Halves the first logit of every row."""

    def wrong(input, dim, **options):
        factor = torch.ones(input.shape[dim], dtype=input.dtype)
        factor[0] = 0.5
        shape = [1] * input.dim()
        shape[dim] = -1
        return softmax(input * factor.reshape(shape), dim, **options)

    replace(patch, "softmax", wrong)


@saboteur("10_exponential_family")
def regression_that_does_not_fit(patch):
    """Softmax regression whose `fit` leaves the parameters alone."""

    class Idle(softmaxlib.SoftmaxRegression):
        def fit(self, x, target, **options):
            self.converged = True
            return self

    replace(patch, "SoftmaxRegression", Idle)


@saboteur("10_exponential_family")
def regression_that_stops_early(patch):
    """Softmax regression whose `fit` makes two steps at most."""

    class Hasty(softmaxlib.SoftmaxRegression):
        def fit(self, x, target, **options):
            return super().fit(x, target, **options | {"max_iterations": 2})

    replace(patch, "SoftmaxRegression", Hasty)
