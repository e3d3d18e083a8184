"""softmaxlib.regression: derivatives in the weights, and the model."""

import itertools

import pytest
import torch
from drawn import generator, randn
from torch import func
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as peer

from softmaxlib import _blocks, regression

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
            regression.SoftmaxRegression(*arguments)
    with pytest.raises(ValueError, match=r"penalty.*-1"):
        regression.SoftmaxRegression(2, 3, penalty=-1)


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
    model = regression.SoftmaxRegression(
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
        model = regression.SoftmaxRegression(
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
    hard = regression.SoftmaxRegression(D, 3, dtype=x.dtype)
    hard.fit(x, target)
    model = regression.SoftmaxRegression(D, 3, dtype=x.dtype).fit(x, soft)
    same(model.weight.detach(), hard.weight.detach(), 1e-6)
    p = model.predict_proba(x)
    assert p.shape == (120, 3)
    assert (p.sum(1) - 1).abs().max() < 1e-14
    assert torch.equal(model.predict(x), p.argmax(1))
    assert (model.predict(x) == target).double().mean() > 0.6
    assert model(x[0]).shape == (3,)
    assert "penalty=0.0" in repr(model)


def test_separable_classes_stop_without_a_minimum():
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    target = torch.tensor([0, 0, 1, 1])
    model = regression.SoftmaxRegression(1, 2)
    model.fit(x, target, max_iterations=5, tolerance=0.0)
    assert not model.converged
    assert len(model.history) == 6
    assert torch.equal(model.predict(x), target)
    longer = regression.SoftmaxRegression(1, 2).fit(x, target)
    assert longer.weight.norm() > model.weight.norm()


def test_a_model_trains_like_any_layer():
    x, target = noisy()
    model = regression.SoftmaxRegression(D, 3, dtype=x.dtype)
    peer.cross_entropy(model(x), target).backward()
    got = regression.weight_gradient(
        x, model.weight.detach(), target, model.bias.detach()
    )
    same(got[0], model.weight.grad)
    same(got[1], model.bias.grad)
    assert set(model.state_dict()) == {"weight", "bias"}
