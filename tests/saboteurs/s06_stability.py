"""Wrong libraries for the chapter on softmax on a computer."""

import torch

import softmaxlib
from saboteurs import kernel, plain, replace, right, saboteur

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


# --- what the first edition missed ---------------------------------------


@saboteur(CHAPTER)
def forgets_the_mask_beside_the_last_dimension(patch):
    """Takes a mask into account along the last dimension only."""
    for name in ("softmax", "log_softmax", "logsumexp"):
        known = getattr(softmaxlib, name)

        def wrong(input, dim, *args, mask=None, known=known, **options):
            if dim not in (-1, input.ndim - 1):
                mask = None
            return known(input, dim, *args, mask=mask, **options)

        replace(patch, name, wrong)


@saboteur(CHAPTER)
def lets_masked_cotangents_through(patch):
    """Hands what arrives at a masked entry on to its logit."""
    known = softmaxlib.softmax

    def wrong(input, dim, *, mask=None, **options):
        value = known(input, dim, mask=mask, **options)
        if mask is None or not input.requires_grad:
            return value
        leak = torch.nan_to_num(input - input.detach())
        return value + leak.masked_fill(mask, 0)

    replace(patch, "softmax", wrong)


@saboteur(CHAPTER)
def forgets_the_second_block_of_a_long_row(patch):
    """Sums the first 2^18 weights of a longer row only."""
    known, length = softmaxlib.softmax, 2**18

    def wrong(input, dim, **options):
        p = known(input, dim, **options)
        if not p.ndim or p.shape[dim] <= length:
            return p
        return p / p.narrow(dim, 0, length).sum(dim, keepdim=True)

    replace(patch, "softmax", wrong)


@saboteur(CHAPTER)
def hides_rows_without_classes(patch):
    """Replaces NaN by 0, so that a row of -inf only looks harmless."""
    for name in ("softmax", "log_softmax"):
        known = getattr(softmaxlib, name)

        def wrong(*args, known=known, **options):
            return known(*args, **options).nan_to_num(nan=0.0)

        replace(patch, name, wrong)


@saboteur(CHAPTER)
def adds_the_winner_to_the_rest(patch):
    """Forms 1 + rest, though in float64, before it takes the logarithm."""
    known = softmaxlib.log_softmax

    def wrong(input, dim, *, temperature=1.0, mask=None, **options):
        if mask is not None or temperature != 1.0 or options:
            return known(
                input, dim, temperature=temperature, mask=mask, **options
            )
        return torch.log_softmax(input.double(), dim).to(input.dtype)

    replace(patch, "log_softmax", wrong)


@saboteur(CHAPTER)
def subtracts_in_the_narrow_format(patch):
    """Shifts in the input's format, and is accurate from there on."""
    known = softmaxlib.softmax

    def wrong(input, dim, *, mask=None, **options):
        if mask is None and input.is_floating_point() and input.numel():
            input = input - input.amax(dim, keepdim=True).detach()
        return known(input, dim, mask=mask, **options)

    replace(patch, "softmax", wrong)
