"""Wrong libraries for the chapter on softmax on a computer."""

import torch

from saboteurs import kernel, plain, right, saboteur

CHAPTER = "06_stability"
VALUES = ("softmax", "log_softmax", "logsumexp")


def _shift_by(patch, shift):
    """Use another shift than the largest logit of the row."""
    for name in VALUES:
        formula = getattr(plain, name)

        def wrong(x, mask, dim, temperature, out, formula=formula):
            if not x.numel():
                out.fill_(float("-inf"))
                return
            z = x.double()
            if mask is not None:
                z = z.masked_fill(~mask, float("-inf"))
            other = shift(z, dim)
            out.copy_(formula(x, mask, dim, temperature, shift=other))

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def subtract_the_minimum(patch):
    """Shifts by the smallest logit, so that wide rows overflow."""
    _shift_by(patch, lambda z, dim: z.amin(dim, keepdim=True))


@saboteur(CHAPTER)
def subtract_the_global_maximum(patch):
    """Shifts every row by the largest logit of the whole batch."""
    _shift_by(
        patch, lambda z, dim: z.amax().expand_as(z.amax(dim, keepdim=True))
    )


@saboteur(CHAPTER)
def log_of_softmax(patch):
    """Takes the logarithm of the rounded softmax."""
    known = right("softmax")

    def wrong(x, mask, dim, temperature, out):
        known(x, mask, dim, temperature, out)
        out.log_()

    kernel(patch, "log_softmax", wrong)


@saboteur(CHAPTER)
def no_promotion(patch):
    """Computes the narrow formats in that format, not in float64."""
    for name in VALUES:
        known, formula = right(name), getattr(plain, name)

        def wrong(x, mask, dim, temperature, out, known=known, f=formula):
            if x.dtype == torch.float64 or not x.numel():
                known(x, mask, dim, temperature, out)
            else:
                out.copy_(f(x, mask, dim, temperature, dtype=x.dtype))

        kernel(patch, name, wrong)


@saboteur(CHAPTER)
def forgets_to_add_the_maximum_back(patch):
    """Log-sum-exp of the shifted logits, returned as that of the logits."""
    known = right("logsumexp")

    def wrong(x, mask, dim, temperature, out):
        if x.shape[dim]:
            x = x - x.amax(dim, keepdim=True)
        known(x, mask, dim, temperature, out)

    kernel(patch, "logsumexp", wrong)
