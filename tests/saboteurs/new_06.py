"""More wrong libraries for the chapter on softmax on a computer."""

import torch

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "06_stability"


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
