"""Wrong libraries for the chapter on sampling."""

import math

import torch

import softmaxlib
from saboteurs import plain, replace, saboteur

CHAPTER = "08_sampling"


@saboteur(CHAPTER)
def sample_too_warm(patch):
    """Draws by inversion at 1.1 times the temperature."""
    known = softmaxlib.sample

    def warmer(input, num_samples, dim=-1, *, temperature=1.0, **options):
        return known(
            input,
            num_samples,
            dim,
            temperature=1.1 * temperature,
            **options,
        )

    replace(patch, "sample", warmer)


def _noisy(input, count, dim, temperature, mask, noise):
    """log p + noise, with `count` rows of noise for each row of logits."""
    if mask is not None:
        mask = mask.expand(input.shape)
    log_p = plain.log_softmax(input, mask, dim % input.ndim, temperature)
    return log_p + noise((count, *log_p.shape))


def _with_noise(patch, noise):
    """Let the Gumbel functions draw `noise(shape, generator)`."""
    names = ("gumbel_max", "gumbel_top_k")
    one, several = (getattr(softmaxlib, name) for name in names)

    def gumbel_max(
        input,
        num_samples,
        dim=-1,
        *,
        temperature=1.0,
        mask=None,
        generator=None,
    ):
        options = {"temperature": temperature, "mask": mask}
        one(input, min(num_samples, 1), dim, **options)  # its errors
        noisy = _noisy(
            input,
            num_samples,
            dim,
            temperature,
            mask,
            lambda shape: noise(shape, generator),
        )
        return noisy.argmax(dim % input.ndim + 1).movedim(0, dim)

    def gumbel_top_k(
        input, k, dim=-1, *, temperature=1.0, mask=None, generator=None
    ):
        options = {"temperature": temperature, "mask": mask}
        several(input, k, dim, **options)  # its errors
        noisy = _noisy(
            input,
            1,
            dim,
            temperature,
            mask,
            lambda shape: noise(shape, generator),
        )
        return noisy[0].topk(k, dim).indices

    replace(patch, "gumbel_max", gumbel_max)
    replace(patch, "gumbel_top_k", gumbel_top_k)


@saboteur(CHAPTER)
def gaussian_noise(patch):
    """Adds Gaussian noise, of the variance of Gumbel noise."""

    def gaussian(shape, generator):
        noise = torch.empty(shape, dtype=torch.float64)
        noise.normal_(generator=generator)
        return noise * (math.pi / math.sqrt(6))

    _with_noise(patch, gaussian)


@saboteur(CHAPTER)
def same_noise_in_all_rows(patch):
    """Adds the same Gumbel noise to all rows of a batch."""
    known = softmaxlib.gumbel_max

    def shared(input, num_samples, dim=-1, *, generator=None, **options):
        if input.ndim < 2:
            return known(
                input, num_samples, dim, generator=generator, **options
            )
        if generator is None:
            generator = torch.default_generator
        # Every row starts from the same state.
        state = generator.get_state()
        mask = options.pop("mask", None)
        if mask is not None:
            mask = mask.expand(input.shape).movedim(dim, -1)
        rows = input.movedim(dim, -1)
        batch = rows.shape[:-1]
        result = torch.empty((*batch, num_samples), dtype=torch.int64)
        for place in torch.cartesian_prod(*map(torch.arange, batch)).view(
            -1, len(batch)
        ):
            at = tuple(place.tolist())
            generator.set_state(state)
            result[at] = known(
                rows[at],
                num_samples,
                mask=None if mask is None else mask[at],
                generator=generator,
                **options,
            )
        return result.movedim(-1, dim)

    replace(patch, "gumbel_max", shared)


@saboteur(CHAPTER)
def three_draws_repeated(patch):
    """Draws three times, and repeats them as often as asked for."""
    known = softmaxlib.sample

    def repeating(input, num_samples, dim=-1, **options):
        draws = known(input, min(num_samples, 3), dim, **options)
        if num_samples <= 3:
            return draws
        place = torch.arange(num_samples) % 3
        return draws.index_select(dim, place)

    replace(patch, "sample", repeating)


@saboteur(CHAPTER)
def top_k_off_by_one(patch):
    """Drops the winner of the noisy logits and returns ranks 2 to k + 1."""
    known = softmaxlib.gumbel_top_k

    def shifted(input, k, dim=-1, **options):
        if k == 0 or k >= input.shape[dim]:
            return known(input, k, dim, **options).roll(1, dim)
        return known(input, k + 1, dim, **options).narrow(dim, 1, k)

    replace(patch, "gumbel_top_k", shifted)


# --- what the first edition missed ---------------------------------------


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
