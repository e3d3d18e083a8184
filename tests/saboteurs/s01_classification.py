"""Wrong libraries that chapter 01 must notice."""

import torch

import softmaxlib
from saboteurs import replace, saboteur


@saboteur("01_classification")
def probabilities_are_sigmoids(patch):
    """A sigmoid for each logit: positive, in order, and not shared out."""

    def sigmoids(input, dim, **options):
        return torch.sigmoid(input)

    replace(patch, "softmax", sigmoids)


@saboteur("01_classification")
def one_class_is_a_sigmoid(patch):
    """Takes a single logit for one of two, as if the other were 0."""
    right = softmaxlib.softmax

    def guessing(input, dim, **options):
        if input.ndim and input.shape[dim] == 1:
            return torch.sigmoid(input)
        return right(input, dim, **options)

    replace(patch, "softmax", guessing)


@saboteur("01_classification")
def log_probabilities_are_log_odds(patch):
    """Returns log(p / (1 - p)) where log p is asked for."""
    right = softmaxlib.softmax

    def log_odds(input, dim, **options):
        return right(input, dim, **options).logit()

    replace(patch, "log_softmax", log_odds)


@saboteur("01_classification")
def weights_of_squares(patch):
    """Normalises 1 + z**2: smooth, positive, and not the exponential."""

    def squares(input, dim, **options):
        weight = 1 + input**2
        return weight / weight.sum(dim, keepdim=True)

    replace(patch, "softmax", squares)


@saboteur("01_classification")
def softmax_never_certain(patch):
    """Clips probabilities to [0.01, 0.99], which no longer sum to one."""
    right = softmaxlib.softmax

    def clipped(input, dim, **options):
        return right(input, dim, **options).clamp(0.01, 0.99)

    replace(patch, "softmax", clipped)
