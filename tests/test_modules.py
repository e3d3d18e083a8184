"""Softmax and LogSoftmax as layers."""

import math

import pytest
import torch

from softmaxlib import LogSoftmax, Softmax, log_softmax, softmax

LAYERS = [(Softmax, softmax), (LogSoftmax, log_softmax)]


@pytest.mark.parametrize(("layer", "function"), LAYERS)
def test_layers_are_the_functions(layer, function):
    x = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, -1.0]])
    mask = torch.tensor([True, True, False])
    for dim in (0, 1, -1):
        module = layer(dim, temperature=0.5)
        expect = function(x, dim, temperature=0.5)
        assert torch.equal(module(x), expect)
        expect = function(x, dim, temperature=0.5, mask=mask)
        assert torch.equal(module(x, mask), expect)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), layer(-1))
    model(x).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("layer", [Softmax, LogSoftmax])
def test_layers_say_what_they_are_and_check_early(layer):
    name = layer.__name__
    assert repr(layer(1)) == f"{name}(dim=1, temperature=1.0)"
    with pytest.raises(TypeError, match="dim"):
        layer()
    with pytest.raises(TypeError, match=rf"{name}\(\): dim must be an int"):
        layer(None)
    with pytest.raises(ValueError, match=rf"{name}\(\): temperature"):
        layer(0, temperature=-1)
    with pytest.raises(TypeError, match="temperature"):
        layer(0, temperature="hot")
    assert layer(0, temperature=math.inf).temperature == math.inf
