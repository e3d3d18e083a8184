"""Wrong libraries that chapter 09 must notice."""

import math

import torch
import torch.nn.functional as F

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "09_softargmax"


def _instead_of_logsumexp(patch, value):
    """Let logsumexp be `value(z, dim)`, on rows with their mask as -inf."""

    def wrong(
        input, dim, keepdim=False, *, mask=None, dtype=None, out=None
    ):
        z = input if dtype is None else input.to(dtype)
        if mask is not None:
            z = z.masked_fill(~mask, -math.inf)
        result = value(z, dim)
        return result if keepdim else result.squeeze(dim)

    replace(patch, "logsumexp", wrong)


@saboteur(CHAPTER)
def maximum_for_logsumexp(patch):
    """Takes the hard maximum for the soft one."""
    _instead_of_logsumexp(patch, lambda z, dim: z.amax(dim, keepdim=True))


@saboteur(CHAPTER)
def mellowmax_for_logsumexp(patch):
    """Takes the mean of the exponentials instead of their sum."""
    right = softmaxlib.logsumexp

    def mean(z, dim):
        count = (z > -math.inf).sum(dim, keepdim=True)
        return right(z, dim, keepdim=True) - count.log()

    _instead_of_logsumexp(patch, mean)


@saboteur(CHAPTER)
def boltzmann_for_logsumexp(patch):
    """Takes the softmax-weighted mean of the logits for the soft maximum."""

    def mean(z, dim):
        p = torch.softmax(z, dim)
        return (p * z.masked_fill(p == 0, 0)).sum(dim, keepdim=True)

    _instead_of_logsumexp(patch, mean)


@saboteur(CHAPTER)
def norm_for_logsumexp(patch):
    """Takes half the logarithm of the sum of squared exponentials."""
    right = softmaxlib.logsumexp

    def half(z, dim):
        return right(2 * z, dim, keepdim=True) / 2

    _instead_of_logsumexp(patch, half)


@saboteur(CHAPTER)
def logsumexp_without_log1p(patch):
    """Adds the winner's 1 before the logarithm: small values are lost."""
    _instead_of_logsumexp(
        patch, lambda z, dim: torch.logsumexp(z, dim, keepdim=True)
    )


@saboteur(CHAPTER)
def softplus_shares(patch):
    """Normalises softplus of the logits, smooth and positive as well."""

    def wrong(
        input, dim, *, temperature=1.0, mask=None, dtype=None, out=None
    ):
        z = input if dtype is None else input.to(dtype)
        if temperature == 0:
            top = z == z.amax(dim, keepdim=True)
            return top / top.sum(dim, keepdim=True)
        w = F.softplus(z / temperature)
        if mask is not None:
            w = w.masked_fill(~mask, 0)
        return w / w.sum(dim, keepdim=True)

    replace(patch, "softmax", wrong)


@saboteur(CHAPTER)
def one_hot_at_ties(patch):
    """At temperature 0 gives everything to the first of the winners."""
    right = softmaxlib.softmax

    def first(input, dim, *, temperature=1.0, **options):
        p = right(input, dim, temperature=temperature, **options)
        if temperature != 0:
            return p
        best = p.argmax(dim, keepdim=True)
        return torch.zeros_like(p).scatter(dim, best, 1.0)

    replace(patch, "softmax", first)
