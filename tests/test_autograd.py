"""What PyTorch keeps to itself, and the library asks all the same.

One test for each private name in `softmaxlib/_autograd.py`: it notices when
the name goes away, or no longer means what the library takes it to mean.
"""

import pathlib
import re
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import softmaxlib
from softmaxlib import _autograd, _kernels

functorch = torch._C._functorch
PACKAGE = pathlib.Path(softmaxlib.__file__).parent
# Each is tested below.
KNOWN = {
    "torch._C._is_tracing",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch",
    "torch._C._is_any_autocast_enabled",
    "torch._softmax_backward_data",
    "torch._subclasses.FakeTensor",
    "forward_ad._current_level",
    "forward_ad._set_fwd_grad_enabled",
    "functorch.get_unwrapped",
    "functorch.is_batchedtensor",
    "functorch.is_functorch_wrapped_tensor",
    "functorch.is_legacy_batchedtensor",
}


def seen(ask):
    """What `ask` answers in each state of functorch and autograd."""
    x = torch.ones(2)
    found = {"outside": ask(x)}

    def inside(name):
        def function(x):
            found[name] = ask(x)
            return x.sum()

        return function

    torch.vmap(inside("vmap"))(x[None])
    torch.func.grad(inside("grad"))(x)
    torch.func.jvp(inside("jvp"), (x,), (x,))
    with forward_ad.dual_level():
        found["level"] = ask(x)
        found["dual"] = ask(forward_ad.make_dual(x, x))
    found["after"] = ask(x)
    return found


def private_names(path):
    """`torch._...`, `forward_ad._...` and what `_functorch` has."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"#.*", "", text)
    names = re.findall(r"\b(torch\._C\.\w+|torch\._\w+(?:\.\w+)?)", text)
    names += re.findall(r"\bforward_ad\._\w+", text)
    names += [
        f"functorch.{name}"
        for name in re.findall(r"\b_?functorch\.(\w+)", text)
    ]
    return set(names)


def test_no_private_name_is_without_a_test():
    assert private_names(PACKAGE / "_autograd.py") == KNOWN
    others = set()
    for path in PACKAGE.glob("*.py"):
        if path.name != "_autograd.py":
            others |= private_names(path)
    assert others == set()


def test_is_tracing():
    found = [torch._C._is_tracing()]

    def function(x):
        found.append(torch._C._is_tracing())
        return x + 1

    torch.jit.trace(function, (torch.ones(2),), check_trace=False)
    found.append(torch._C._is_tracing())
    assert found == [False, True, False]


def test_functorch_transforms_are_seen():
    ask = torch._C._are_functorch_transforms_active
    found = seen(lambda x: ask())
    assert [name for name in found if found[name]] == [
        "vmap",
        "grad",
        "jvp",
    ]


def test_the_level_of_forward_mode():
    found = seen(lambda x: forward_ad._current_level >= 0)
    inside = ["jvp", "level", "dual"]
    assert [name for name in found if found[name]] == inside


def test_forward_mode_is_switched_on_inside_jvp():
    """PyTorch runs the rule with forward mode off."""
    found = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            found.append(forward_ad._is_fwd_grad_enabled())
            with forward_ad._set_fwd_grad_enabled(True):
                found.append(forward_ad._is_fwd_grad_enabled())
            found.append(forward_ad._is_fwd_grad_enabled())
            return x * tangent

    x = torch.ones(2)
    with forward_ad.dual_level():
        Probe.apply(forward_ad.make_dual(x, x))
    assert found == [False, True, False]
    # For this: the derivative of a derivative would be a silent zero.
    z, v = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, -1.0])

    def change(function, z):
        return torch.func.jvp(function, (z,), (v,))[1]

    def second(function):
        return change(lambda z: change(function, z), z)

    got = second(lambda z: softmaxlib.softmax(z, 0))
    expect = second(lambda z: torch.softmax(z, 0))
    torch.testing.assert_close(got, expect)
    assert got.abs().min() > 1e-3


def test_wrapped_tensors():
    found = seen(functorch.is_functorch_wrapped_tensor)
    assert [name for name in found if found[name]] == [
        "vmap",
        "grad",
        "jvp",
    ]
    assert seen(_autograd.is_wrapped) == found


def test_batched_tensors():
    found = seen(functorch.is_batchedtensor)
    assert [name for name in found if found[name]] == ["vmap"]


def test_unwrapping():
    x, found = torch.arange(6.0).view(3, 2), []

    def function(z):
        assert functorch.is_functorch_wrapped_tensor(z)
        z = functorch.get_unwrapped(z)
        found.append(functorch.is_batchedtensor(z))
        assert functorch.is_functorch_wrapped_tensor(z)
        z = functorch.get_unwrapped(z)
        assert not functorch.is_functorch_wrapped_tensor(z)
        assert torch.equal(z, x)
        return torch.zeros(())

    # One batch outside, one derivative inside.
    torch.vmap(lambda z: torch.func.grad(function)(z))(x)
    assert found == [True]


def test_legacy_batches():
    """Those of autograd, which ask for no vmap rule."""
    ask, found = functorch.is_legacy_batchedtensor, []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, c):
            found.append(ask(c))
            found.append(_autograd.route(c))
            return c

    x = torch.ones(2, requires_grad=True)
    y = Probe.apply(x)
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    assert found == [False, "kernel"]
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert found[2:] == [True, "plain"]
    assert not any(seen(ask).values())


def test_fake_tensors():
    fake = torch._subclasses.FakeTensor
    x = torch.ones(2)
    assert not isinstance(x, fake)
    with FakeTensorMode() as mode:
        assert isinstance(torch.ones(2), fake)
        assert isinstance(mode.from_tensor(x), fake)
        assert _autograd.is_shape_only(torch.ones(2))
    assert isinstance(mode.from_tensor(x), fake)
    assert _autograd.is_shape_only(torch.ones(2, device="meta"))
    assert not _autograd.is_shape_only(x)


def test_any_autocast():
    ask = torch._C._is_any_autocast_enabled
    assert not ask()
    with torch.autocast("cpu", torch.bfloat16):
        assert ask()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(ask()))
        thread.start()
        thread.join()
        assert elsewhere == [False]
        with torch.autocast("cpu", enabled=False):
            assert not torch.is_autocast_enabled("cpu")
    assert not ask()
    # Any device but one: where it says no, no other needs to be asked.
    for device in ("cuda", "xpu", "mps"):
        torch.set_autocast_enabled(device, True)
        try:
            assert ask() == (device != "mps")
        finally:
            torch.set_autocast_enabled(device, False)
    assert not ask()


def test_the_operator_of_softmax_backward():
    p = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    v = torch.tensor([[1.0, 2.0, -4.0]], dtype=torch.float64)
    got = torch._softmax_backward_data(v, p, 1, p.dtype)
    expect = p * (v - (p * v).sum(1, keepdim=True))
    torch.testing.assert_close(got, expect, rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (2, 2000, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_that_operator_gives_what_public_ones_do(shape, dtype):
    """Which the kernels are written in, and use when it goes away."""
    public, private = _autograd._deviation, _kernels.weighted_deviation
    assert private is not public
    dim = min(len(shape) - 1, 1)
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, *shape, dtype=dtype, generator=generator)
    p = torch.softmax(x, dim)
    # Either mean is off by a rounding a class, of terms up to max |v|.
    unit = torch.finfo(dtype).eps * v.abs().max() * shape[dim]
    wrong = (private(p, v, dim) - public(p, v, dim)).abs()
    assert (wrong <= unit * p).all()


def test_the_library_works_without_that_operator(monkeypatch):
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    functions = (
        lambda: softmaxlib.softmax_jvp(x, x, 1),
        lambda: softmaxlib.softmax_vjp(x, x, 1),
        lambda: softmaxlib.softmax_hvp(x, x, x, 1),
        lambda: softmaxlib.weight_hvp(x, x, x)[0],
    )
    expect = [function() for function in functions]
    monkeypatch.delattr(torch, "_softmax_backward_data")
    with pytest.raises(AttributeError, match="_softmax_backward_data"):
        functions[0]()
    deviation = _autograd._deviation
    monkeypatch.setattr(_kernels, "weighted_deviation", deviation)
    for function, value in zip(functions, expect, strict=True):
        torch.testing.assert_close(function(), value)


def test_routes():
    x = torch.ones(2)
    assert _autograd.route(x, None, 3.0) == "kernel"
    assert _autograd.route(torch.nn.Parameter(x)) == "watched"
    with torch.no_grad():
        assert _autograd.route(torch.nn.Parameter(x)) == "kernel"
    found = seen(_autograd.route)
    assert found == {
        "outside": "kernel",
        "vmap": "watched",
        "grad": "watched",
        "jvp": "watched",
        "level": "watched",
        "dual": "watched",
        "after": "kernel",
    }
    assert _autograd.route(x.to("meta")) == "plain"
    with FakeTensorMode():
        assert _autograd.route(torch.ones(2)) == "plain"

    class Other(torch.Tensor):
        pass

    assert _autograd.route(x.as_subclass(Other)) == "plain"
    found = []

    def function(x):
        found.append(_autograd.route(x))
        return x + 1

    torch.compile(function, fullgraph=True, backend="eager")(x)
    assert found == ["plain"]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_autocast_asks_pytorch(name):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, 3, dtype=dtype)
        assert _autograd.autocast_dtype(name, x) is None
        with torch.autocast("cpu", torch.bfloat16):
            expect = getattr(torch, name)(x, 1).dtype
            assert _autograd.autocast_dtype(name, x) == expect
