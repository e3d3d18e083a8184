"""Wrong libraries for the chapter on vocabularies and attention."""

import dataclasses
import math

import torch
from torch import distributed
from torch.nn import functional as F

import softmaxlib
from saboteurs import replace, saboteur

CHAPTER = "16_scale"


# --- classes on several processes ------------------------------------------

# What other processes shall run stands in a module: it is sent by name.


def _sum(value, operation=distributed.ReduceOp.SUM):
    value = value.detach().clone()
    distributed.all_reduce(value, operation)
    return value


def _shared_loss(x, weight, target, bias, log_sum):
    """The mean loss from log_sum(local logits), with whole gradients."""
    z = F.linear(x, weight, bias)
    sizes = [None] * distributed.get_world_size()
    distributed.all_gather_object(sizes, len(weight))
    here = target - sum(sizes[: distributed.get_rank()])
    mine = ((here >= 0) & (here < len(weight)) & (target >= 0)).to(z)
    place = here.clamp(0, len(weight) - 1)[:, None]
    picked = z.gather(1, place)[:, 0] * mine
    total = log_sum(z.detach())
    counted = (target >= 0).to(z)
    value = ((total - _sum(picked)) * counted).sum() / counted.sum()
    # With the gradient p - y of the classes that are here.
    p = (z.detach() - total[:, None]).exp()
    own = ((p * z).sum(1) - picked) * counted
    own = own.sum() / counted.sum()
    return value + own - own.detach()


def _of_whole(z):
    top = _sum(z.amax(1, keepdim=True), distributed.ReduceOp.MAX)
    return (top + _sum((z - top).exp().sum(1, keepdim=True)).log())[:, 0]


def loss_of_own_classes(x, weight, target, bias=None):
    return _shared_loss(
        x, weight, target, bias, lambda z: torch.logsumexp(z, 1)
    )


def loss_of_local_maxima(x, weight, target, bias=None):
    def log_sum(z):
        top = z.amax(1)
        total = _sum((z - top[:, None]).exp().sum(1))
        return _sum(top, distributed.ReduceOp.MAX) + total.log()

    return _shared_loss(x, weight, target, bias, log_sum)


def loss_with_a_local_slope(x, weight, target, bias=None):
    return _shared_loss(x, weight, target, bias, _of_whole)


def softmax_of_own_classes(input, dim):
    return torch.softmax(input, dim)


def log_sum_of_local_sums(input, dim):
    return _sum(torch.logsumexp(input, dim))


@saboteur(CHAPTER)
def parallel_loss_of_own_classes(patch):
    """Normalises over the classes of the process, not over all."""
    replace(patch, "parallel_linear_cross_entropy", loss_of_own_classes)


@saboteur(CHAPTER)
def parallel_sums_of_local_maxima(patch):
    """Adds sums that are relative to the maximum of each process."""
    replace(patch, "parallel_linear_cross_entropy", loss_of_local_maxima)


@saboteur(CHAPTER)
def parallel_gradient_of_x_not_reduced(patch):
    """Leaves the gradient of x with the part of the process's classes."""
    replace(patch, "parallel_linear_cross_entropy", loss_with_a_local_slope)


@saboteur(CHAPTER)
def parallel_softmax_of_own_classes(patch):
    """Takes the softmax of the classes of the process alone."""
    replace(patch, "parallel_softmax", softmax_of_own_classes)


@saboteur(CHAPTER)
def parallel_log_sums_added(patch):
    """Adds the log-sum-exps of the processes."""
    replace(patch, "parallel_logsumexp", log_sum_of_local_sums)


# --- states ---------------------------------------------------------------


def _merging(patch, combine):
    """Let states merge by combine(m, n, top, sum, other sum)."""
    right = softmaxlib.OnlineSoftmax.merge

    def merge(self, other):
        state = right(self, other)
        if self.dtype is None or other.dtype is None:
            return state
        tops = self.top, other.top, state.top
        parts = {"total": combine(*tops, self.total, other.total)}
        if state.values is not None:
            parts["values"] = combine(*tops, self.values, other.values)
        return dataclasses.replace(state, **parts)

    replace(patch, "OnlineSoftmax.merge", merge)


def _weight(top, new):
    """exp(top - new), with the guard."""
    return (top - new.masked_fill(new == -math.inf, 0)).exp()


@saboteur(CHAPTER)
def states_added(patch):
    """Adds the sums of two states, each relative to its own maximum."""
    _merging(patch, lambda m, n, top, s, t: s + t)


@saboteur(CHAPTER)
def only_the_new_piece_rescaled(patch):
    """Leaves the old sum as it is when the maximum changes."""
    _merging(patch, lambda m, n, top, s, t: s + t * _weight(n, top))


@saboteur(CHAPTER)
def only_the_old_piece_rescaled(patch):
    """Adds the new sum as it is, also where its maximum is the smaller."""
    _merging(patch, lambda m, n, top, s, t: s * _weight(m, top) + t)


@saboteur(CHAPTER)
def states_rescaled_the_wrong_way(patch):
    """Multiplies by exp(M - m) where it should be exp(m - M)."""

    def combine(m, n, top, s, t):
        a, b = _weight(m, top), _weight(n, top)
        return torch.where(a > 0, s / a, s) + torch.where(b > 0, t / b, t)

    _merging(patch, combine)


@saboteur(CHAPTER)
def unguarded_states(patch):
    """Lets two states of nothing meet in exp(-inf + inf)."""

    def combine(m, n, top, s, t):
        return s * (m - top).exp() + t * (n - top).exp()

    _merging(patch, combine)


@saboteur(CHAPTER)
def nothing_is_zero(patch):
    """Starts from the maximum 0, as if there were a logit of zero."""
    right = softmaxlib.OnlineSoftmax.update

    def update(self, input, dim=-1, *, values=None, mask=None):
        if self.dtype is not None:
            return right(self, input, dim, values=values, mask=mask)
        first = torch.zeros_like(input.narrow(dim, 0, 1))
        none = None if values is None else 0 * values[..., :1, :]
        state = right(self, first, dim, values=none)
        return right(state, input, dim, values=values, mask=mask)

    replace(patch, "OnlineSoftmax.update", update)


@saboteur(CHAPTER)
def values_not_rescaled(patch):
    """Rescales the sums of the weights, and not those of the values."""
    right = softmaxlib.OnlineSoftmax.merge

    def merge(self, other):
        state = right(self, other)
        if None in (self.dtype, other.dtype) or state.values is None:
            return state
        values = self.values + other.values
        return dataclasses.replace(state, values=values)

    replace(patch, "OnlineSoftmax.merge", merge)


@saboteur(CHAPTER)
def attention_not_divided(patch):
    """Returns the weighted sum of the values, not their mean."""

    def finalize(self):
        return self.values.to(self.dtype)

    replace(patch, "OnlineSoftmax.finalize", finalize)


@saboteur(CHAPTER)
def attention_is_the_plain_mean(patch):
    """Averages the values of a chunk without their weights."""
    right = softmaxlib.OnlineSoftmax.update

    def update(self, input, dim=-1, *, values=None, mask=None):
        return right(self, 0 * input, dim, values=values, mask=mask)

    replace(patch, "OnlineSoftmax.update", update)


@saboteur(CHAPTER)
def state_without_the_maximum(patch):
    """Returns the logarithm of the sum and forgets to add the maximum."""

    def logsumexp(self):
        return self.total.log().squeeze(-1).to(self.dtype)

    replace(patch, "OnlineSoftmax.logsumexp", property(logsumexp))


@saboteur(CHAPTER)
def chunks_normalised_alone(patch):
    """Streams the softmax of each chunk, as if there were no others."""

    def alone(chunks, dim):
        return (torch.softmax(chunk, dim) for chunk in chunks)

    replace(patch, "streaming_softmax", alone)


@saboteur(CHAPTER)
def chunks_log_sums_added(patch):
    """Adds up the log-sum-exps of the chunks."""

    def added(chunks, dim):
        return sum(torch.logsumexp(chunk, dim) for chunk in chunks)

    replace(patch, "streaming_logsumexp", added)


@saboteur(CHAPTER)
def stream_stops_early(patch):
    """Leaves the last chunk of a stream out."""
    right = softmaxlib.streaming_logsumexp

    def early(chunks, dim):
        chunks = list(chunks)
        return right(chunks[: max(len(chunks) - 1, 1)], dim)

    replace(patch, "streaming_logsumexp", early)


# --- the loss of a vocabulary ----------------------------------------------


def _linear(patch, wrong):
    """Put wrong(right, x, weight, target, bias, **options) in its place."""
    right = softmaxlib.linear_cross_entropy

    def replaced(x, weight, target, bias=None, **options):
        return wrong(right, x, weight, target, bias, **options)

    replace(patch, "linear_cross_entropy", replaced)


@saboteur(CHAPTER)
def linear_loss_without_a_bias_gradient(patch):
    """Adds the bias to the logits, and sends it no gradient."""

    def wrong(right, x, weight, target, bias, **options):
        # Of size zero, so that PyTorch does not miss it.
        frozen = None if bias is None else bias.detach() + 0 * bias
        return right(x, weight, target, frozen, **options)

    _linear(patch, wrong)


@saboteur(CHAPTER)
def linear_loss_over_all_rows(patch):
    """Divides the mean by all rows, the ignored ones included."""

    def wrong(right, x, weight, target, bias, **options):
        loss = right(x, weight, target, bias, **options)
        if options.get("reduction", "mean") != "mean":
            return loss
        ignored = options.get("ignore_index", -100)
        return loss * (target != ignored).double().mean().to(loss)

    _linear(patch, wrong)


@saboteur(CHAPTER)
def cap_of_the_loss(patch):
    """Caps the loss of each row, where it should cap the logits."""

    def wrong(right, x, weight, target, bias, *, softcap=None, **options):
        loss = right(x, weight, target, bias, **options)
        return (
            loss if softcap is None else softcap * (loss / softcap).tanh()
        )

    _linear(patch, wrong)


@saboteur(CHAPTER)
def linear_loss_without_the_last_block(patch):
    """Leaves the last classes out where they do not fill a block."""

    def wrong(right, x, weight, target, bias, **options):
        whole = len(weight) - len(weight) % 4
        kept = max(whole, int(target.max()) + 1)
        bias = None if bias is None else bias[:kept]
        weights = options.get("class_weight")
        if weights is not None:
            options["class_weight"] = weights[:kept]
        return right(x, weight[:kept], target, bias, **options)

    _linear(patch, wrong)


@saboteur(CHAPTER)
def log_z_not_squared(patch):
    """Penalises log Z itself, not its square."""

    def wrong(right, x, weight, target, bias, *, z_loss=0.0, **options):
        loss = right(x, weight, target, bias, **options)
        z = F.linear(x, weight, bias)[target >= 0]
        return loss + z_loss * torch.logsumexp(z, -1).mean()

    _linear(patch, wrong)


@saboteur(CHAPTER)
def rows_share_an_upstream_gradient(patch):
    """Sends every row the mean of the gradients from above."""

    def wrong(right, x, weight, target, bias, **options):
        loss = right(x, weight, target, bias, **options)
        if loss.ndim and loss.requires_grad:
            loss.register_hook(lambda g: g.mean().expand_as(g))
        return loss

    _linear(patch, wrong)


@saboteur(CHAPTER)
def linear_loss_keeps_all_logits(patch):
    """Computes the right loss from all logits at once."""

    def wrong(right, x, weight, target, bias, **options):
        right(x, weight, target, bias, **options)  # its errors
        z = F.linear(x, weight, bias)
        softcap, penalty = (
            options.pop("softcap", None),
            options.pop("z_loss", 0),
        )
        z = z if softcap is None else softcap * (z / softcap).tanh()
        options["weight"] = options.pop("class_weight", None)
        loss = F.cross_entropy(z, target, **options)
        square = torch.logsumexp(z, 1)[target >= 0].square().mean()
        return loss + penalty * square if penalty else loss

    _linear(patch, wrong)
