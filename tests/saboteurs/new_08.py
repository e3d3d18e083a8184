"""Wrong libraries that chapter 08 must notice."""

import torch

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "08_sampling"


@saboteur(CHAPTER)
def sorted_draws(patch):
    """Returns the draws of a row in the order of their classes."""
    known = softmaxlib.sample

    def ordered(input, num_samples, dim=-1, **options):
        return known(input, num_samples, dim, **options).sort(dim).values

    replace(patch, "sample", ordered)


@saboteur(CHAPTER)
def rows_share_their_darts(patch):
    """Uses the same uniform numbers for every row of a batch."""
    known = softmaxlib.sample

    def shared(input, num_samples, dim=-1, *, generator=None, **options):
        if input.ndim < 2:
            return known(
                input, num_samples, dim, generator=generator, **options
            )
        generator = generator or torch.default_generator
        state = generator.get_state()
        mask = options.pop("mask", None)
        if mask is not None:
            mask = mask.expand(input.shape).movedim(dim, -1)
            mask = mask.reshape(-1, mask.shape[-1])
        rows = input.movedim(dim, -1)
        draws = []
        for k, row in enumerate(rows.reshape(-1, rows.shape[-1])):
            generator.set_state(state)
            some = None if mask is None else mask[k]
            draws.append(
                known(
                    row,
                    num_samples,
                    mask=some,
                    generator=generator,
                    **options,
                )
            )
        draws = torch.stack(draws).view(*rows.shape[:-1], num_samples)
        return draws.movedim(-1, dim)

    replace(patch, "sample", shared)


@saboteur(CHAPTER)
def generator_stands_still(patch):
    """Leaves the generator as it was: the next call draws the same."""

    def repeating(name):
        known = getattr(softmaxlib, name)

        def again(*args, generator=None, **options):
            state = generator.get_state() if generator else None
            draws = known(*args, generator=generator, **options)
            if generator:
                generator.set_state(state)
            return draws

        return again

    for name in ("sample", "gumbel_max"):
        replace(patch, name, repeating(name))


@saboteur(CHAPTER)
def generator_is_ignored(patch):
    """Draws from PyTorch's own generator, whatever is passed."""
    known = softmaxlib.sample

    def own(*args, generator=None, **options):
        return known(*args, **options)

    replace(patch, "sample", own)


def _first_at_zero(known):
    def first(input, num_samples, dim=-1, *, temperature=1.0, **options):
        draws = known(
            input, num_samples, dim, temperature=temperature, **options
        )
        mask = options.get("mask")
        if temperature == 0:
            kept = input
            if mask is not None:
                kept = input.masked_fill(~mask, -torch.inf)
            best = kept.argmax(dim, keepdim=True)
            draws = best.expand_as(draws).contiguous()
        return draws

    return first


@saboteur(CHAPTER)
def ties_go_to_the_first(patch):
    """At temperature 0 always draws the first of the largest logits."""
    for name in ("sample", "gumbel_max"):
        known = getattr(softmaxlib, name)
        replace(patch, name, _first_at_zero(known))


@saboteur(CHAPTER)
def one_draw_too_few(patch):
    """Returns one draw less than asked for."""

    def fewer(name):
        known = getattr(softmaxlib, name)

        def draws(input, num_samples, dim=-1, **options):
            return known(input, max(num_samples - 1, 0), dim, **options)

        return draws

    for name in ("sample", "gumbel_max"):
        replace(patch, name, fewer(name))


@saboteur(CHAPTER)
def draws_by_rank(patch):
    """Numbers the classes by rank, and forgets to number them back."""
    known = softmaxlib.sample

    def ranked(input, num_samples, dim=-1, *, mask=None, **options):
        if mask is not None:
            input = input.masked_fill(~mask, -torch.inf)
        down = input.sort(dim, descending=True).values
        return known(down, num_samples, dim, **options)

    replace(patch, "sample", ranked)


@saboteur(CHAPTER)
def gumbel_max_forgets_the_temperature(patch):
    """Divides logits and noise by T, which changes no arg max."""
    known = softmaxlib.gumbel_max

    def forgetful(*args, temperature=1.0, **options):
        return known(*args, **options)

    replace(patch, "gumbel_max", forgetful)


@saboteur(CHAPTER)
def top_k_in_the_order_of_classes(patch):
    """Sorts the classes that were drawn without replacement."""
    known = softmaxlib.gumbel_top_k

    def ordered(input, k, dim=-1, **options):
        return known(input, k, dim, **options).sort(dim).values

    replace(patch, "gumbel_top_k", ordered)


@saboteur(CHAPTER)
def top_k_fills_up(patch):
    """Draws impossible classes where there are too few possible ones."""
    known = softmaxlib.gumbel_top_k

    def filling(input, k, dim=-1, **options):
        possible = input.masked_fill(input == -torch.inf, -1e4)
        return known(possible, k, dim, **options)

    replace(patch, "gumbel_top_k", filling)
