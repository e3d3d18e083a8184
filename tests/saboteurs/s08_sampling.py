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
