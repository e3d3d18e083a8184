"""Wrong libraries for the chapter on the axioms of probability."""

import torch

import softmaxlib
from saboteurs import kernel, replace, right, saboteur

CHAPTER = "03_axioms"


@saboteur(CHAPTER)
def mask_after_exp(patch):
    """Zeroes masked entries after the sum, without renormalising."""
    empty = {"softmax": 0.0, "log_softmax": float("-inf")}
    for name in ("softmax", "log_softmax", "logsumexp"):
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known, name=name):
            known(x, None, dim, temperature, out)
            if mask is not None and name in empty:
                out.masked_fill_(~mask, empty[name])

        kernel(patch, name, wrong)


# --- what the first edition missed ---------------------------------------


@saboteur("03_axioms")
def group_takes_its_largest_member(patch):
    """The largest logit in the place of the log-sum-exp."""

    def largest(input, dim, keepdim=False, **options):
        return input.amax(dim, keepdim=keepdim)

    replace(patch, "logsumexp", largest)


@saboteur("03_axioms")
def group_takes_the_mean(patch):
    """Log of the mean exponential: the size of a group does not count."""
    right = softmaxlib.logsumexp

    def of_the_mean(input, dim, keepdim=False, **options):
        size = input.new_tensor(float(input.shape[dim]))
        return right(input, dim, keepdim, **options) - size.log()

    replace(patch, "logsumexp", of_the_mean)


@saboteur("03_axioms")
def irrelevant_classes_count(patch):
    """Odds that depend on the menu: logits divided by how many there are."""
    right = softmaxlib.softmax

    def crowded(input, dim, *, mask=None, **options):
        size = input.shape[dim]
        if mask is not None:
            size = mask.sum(dim, keepdim=True).clamp(min=1)
        return right(input * 2 / size, dim, mask=mask, **options)

    replace(patch, "softmax", crowded)


@saboteur("03_axioms")
def mask_without_renormalising(patch):
    """Zeroes masked entries after the softmax, and leaves the rest."""
    right = softmaxlib.softmax

    def zeroed(input, dim, *, mask=None, **options):
        p = right(input, dim, **options)
        return p if mask is None else p.masked_fill(~mask, 0)

    replace(patch, "softmax", zeroed)


@saboteur("03_axioms")
def never_quite_zero(patch):
    """Adds 1e-30 to every probability, so that no logarithm fails."""
    right = softmaxlib.softmax

    def padded(input, dim, **options):
        return right(input, dim, **options) + 1e-30

    replace(patch, "softmax", padded)


@saboteur("03_axioms")
def sums_are_forced_to_one(patch):
    """Gives what is missing from 1 to the first class."""
    right = softmaxlib.softmax

    def forced(input, dim, **options):
        p = right(input, dim, **options).clone()
        if p.ndim and p.shape[dim]:
            missing = 1 - p.double().sum(dim, keepdim=True)
            p.narrow(dim, 0, 1).add_(missing.to(p.dtype))
        return p

    replace(patch, "softmax", forced)


@saboteur("03_axioms")
def log_softmax_of_rounded_sum(patch):
    """Rounds 1 + exp(-gap) in the format of the logits, as PyTorch does."""

    def rounded(input, dim, **options):
        return torch.log_softmax(input, dim)

    replace(patch, "log_softmax", rounded)


@saboteur("03_axioms")
def one_sum_for_all_slices(patch):
    """Divides by one number for the whole tensor: the sums of all slices."""

    def together(input, dim, **options):
        e = input.double().exp()
        return (e / e.sum()).to(input.dtype)

    replace(patch, "softmax", together)
