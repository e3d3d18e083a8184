"""Wrong libraries for the page of promises: the interface, not the formula."""

import inspect

import torch

import softmaxlib
from saboteurs import check, kernel, replace, right, right_check, saboteur

CHAPTER = "promises"
DRAWS = "sample", "gumbel_max", "gumbel_top_k"
VALUES = "softmax", "log_softmax", "logsumexp"
LOSSES = "cross_entropy", "cross_entropy_gradient"


def _let(patch, name, change):
    """Call a public function with other arguments than those given.

    `change` gets them by name, and alters the dictionary.
    """
    known = getattr(softmaxlib, name)
    signature = inspect.signature(known)

    def wrong(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        change(bound.arguments)
        return known(*bound.args, **bound.kwargs)

    replace(patch, name, wrong)


def _fix(patch, names, **fixed):
    """Let functions take no notice of some of their options."""
    for name in names:
        _let(patch, name, lambda given: given.update(fixed))


def _spoil(patch, names, change):
    """Let functions return `change(result)`."""
    for name in names:
        known = getattr(softmaxlib, name)

        def wrong(*arguments, known=known, **options):
            return change(known(*arguments, **options))

        replace(patch, name, wrong)


# --- shapes --------------------------------------------------------------


@saboteur(CHAPTER)
def hvp_over_the_last_dimension(patch):
    """The product with the Hessian takes no notice of `dim`."""
    _fix(patch, ("softmax_hvp",), dim=-1)


@saboteur(CHAPTER)
def soft_loss_over_the_last_dimension(patch):
    """The loss of distributions takes no notice of `dim`."""
    _fix(patch, ("soft_cross_entropy",), dim=-1)


@saboteur(CHAPTER)
def sum_never_keeps_the_dimension(patch):
    """log-sum-exp takes no notice of `keepdim`."""
    _fix(patch, ("logsumexp",), keepdim=False)


@saboteur(CHAPTER)
def sum_over_the_first_of_several(patch):
    """Of several dimensions, log-sum-exp reduces the first alone."""

    def change(given):
        if isinstance(given["dim"], tuple | list) and given["dim"]:
            given["dim"] = given["dim"][0]

    _let(patch, "logsumexp", change)


@saboteur(CHAPTER)
def hessian_with_the_batch_reversed(patch):
    """The batch dimensions of a dense Hessian come in another order."""
    _spoil(
        patch,
        ("softmax_hessian",),
        lambda h: h.transpose(0, 1) if h.ndim > 4 else h,
    )


@saboteur(CHAPTER)
def nan_spreads_over_the_batch(patch):
    """One row with NaN makes all rows NaN."""
    known = right("softmax")

    def wrong(x, mask, dim, temperature, out):
        known(x, mask, dim, temperature, out)
        out.add_(0 * x.sum())

    kernel(patch, "softmax", wrong)


@saboteur(CHAPTER)
def reads_memory_in_its_own_order(patch):
    """Takes every input for contiguous."""

    def change(given):
        x = given["input"]
        contiguous = torch.empty(x.shape, device="meta").stride()
        fits = x.untyped_storage().nbytes() >= x.numel() * x.itemsize
        if fits and not x.requires_grad and x.ndim > 1:
            given["input"] = x.as_strided(x.shape, contiguous)

    for name in ("softmax", "softmax_jvp"):
        _let(patch, name, change)


@saboteur(CHAPTER)
def out_is_written_but_not_returned(patch):
    """Returns a copy of what it wrote to `out`."""
    _spoil(patch, VALUES, torch.clone)


@saboteur(CHAPTER)
def out_is_returned_but_not_written(patch):
    """Takes no notice of `out`."""
    _fix(patch, VALUES, out=None)


# --- formats -------------------------------------------------------------


@saboteur(CHAPTER)
def always_answers_in_float32(patch):
    """Returns float32, whatever came in."""
    _spoil(patch, ("softmax", "softmax_jvp"), torch.Tensor.float)


@saboteur(CHAPTER)
def reduced_loss_in_the_working_format(patch):
    """A mean or a sum of losses comes back in float64."""
    _spoil(
        patch,
        ("cross_entropy",),
        lambda loss: loss if loss.ndim else loss.double(),
    )


@saboteur(CHAPTER)
def rows_rounded_before_they_are_added(patch):
    """Rounds the loss of each row to the format of the logits."""
    known = right("loss")

    def wrong(x, *others):
        *_, out = others
        known(x, *others)
        out.copy_(out.to(x.dtype))

    kernel(patch, "loss", wrong)


@saboteur(CHAPTER)
def integers_are_let_in(patch):
    """Converts integers without being asked."""
    known = right_check("logits")

    def wrong(function, value, dtype=None, promote=False):
        return known(function, value, dtype, promote=True)

    check(patch, "logits", wrong)


# --- masks and derivatives -----------------------------------------------


@saboteur(CHAPTER)
def mask_upside_down(patch):
    """Masks what is True, as some attention layers do."""
    known = right_check("mask")

    def wrong(function, value, x):
        mask = known(function, value, x)
        return None if mask is None else ~mask

    check(patch, "mask", wrong)


@saboteur(CHAPTER)
def no_gradient_from_the_products(patch):
    """Detaches the products with derivatives from the graph."""
    names = "softmax_jvp", "softmax_vjp", "softmax_hvp", "logsumexp_hvp"
    _spoil(patch, names, torch.Tensor.detach)


@saboteur(CHAPTER)
def wrong_in_a_graph_only(patch):
    """Takes no notice of the temperature where a compiler traces."""

    def change(given):
        if torch.compiler.is_compiling():
            given["temperature"] = 1.0

    _let(patch, "softmax", change)


@saboteur(CHAPTER)
def nothing_without_values(patch):
    """Fails on the device that has shapes and no values."""

    def change(given):
        if given["input"].is_meta:
            raise RuntimeError("no values")

    _let(patch, "log_softmax", change)


# --- losses --------------------------------------------------------------


@saboteur(CHAPTER)
def loss_without_class_weights(patch):
    """The loss takes no notice of the weights of the classes."""
    _fix(patch, LOSSES, weight=None)


@saboteur(CHAPTER)
def loss_without_smoothing(patch):
    """The loss takes no notice of label smoothing."""
    _fix(patch, LOSSES, label_smoothing=0.0)


@saboteur(CHAPTER)
def loss_summed_always(patch):
    """The loss takes no notice of its reduction."""
    _fix(patch, ("cross_entropy", "soft_cross_entropy"), reduction="sum")


@saboteur(CHAPTER)
def loss_ignores_minus_100_only(patch):
    """Takes the place of an ignored class for the default."""

    def change(given):
        index, target = given["ignore_index"], given["target"]
        if index != -100:
            hit = target == index
            given["target"] = target.masked_fill(hit, 0)
            given["ignore_index"] = -100

    for name in LOSSES:
        _let(patch, name, change)


@saboteur(CHAPTER)
def probabilities_are_normalised(patch):
    """Divides class probabilities by their sum."""

    def change(given):
        y = given["target"]
        if y.is_floating_point():
            dim = min(y.ndim - 1, 1)
            given["target"] = y / y.sum(dim, keepdim=True)

    for name in LOSSES:
        _let(patch, name, change)


@saboteur(CHAPTER)
def targets_are_not_looked_at(patch):
    """A class index out of range counts as the last class."""

    def change(given):
        y = given["target"]
        if not y.is_floating_point():
            last = given["input"].shape[min(given["input"].ndim - 1, 1)] - 1
            keep = y == given["ignore_index"]
            given["target"] = y.clamp(0, last).where(~keep, y)

    for name in LOSSES:
        _let(patch, name, change)


# --- draws ---------------------------------------------------------------


@saboteur(CHAPTER)
def draws_without_the_mask(patch):
    """Draws take no notice of the mask."""
    _fix(patch, DRAWS, mask=None)


@saboteur(CHAPTER)
def draws_at_temperature_one(patch):
    """Draws take no notice of the temperature."""
    _fix(patch, DRAWS, temperature=1.0)


@saboteur(CHAPTER)
def draws_are_int32(patch):
    """Returns indices that PyTorch does not index with."""
    _spoil(patch, DRAWS, torch.Tensor.int)


# --- layers and the model ------------------------------------------------


@saboteur(CHAPTER)
def layers_without_a_mask(patch):
    """The layers take no notice of the mask."""
    for layer in ("Softmax", "LogSoftmax"):
        known = getattr(softmaxlib, layer).forward

        def wrong(self, input, mask=None, known=known):
            return known(self, input)

        replace(patch, f"{layer}.forward", wrong)


@saboteur(CHAPTER)
def loss_layer_forgets_its_options(patch):
    """The layer of the loss always takes the mean."""
    known = softmaxlib.CrossEntropyLoss.forward

    def wrong(self, input, target):
        self.options["reduction"] = "mean"
        return known(self, input, target)

    replace(patch, "CrossEntropyLoss.forward", wrong)


@saboteur(CHAPTER)
def weight_gradient_sums_always(patch):
    """The gradient in the weights takes no notice of the mean."""
    _fix(patch, ("weight_gradient",), reduction="sum")


@saboteur(CHAPTER)
def weight_hessian_in_one_layout(patch):
    """The Hessian in the weights is that of the layout kd, always."""

    def change(given):
        if given["layout"] == "dk":
            given["layout"] = "kd"
            given["weight"] = given["weight"].mT

    _let(patch, "weight_hessian", change)


@saboteur(CHAPTER)
def fit_appends_to_its_history(patch):
    """The history of a fit begins with that of the fit before."""
    known = softmaxlib.SoftmaxRegression.fit

    def wrong(self, *arguments, **options):
        before = list(self.history)
        known(self, *arguments, **options)
        self.history[:0] = before
        return self

    replace(patch, "SoftmaxRegression.fit", wrong)


@saboteur(CHAPTER)
def predicts_over_dimension_one(patch):
    """Takes the arg max over the second dimension, as of a matrix."""

    def wrong(self, x):
        z = self.forward(x)
        return z.argmax(min(1, z.ndim - 1))

    replace(patch, "SoftmaxRegression.predict", wrong)


@saboteur(CHAPTER)
def probabilities_over_dimension_one(patch):
    """Takes the softmax over the second dimension, as of a matrix."""

    def wrong(self, x):
        z = self.forward(x)
        return torch.softmax(z, min(1, z.ndim - 1))

    replace(patch, "SoftmaxRegression.predict_proba", wrong)


# --- refusals ------------------------------------------------------------


@saboteur(CHAPTER)
def dimensions_wrap_around(patch):
    """A dimension out of range counts from the front again."""

    def wrong(function, dim, ndim):
        return int(dim) % max(ndim, 1)

    check(patch, "dimension", wrong)


@saboteur(CHAPTER)
def temperatures_of_any_sign(patch):
    """A negative temperature counts as a positive one."""
    check(patch, "temperature", lambda function, value: abs(float(value)))


@saboteur(CHAPTER)
def any_reduction_will_do(patch):
    """A reduction that does not exist counts as the sum."""
    check(patch, "choice", lambda *arguments: None)
