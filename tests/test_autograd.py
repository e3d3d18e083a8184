"""What PyTorch keeps to itself, and the dispatcher relies on.

Each private name is used for what it says. A name that goes away raises
AttributeError here; one that changes its meaning fails its test, which says
what the dispatcher would no longer notice.
"""

import ast
import pathlib

import pytest
import torch
from drawn import randn
from test_house import DISPATCHER, TREES, docstrings, foreign_secrets
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import softmaxlib
from softmaxlib import _autograd, softmax


def seen(transform):
    """The routes that `route` chooses inside a transform."""
    routes = []

    def function(x):
        routes.append(_autograd.route(x))
        return x * 2

    transform(function)
    return set(routes)


def test_a_plain_call_takes_the_kernel():
    assert seen(lambda f: f(randn(3))) == {"kernel"}
    assert seen(lambda f: f(torch.nn.Parameter(randn(3)))) == {"watched"}
    with torch.no_grad():
        parameter = torch.nn.Parameter(randn(3))
        assert seen(lambda f: f(parameter)) == {"kernel"}


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(f)(randn(2, 3)),
        lambda f: torch.func.grad(lambda x: f(x).sum())(randn(3)),
        lambda f: torch.func.jacrev(f)(randn(3)),
        lambda f: torch.func.jacfwd(f)(randn(3)),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(randn(3)),
        # Constants of a transform are not wrapped.
        lambda f: torch.func.vmap(lambda _: f(torch.ones(3)))(randn(2)),
    ],
    ids=["vmap", "grad", "jacrev", "jacfwd", "hessian", "constant"],
)
def test_functorch_transforms_are_watched(transform):
    """torch._C._are_functorch_transforms_active."""
    assert seen(transform) == {"watched"}


def test_forward_mode_is_watched():
    """forward_ad._current_level."""
    x = randn(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert _autograd.route(dual) == "watched"
        assert _autograd.has_derivatives(dual)
        assert not _autograd.has_derivatives(x)
    assert _autograd.route(x) == "kernel"
    assert not _autograd.has_derivatives(x)


def test_batches_behind_our_back_are_plain():
    """torch._C._functorch.is_legacy_batchedtensor."""
    routes = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, c):
            routes.append(_autograd.route(c))
            return 2 * c

    x = randn(3).requires_grad_()
    (jacobian,) = torch.autograd.grad(
        Double.apply(x), x, torch.eye(3).double(), is_grads_batched=True
    )
    assert torch.equal(jacobian, 2 * torch.eye(3).double())
    assert routes == ["plain"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_trace_is_refused():
    """torch._C._is_tracing."""
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would"):
        torch.jit.trace(lambda x: softmax(x, 0), randn(3))


def test_a_wrapped_tensor_is_known():
    """torch._C._functorch.is_functorch_wrapped_tensor."""
    x, wrapped = randn(2, 3), []

    def function(row):
        wrapped.append(_autograd.is_wrapped(row))
        return row

    torch.func.vmap(function)(x)
    torch.func.grad(lambda row: function(row).sum())(x)
    assert wrapped == [True, True]
    assert not _autograd.is_wrapped(x)


def test_a_tensor_without_values_is_known():
    """torch._subclasses.FakeTensor."""
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(randn(3))
    assert isinstance(fake, FakeTensor)
    for x in (fake, randn(3).to("meta")):
        assert _autograd.is_shape_only(x)
        assert _autograd.route(x) == "plain"
    assert not _autograd.is_shape_only(randn(3))


def test_autocast_is_known():
    """torch._C._is_any_autocast_enabled."""
    x = randn(2, 3).bfloat16()
    assert _autograd.autocast_dtype("softmax", x) is None
    with torch.autocast("cpu"):
        peer = torch.softmax(x, 1)
        assert _autograd.autocast_dtype("softmax", x) == peer.dtype
        with _autograd.exactly(x):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_a_second_forward_derivative_is_no_silent_zero(name):
    """forward_ad._set_fwd_grad_enabled."""
    x, v = randn(4), randn(4, seed=1)

    def along(function):
        return lambda x: torch.func.jvp(function, (x,), (v,))[1]

    ours, peer = getattr(softmaxlib, name), getattr(torch, name)
    found = along(along(lambda x: ours(x, 0)))(x)
    expected = along(along(lambda x: peer(x, 0)))(x)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_draw_knows_that_it_is_batched():
    """torch._C._functorch.is_batchedtensor, get_unwrapped."""
    refused = []

    def function(x):
        with pytest.raises(RuntimeError, match=r"torch\.vmap"):
            _autograd.refuse_batches("sample", x)
        refused.append(x)
        return x

    def inside(x):
        return torch.func.grad(lambda y: function(y).sum())(x)

    torch.func.vmap(function)(randn(2, 3))
    torch.func.vmap(inside)(randn(2, 3))
    assert len(refused) == 2
    _autograd.refuse_batches("sample", randn(3))


def test_every_private_name_has_its_test():
    """Those of the dispatcher; its tests name them where this stands."""
    private = foreign_secrets(TREES[DISPATCHER])
    here = ast.parse(pathlib.Path(__file__).read_text(encoding="utf-8"))
    said = " ".join(text.value for text in docstrings(here))
    for name in private:
        longer = any(other.startswith(f"{name}.") for other in private)
        assert longer or name.rpartition(".")[2] in said, name
