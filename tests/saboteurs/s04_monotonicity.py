"""Wrong libraries for the chapter on order."""

import torch

from saboteurs import kernel, right, saboteur

CHAPTER = "04_monotonicity"


def _swap_near_pairs(x, values, dim, gap):
    """Exchange the values at two logits that are closer than `gap`."""
    logits, order = x.movedim(dim, -1).sort(dim=-1, stable=True)
    step = logits.diff(dim=-1)
    near = (step > 0) & (step < gap)
    before = torch.zeros_like(near)
    before[..., 1:] = near[..., :-1]
    # The first pair of every run of near ones: no two of them overlap.
    first = torch.zeros_like(order, dtype=torch.bool)
    first[..., :-1] = near & ~before
    place = torch.arange(order.shape[-1]).expand_as(order)
    place = place + first.long() - first.roll(1, -1).long()
    partner = torch.empty_like(order).scatter_(
        -1, order, order.gather(-1, place)
    )
    return values.movedim(dim, -1).gather(-1, partner).movedim(-1, dim)


@saboteur(CHAPTER)
def near_pairs_reversed(patch):
    """Exchanges the results of float64 logits closer than 1e-13."""
    for name in ("softmax", "log_softmax"):
        known = right(name)

        def wrong(x, mask, dim, temperature, out, known=known):
            logits = x.clone()
            known(x, mask, dim, temperature, out)
            if x.dtype == torch.float64 and x.shape[dim] > 1:
                out.copy_(_swap_near_pairs(logits, out, dim, 1e-13))

        kernel(patch, name, wrong)
