"""softmaxlib.regression and softmaxlib.training: the model and its fit."""

import copy
import functools
import itertools
import math
import pickle
import sys
import types
import warnings

import pytest
import torch
from drawn import generator, randn
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import func
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as peer

from softmaxlib import _blocks, regression, training

D, K = 4, 5


def case(*batch, soft=False, dtype=torch.float64):
    """Samples, weight, bias and target."""
    x, weight, bias = (
        randn(*batch, D),
        randn(K, D, seed=1),
        randn(K, seed=2),
    )
    if soft:
        target = randn(*batch, K, seed=3).exp().to(dtype)
    else:
        target = torch.randint(K, batch, generator=generator(3))
    return x.to(dtype), weight.to(dtype), bias.to(dtype), target


def objective(x, target, reduction):
    """The loss as PyTorch has it, a function of weight and bias."""
    flat = x.reshape(-1, D)
    width = () if target.dtype == torch.int64 else (K,)
    rows = target.reshape(-1, *width)

    def value(weight, bias):
        z = peer.linear(flat, weight, bias)
        return peer.cross_entropy(z, rows, reduction=reduction)

    return value


def same(ours, theirs, bound=1e-12):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


BATCHES = ((), (1,), (7,), (2, 3), (1, 1, 2))
REDUCTIONS = ("mean", "sum")


# --- values --------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_gradient_as_autograd(batch, reduction, soft):
    x, weight, bias, target = case(*batch, soft=soft)
    value = objective(x, target, reduction)
    expected = func.grad(value, (0, 1))(weight, bias)
    options = {"reduction": reduction}
    got = regression.weight_gradient(x, weight, target, bias, **options)
    same(got[0], expected[0])
    same(got[1], expected[1])
    got = regression.weight_gradient(
        x, weight.T, target, bias, layout="dk", **options
    )
    same(got[0], expected[0].T)
    same(got[1], expected[1])
    expected = func.grad(value)(weight, None)
    got = regression.weight_gradient(x, weight, target, **options)
    same(got[0], expected)
    assert got[1] is None


def test_gradient_of_linear_has_its_shape():
    x, _, _, target = case(6, dtype=torch.float32)
    layer = torch.nn.Linear(D, K)
    peer.cross_entropy(layer(x), target).backward()
    with torch.no_grad():
        weight, bias = regression.weight_gradient(
            x, layer.weight, target, layer.bias
        )
    same(weight, layer.weight.grad, 1e-5)
    same(bias, layer.bias.grad, 1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hvp_as_autograd(batch, reduction):
    x, weight, bias, target = case(*batch)
    direction, turn = randn(K, D, seed=5), randn(K, seed=6)
    value = objective(x, target, reduction)
    options = {"reduction": reduction}

    def expected(*parts):
        gradient = func.grad(value, (0, 1))
        return func.jvp(gradient, (weight, bias), parts)[1]

    pair = expected(direction, turn)
    got = regression.weight_hvp(
        x, weight, direction, bias, bias_direction=turn, **options
    )
    for a, b in zip(got, pair, strict=True):
        same(a, b)
    got = regression.weight_hvp(
        x,
        weight.T,
        direction.T,
        bias,
        bias_direction=turn,
        layout="dk",
        **options,
    )
    same(got[0], pair[0].T)
    same(got[1], pair[1])
    pair = expected(direction, torch.zeros_like(bias))
    got = regression.weight_hvp(x, weight, direction, bias, **options)
    for a, b in zip(got, pair, strict=True):
        same(a, b)
    assert regression.weight_hvp(x, weight, direction)[1] is None


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_hessian_as_autograd_in_both_layouts(batch, reduction, with_bias):
    x, weight, bias, target = case(*batch)
    bias = bias if with_bias else None
    value = objective(x, target, reduction)
    options = {"reduction": reduction}
    expected = func.hessian(lambda w: value(w.view(K, D), bias))(
        weight.flatten()
    )
    same(regression.weight_hessian(x, weight, bias, **options), expected)
    expected = func.hessian(lambda w: value(w.view(D, K).T, bias))(
        weight.T.flatten()
    )
    got = regression.weight_hessian(
        x, weight.T, bias, layout="dk", **options
    )
    same(got, expected)


def test_hessian_is_the_product_and_has_its_rank():
    x, weight, bias, _ = case(30)
    hessian = regression.weight_hessian(x, weight, bias)
    direction = randn(K, D, seed=5)
    got, _ = regression.weight_hvp(x, weight, direction, bias)
    same(hessian @ direction.flatten(), got.flatten())
    assert (hessian - hessian.T).abs().max() < 1e-16
    values = torch.linalg.eigvalsh(hessian)
    assert (values > 1e-10).sum() == (K - 1) * D
    assert values.min() > -1e-15
    # One vector added to all rows of the weight changes nothing.
    one = torch.ones(K, 1, dtype=x.dtype) @ randn(1, D, seed=8)
    assert (hessian @ one.flatten()).abs().max() < 1e-15
    gradient, _ = regression.weight_gradient(
        x, weight, torch.zeros(30, dtype=torch.long)
    )
    assert gradient.sum(0).abs().max() < 1e-15


def test_confident_samples_keep_their_digits():
    x = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[300.0], [0.0], [0.0]], dtype=torch.float64)
    tail = torch.exp(torch.tensor(-300.0, dtype=torch.float64))
    gradient, _ = regression.weight_gradient(x, weight, torch.tensor([0]))
    expected = torch.stack([-2 * tail, tail, tail])[:, None]
    same(gradient, expected)
    hessian = regression.weight_hessian(x, weight)
    same(hessian.diagonal(), expected[:, 0].abs())
    direction = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    product, _ = regression.weight_hvp(x, weight, direction)
    same(product, expected * torch.tensor([[-1.0], [-1.0], [-1.0]]))


def test_blocks_do_not_matter(monkeypatch):
    x, weight, bias, target = case(11)
    direction, turn = randn(K, D, seed=5), randn(K, seed=6)

    def everything():
        return (
            *regression.weight_gradient(x, weight, target, bias),
            *regression.weight_hvp(
                x, weight, direction, bias, bias_direction=turn
            ),
            regression.weight_hessian(x, weight, bias),
        )

    whole = everything()
    for size in (1, K, 3 * K - 1, 250 * K):
        monkeypatch.setattr(_blocks, "SIZE", size)
        for a, b in zip(everything(), whole, strict=True):
            same(a, b, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    x, weight, bias, target = case(50, dtype=dtype)
    wide = x.float(), weight.float(), target, bias.float()
    got = regression.weight_gradient(x, weight, target, bias)
    for a, b in zip(got, regression.weight_gradient(*wide), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))
    hessian = regression.weight_hessian(x, weight, bias)
    assert hessian.dtype == dtype


def test_no_samples():
    x, weight, bias, target = case(0)
    total = {"reduction": "sum"}
    for part in regression.weight_gradient(x, weight, target, bias):
        assert part.isnan().all()
    for part in regression.weight_gradient(
        x, weight, target, bias, **total
    ):
        assert not part.any()
    assert not regression.weight_hessian(x, weight, bias, **total).any()
    assert not regression.weight_hvp(x, weight, weight, **total)[0].any()


# --- autograd ------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kd", "dk"])
def test_gradcheck(layout):
    x, weight, bias, _ = case(2)
    x, weight, bias = x[:, :2], weight[:3, :2], bias[:3]
    if layout == "dk":
        weight = weight.T
    target = torch.tensor([2, 0])
    soft = torch.rand(2, 3, dtype=x.dtype, generator=generator())
    direction, turn = weight.cos(), bias.cos()
    functions = (
        (
            lambda x, w, b: regression.weight_gradient(
                x, w, target, b, layout=layout
            ),
            (x, weight, bias),
        ),
        (
            lambda x, w, b, y: regression.weight_gradient(
                x, w, y, b, layout=layout
            ),
            (x, weight, bias, soft),
        ),
        (
            lambda x, w, b, v, t: regression.weight_hvp(
                x, w, v, b, bias_direction=t, layout=layout
            ),
            (x, weight, bias, direction, turn),
        ),
        (
            lambda x, w, b: regression.weight_hessian(
                x, w, b, layout=layout
            ),
            (x, weight, bias),
        ),
    )
    for function, inputs in functions:
        inputs = [t.clone().requires_grad_() for t in inputs]
        gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True
        )
    gradgradcheck(functions[0][0], inputs)


def test_only_one_input_requires_grad():
    x, weight, bias, target = case(3)
    for which in range(3):
        tensors = [x, weight, bias]
        tensors[which] = tensors[which].clone().requires_grad_()
        got = regression.weight_gradient(
            tensors[0], tensors[1], target, tensors[2]
        )
        assert got[0].requires_grad
        plain = regression.weight_gradient(x, weight, target, bias)
        same(got[0].detach(), plain[0])


def test_vmap_over_models():
    x, weight, bias, target = case(6)
    weights = torch.stack([weight, weight.sin(), weight * 2])
    for function in (
        lambda w: regression.weight_gradient(x, w, target, bias)[0],
        lambda w: regression.weight_hvp(x, w, weight, bias)[0],
        lambda w: regression.weight_hessian(x, w, bias),
    ):
        each = torch.stack([function(w) for w in weights])
        same(func.vmap(function)(weights), each)


def test_compiled_in_one_graph():
    x, weight, bias, target = case(6)

    def everything(weight):
        return (
            regression.weight_gradient(x, weight, target, bias)[0]
            + regression.weight_hvp(x, weight, weight, bias)[0]
        )

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    same(compiled(weight), everything(weight))


# --- errors --------------------------------------------------------------


def test_errors():
    x, weight, bias, target = case(3)
    gradient = regression.weight_gradient
    for wrong in (-100, -1, K):
        with pytest.raises(IndexError, match=f"got {wrong}"):
            gradient(x, weight, torch.tensor([0, 1, wrong]))
    with pytest.raises(ValueError, match=r"layout.*'nn'"):
        gradient(x, weight, target, layout="nn")
    with pytest.raises(ValueError, match=r"reduction.*'none'"):
        gradient(x, weight, target, reduction="none")
    with pytest.raises(RuntimeError, match=r"\(K, D\).*D = 4.*\(4, 5\)"):
        gradient(x, weight.T, target)
    with pytest.raises(RuntimeError, match=r"\(D, K\).*\(5, 4\)"):
        gradient(x, weight, target, layout="dk")
    with pytest.raises(RuntimeError, match=r"bias.*\(5,\), got \(4,\)"):
        gradient(x, weight, target, bias[:4])
    with pytest.raises(RuntimeError, match=r"target.*\(3,\).*got \(2,\)"):
        gradient(x, weight, target[:2])
    with pytest.raises(
        RuntimeError, match=r"target.*\(3, 5\), got \(3, 4\)"
    ):
        gradient(x, weight, x)
    with pytest.raises(RuntimeError, match="weight.*float64.*float32"):
        gradient(x, weight.float(), target)
    with pytest.raises(RuntimeError, match="0-d"):
        gradient(x[0, 0], weight, target)
    with pytest.raises(NotImplementedError, match="int64"):
        gradient(x.long(), weight, target)
    with pytest.raises(TypeError, match="target"):
        gradient(x, weight, [0, 1, 2])
    with pytest.raises(RuntimeError, match="bias_direction"):
        regression.weight_hvp(x, weight, weight, bias_direction=bias)
    with pytest.raises(RuntimeError, match="direction"):
        regression.weight_hvp(x, weight, weight.T)
    for arguments in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            training.SoftmaxRegression(*arguments)
    with pytest.raises(ValueError, match=r"penalty.*-1"):
        training.SoftmaxRegression(2, 3, penalty=-1)


# --- the model -----------------------------------------------------------


def noisy(samples=120, dtype=torch.float64):
    x = randn(samples, D, dtype=dtype)
    scores = x @ randn(D, 3, seed=1, dtype=dtype)
    target = (scores + randn(samples, 3, seed=2, dtype=dtype)).argmax(1)
    return x, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_fit_finds_the_minimum(dtype, bias, penalty):
    x, target = noisy(dtype=dtype)
    model = training.SoftmaxRegression(
        D, 3, bias=bias, penalty=penalty, dtype=dtype
    )
    assert model.fit(x, target) is model
    assert model.converged
    assert len(model.history) < 15
    slack = 1e-6 if dtype == torch.float32 else 1e-15
    assert all(b <= a + slack for a, b in itertools.pairwise(model.history))
    value = peer.cross_entropy(model(x), target)
    value = value + penalty / 2 * model.weight.square().sum()
    assert abs(value.item() - model.history[-1]) < 1e-5
    value.backward()
    bound = 1e-5 if dtype == torch.float32 else 1e-9
    for parameter in model.parameters():
        assert parameter.grad.abs().max() < bound
    if penalty:
        # The penalty fixes the gauge.
        assert model.weight.sum(0).abs().max() < 100 * bound


def test_fit_does_not_depend_on_the_start():
    x, target = noisy()
    models = []
    for seed in (None, 5):
        model = training.SoftmaxRegression(
            D, 3, penalty=0.01, dtype=torch.float64
        )
        if seed is not None:
            with torch.no_grad():
                model.weight.copy_(randn(3, D, seed=seed))
                model.bias.copy_(randn(3, seed=seed))
        models.append(model.fit(x, target))
    same(models[0].weight.detach(), models[1].weight.detach(), 1e-6)
    centred = [m.bias.detach() - m.bias.detach().mean() for m in models]
    same(*centred, 1e-6)


def test_distributions_as_targets_and_predictions():
    x, target = noisy()
    soft = peer.one_hot(target, 3).double()
    hard = training.SoftmaxRegression(D, 3, dtype=x.dtype)
    hard.fit(x, target)
    model = training.SoftmaxRegression(D, 3, dtype=x.dtype).fit(x, soft)
    same(model.weight.detach(), hard.weight.detach(), 1e-6)
    p = model.predict_proba(x)
    assert p.shape == (120, 3)
    assert (p.sum(1) - 1).abs().max() < 1e-14
    assert torch.equal(model.predict(x), p.argmax(1))
    assert (model.predict(x) == target).double().mean() > 0.6
    assert model(x[0]).shape == (3,)
    assert "penalty=0.0" in repr(model)


def model_of(x, classes=3, **options):
    return training.SoftmaxRegression(
        x.shape[-1], classes, dtype=x.dtype, **options
    )


def slopes(model, x, target, **options):
    """The gradient of the objective, by autograd."""
    value = peer.cross_entropy(model(x), target, **options)
    value = value + model.penalty / 2 * model.weight.square().sum()
    return torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize(
    "load", [load_digits, load_wine, load_breast_cancer]
)
@pytest.mark.parametrize("C", [0.1, 1.0])
def test_the_optimum_of_scikit_learn(load, C):
    x, y = load(return_X_y=True)
    x = x / 16 if load is load_digits else StandardScaler().fit_transform(x)
    classes = y.max() + 1
    known = LogisticRegression(C=C, solver="newton-cg", tol=1e-10)
    known.fit(x, y)
    W, b = torch.tensor(known.coef_), torch.tensor(known.intercept_)
    if classes == 2:  # one vector w stands for -w/2 and w/2
        W, b = torch.cat([-W, W]) / 2, torch.cat([-b, b]) / 2
    x, y = torch.tensor(x), torch.tensor(y)
    penalty = (2 if classes == 2 else 1) / (C * len(y))
    model = model_of(x, classes, penalty=penalty).fit(x, y)
    theirs = peer.cross_entropy(x @ W.T + b, y)
    theirs = theirs + penalty / 2 * W.square().sum()
    # What the book promises; measured 4e-15.
    assert abs(theirs.item() / model.history[-1] - 1) < 1e-9
    assert (model.weight - W).abs().max() < 1e-5
    assert model.converged
    assert len(model.history) < 14


def test_class_weights_count_samples():
    x, target = noisy()
    weight = torch.tensor([2.0, 3.0, 1.0], dtype=x.dtype)
    model = model_of(x, penalty=0.05)
    model.fit(x, target, class_weight=weight)
    for g in slopes(model, x, target, weight=weight):
        assert g.abs().max() < 1e-9
    often = weight.long()[target]
    x, target = (t.repeat_interleave(often, 0) for t in (x, target))
    other = model_of(x, penalty=0.05).fit(x, target)
    same(model.weight.detach(), other.weight.detach(), 1e-6)
    assert model.history[0] == pytest.approx(math.log(3), rel=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
def test_distributions_of_any_sum_and_weight(weighted):
    x, target = noisy()
    soft = peer.one_hot(target, 3).to(x.dtype) + randn(120, 3, seed=7).exp()
    weight = torch.tensor([2.0, 0.5, 1.0], dtype=x.dtype)
    weight = weight if weighted else None
    model = model_of(x, penalty=0.01)
    model.fit(x, soft, class_weight=weight)
    assert model.converged
    assert len(model.history) < 10  # its curvature is right
    for g in slopes(model, x, soft, weight=weight):
        assert g.abs().max() < 1e-9


def separable(dtype=torch.float32):
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=dtype)
    return x, torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separable_classes_stop_without_a_minimum(soft, dtype):
    x, target = separable(dtype)
    y = peer.one_hot(target, 2).to(dtype) if soft else target
    model = model_of(x, 2)
    for _ in range(2):  # each fit makes at least a step
        size = model.weight.norm()
        with pytest.warns(training.ConvergenceWarning, match="right side"):
            model.fit(x, y)
        assert not model.converged
        assert torch.equal(model.predict(x), target)
        assert len(model.history) == 2
        assert model.history[1] < model.history[0]
        assert model.weight.norm() > size
    assert model_of(x, 2, penalty=1e-3).fit(x, y).converged


def test_classes_that_separate_are_not_seen_where_some_sample_is_wrong():
    x, target = separable(torch.float64)
    x, target = torch.cat([x, x[:1]]), torch.cat([target, target[-1:]])
    assert model_of(x, 2).fit(x, target).converged
    # Unless it counts for nothing.
    weight = torch.tensor([1.0, 1.0, 0.0], dtype=x.dtype)
    target[-1] = 2
    model = model_of(x, bias=False)
    with pytest.warns(training.ConvergenceWarning, match="right side"):
        model.fit(x, target, class_weight=weight)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_class_that_never_occurs_has_no_minimum(penalty):
    x, target = noisy()
    model = model_of(x, 4, penalty=penalty)
    with pytest.warns(training.ConvergenceWarning, match="no minimiser"):
        model.fit(x, target)
    assert not model.converged
    assert model.bias.argmin() == 3
    # Without its bias a penalty holds it.
    assert model_of(x, 4, penalty=0.1, bias=False).fit(x, target).converged


def test_samples_on_the_border_leave_no_minimum():
    # Separable but for the two at 0, which have both labels.
    x = torch.tensor([[-1.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    target = torch.tensor([0, 0, 1, 1])
    model = model_of(x, 2)
    for _ in range(2):
        with pytest.warns(
            training.ConvergenceWarning, match="no minimiser"
        ):
            model.fit(x, target)
        assert not model.converged


def test_too_few_steps_are_said_to_be_too_few():
    x, target = noisy()
    model = model_of(x)
    for steps in (0, 1):
        with pytest.warns(
            training.ConvergenceWarning, match=f"{steps} steps leave"
        ) as seen:
            model.fit(x, target, max_iterations=steps)
        assert seen[0].filename == __file__
        assert not model.converged
        assert len(model.history) == steps + 1
    with pytest.warns(training.ConvergenceWarning, match="lowers|steps"):
        model.fit(x, target, tolerance=0.0)
    assert not model.converged


def test_what_is_not_finite_is_said_and_changes_nothing():
    x, target = noisy()
    x[3, 1] = math.nan
    model = model_of(x)
    with pytest.warns(training.ConvergenceWarning, match="nan"):
        model.fit(x, target)
    with pytest.warns(training.ConvergenceWarning, match="nan"):
        model.fit(x[4:], target[4:], class_weight=torch.zeros(3))
    with pytest.raises(ValueError, match="samples"):
        model.fit(x[:0], target[:0])
    assert not model.weight.any()
    assert not model.converged


def test_one_class_is_fitted_already():
    x = randn(5, D)
    model = model_of(x, 1).fit(x, torch.zeros(5, dtype=torch.long))
    assert model.converged
    assert model.history[-1] == 0


@pytest.mark.parametrize("small", [0, 64])
@pytest.mark.parametrize("samples", [8, 120])
@pytest.mark.parametrize("bias", [True, False])
def test_every_preconditioner_finds_the_minimum(
    monkeypatch, small, samples, bias
):
    # 12 or 15 parameters: more than the samples or fewer.
    monkeypatch.setattr(training, "_SMALL", small)
    x, target = noisy(samples)
    x = x * torch.tensor([1.0, 1e-3, 10.0, 1.0], dtype=x.dtype)
    target[:3] = torch.arange(3)
    model = model_of(x, penalty=1e-2, bias=bias).fit(x, target)
    assert model.converged
    for g in slopes(model, x, target):
        assert g.abs().max() < 1e-9


@pytest.mark.parametrize("small", [0, 64])
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_a_common_vector_of_the_rows_is_left_to_the_penalty(
    monkeypatch, small, penalty
):
    monkeypatch.setattr(training, "_SMALL", small)
    x, target = noisy()
    model = model_of(x, penalty=penalty)
    with torch.no_grad():
        model.weight.copy_(randn(3, D, seed=5) + 3)
    start = model.weight.sum(0)
    # What is left is at most K tolerances, over the penalty.
    model.fit(x, target, tolerance=1e-12)
    assert model.converged
    if penalty:
        assert model.weight.sum(0).abs().max() < 3e-10
    else:
        # Entries below 6, a dozen steps.
        assert (model.weight.sum(0) - start).abs().max() < 1e-13


def test_a_second_fit_goes_on_where_the_first_stopped():
    x, target = noisy()
    whole = model_of(x, penalty=0.01).fit(x, target)
    model = model_of(x, penalty=0.01)
    losses = []
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", training.ConvergenceWarning)
            model.fit(x, target, max_iterations=1)
        losses += model.history[:-1]
    assert losses == pytest.approx(whole.history[:4], rel=1e-12)
    # A state dict is all that another model needs.
    other = model_of(x, penalty=0.01)
    other.load_state_dict(whole.state_dict())
    other.fit(x, target)
    assert len(other.history) <= 3
    assert other.history[0] == pytest.approx(whole.history[-1], rel=1e-14)
    # At the minimum it stays.
    same(other.weight.detach(), whole.weight.detach(), 1e-9)


def test_a_model_keeps_what_it_knows_on_its_way():
    x, target = noisy()
    model = model_of(x, penalty=0.02).fit(x, target)
    for moved in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).to(torch.float32),
    ):
        assert moved.history == model.history
        assert moved.converged
        assert moved.penalty == 0.02
        bound = 1e-5 if moved.weight.dtype == torch.float32 else 1e-15
        same(moved.weight.detach().double(), model.weight.detach(), bound)
    moved = model.to(torch.float32).fit(x.float(), target)
    assert moved.converged
    assert moved.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)],
)
def test_fit_in_other_formats(dtype, bound):
    x, target = noisy()
    x = x.to(dtype)
    exact = model_of(x.double(), penalty=0.05).fit(x.double(), target)
    model = model_of(x, penalty=0.05).fit(x, target)
    assert model.converged
    assert model.weight.dtype == dtype
    # Halves are rounded once, by 2**-9 and 2**-12 of their size.
    same(model.weight.detach().double(), exact.weight.detach(), bound)
    again = model_of(x, penalty=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again.fit(x, target)
    assert torch.equal(again.weight, model.weight)


def test_shapes_and_integers_of_samples():
    x, target = noisy()
    model = model_of(x, penalty=0.05).fit(x, target)
    other = model_of(x, penalty=0.05)
    other.fit(x.view(4, 30, D), target.view(4, 30).to(torch.uint8))
    assert torch.equal(other.weight, model.weight)


def test_a_fit_at_the_minimum_stays_there():
    # Where softmax sees nothing, one number added to all biases, rounding
    # decides on the step.
    x, target = noisy()
    model = model_of(x, penalty=0.02).fit(x, target, tolerance=1e-10)
    for _ in range(5):
        before = [p.detach().clone() for p in model.parameters()]
        model.fit(x, target, tolerance=1e-10)
        assert model.bias.sum().abs().item() < 1e-10
        for old, new in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-9)


class Bar:
    """What the fit asks of tqdm."""

    made = ()

    def __init__(self, steps, **options):
        self.steps, self.options, self.seen = steps, options, []
        Bar.made += (self,)

    def __iter__(self):
        return iter(self.steps)

    def set_postfix(self, **values):
        self.seen.append(values)
        if len(self.seen) == self.options.get("stop"):
            raise KeyboardInterrupt


def test_progress_is_shown_when_asked_for(monkeypatch):
    module = types.ModuleType("tqdm")
    module.tqdm = Bar
    monkeypatch.setattr(Bar, "made", ())
    monkeypatch.setitem(sys.modules, "tqdm", module)
    x, target = noisy()
    model = model_of(x, penalty=0.01)
    model.fit(x, target)
    assert Bar.made == ()
    quiet = model.history
    model = model_of(x, penalty=0.01).fit(x, target, progress=True)
    (bar,) = Bar.made
    assert len(bar.seen) == len(model.history) - 1
    assert model.history == quiet
    # An interrupted fit keeps what it has reached.
    module.tqdm = functools.partial(Bar, stop=3)
    other = model_of(x, penalty=0.01)
    with pytest.raises(KeyboardInterrupt):
        other.fit(x, target, progress=True)
    assert other.history == quiet[:4]
    value = peer.cross_entropy(other(x), target)
    value = value + 0.005 * other.weight.square().sum()
    assert value.item() == pytest.approx(quiet[3], rel=1e-14)


def test_the_bar_counts_the_steps(capsys):
    x, target = noisy()
    model = model_of(x, penalty=0.01).fit(x, target, progress=True)
    shown = capsys.readouterr()
    assert "gradient=" in shown.err
    assert "/100" in shown.err
    assert model.converged
    assert shown.out == ""


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    x, target = noisy()
    model = model_of(x)
    with pytest.raises(ImportError, match=r"progress.*the package tqdm"):
        model.fit(x, target, progress=True)
    assert not model.weight.any()


def test_errors_of_the_model():
    x, target = noisy()
    model = model_of(x)
    weight = torch.ones(3, dtype=x.dtype)
    for error, words, options in (
        (TypeError, "class_weight.*Tensor", {"class_weight": [1, 1, 1]}),
        (
            RuntimeError,
            r"class_weight.*\(3,\)",
            {"class_weight": weight[:2]},
        ),
        (ValueError, "class_weight.*-1", {"class_weight": -weight}),
        (ValueError, "class_weight.*nan", {"class_weight": weight / 0 * 0}),
        (TypeError, "max_iterations", {"max_iterations": 1.5}),
        (ValueError, "max_iterations", {"max_iterations": -1}),
        (ValueError, "tolerance.*-1", {"tolerance": -1.0}),
        (TypeError, "progress", {"progress": 1}),
    ):
        with pytest.raises(error, match=words):
            model.fit(x, target, **options)
    with pytest.raises(IndexError, match="got 3"):
        model.fit(x, target + 1)
    with pytest.raises(RuntimeError, match="float32"):
        model.fit(x.float(), target)
    with pytest.raises(RuntimeError, match="target"):
        model.fit(x, target[:-1])


def test_a_model_trains_like_any_layer():
    x, target = noisy()
    model = training.SoftmaxRegression(D, 3, dtype=x.dtype)
    peer.cross_entropy(model(x), target).backward()
    got = regression.weight_gradient(
        x, model.weight.detach(), target, model.bias.detach()
    )
    same(got[0], model.weight.grad)
    same(got[1], model.bias.grad)
    assert set(model.state_dict()) == {"weight", "bias"}
