"""softmaxlib.distributed, in two and three processes that are started once.

What they run is in ranks.py; an assertion that fails there fails here. It
also runs in this process, alone in its group.
"""

import contextlib
import itertools
import math
import multiprocessing
import re

import pytest
import ranks
import torch
from torch import distributed

from softmaxlib import parallel_logsumexp
from softmaxlib.processes import Processes, run_processes

# How the ranks share the classes.
SIZES = {
    1: ((10,),),
    2: ((5, 5), (3, 7), (0, 8), (8, 0), (1, 4)),
    3: ((2, 3, 5), (4, 0, 4)),
}


@contextlib.contextmanager
def started(world):
    """Something to run a function of ranks.py everywhere."""
    if world > 1:
        with Processes(world, timeout=60) as processes:
            yield processes.run
        return
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    yield lambda function, *arguments: [function(0, *arguments)]
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES)
def run(request):
    """Run it for each way to share the classes."""
    with started(request.param) as everywhere:
        yield lambda function, *arguments: [
            everywhere(function, sizes, *arguments)
            for sizes in SIZES[request.param]
        ]


# Where it takes two for something to go wrong.
several = pytest.mark.parametrize("run", [2, 3], indirect=True)


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logsumexp(run, dtype):
    run(ranks.logsumexp, dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0, torch.inf])
def test_softmax(run, temperature):
    for dtype in DTYPES:
        run(ranks.softmax, dtype, temperature)


def test_softmax_of_confident_rows(run):
    run(ranks.confident_softmax)


OPTIONS = (
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"reduction": "none", "ignore_index": 1},
    {"label_smoothing": 0.1},
    {"reduction": "none", "label_smoothing": 0.3},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy(run, options):
    for dtype in DTYPES:
        run(ranks.cross_entropy, dtype, options)


def test_shapes(run):
    run(ranks.shapes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_cross_entropy(run, options):
    run(ranks.linear, options)


def test_linear_cross_entropy_without_a_bias_and_of_a_batch(run):
    run(ranks.linear, {}, False)
    run(ranks.linear, {"reduction": "none"}, True, (2, 3))
    run(ranks.linear, {}, True, ())


def test_linear_cross_entropy_of_masked_slices_halves_and_parts(run):
    run(ranks.linear_masked)
    run(ranks.linear_halves)
    run(ranks.some_gradients)


def test_little_is_said(run):
    """Two all-reduces, of a few numbers a row: (6, K) logits stay here."""
    for everywhere in run(ranks.communication):
        for found in everywhere:
            one, three = (6, 1), (3, 6, 1)
            assert found["logsumexp"] == ([one, one], [])
            assert found["softmax"] == ([one, one], [three])
            assert found["cross_entropy"] == ([one, three], [])
            assert found["linear"] == ([one, three], [(6, 5)])


WRONG = {
    "dtype": "ranks must agree, .*torch.float32",
    "rows": r"ranks must agree, .*\(5,\)",
    "dim": "rank 1 refused its arguments, IndexError: .* dim out of range",
    "type": "rank 1 refused its arguments, TypeError: .* torch.Tensor",
    "temperature": "ranks must agree, .*'temperature': 2",
    "gradient": "ranks must agree, .*'derivative': True",
    "targets": "ranks must agree, .*'targets'",
    "reduction": "ranks must agree, .*'sum'",
    "bias": "ranks must agree, .*'bias': True",
    "features": "rank 1 refused its arguments, RuntimeError: .* weight",
}


@several
@pytest.mark.parametrize("case", WRONG)
def test_all_ranks_refuse_what_one_has_wrong(run, case):
    for said in run(ranks.refusal, case):
        for rank, text in enumerate(said):
            assert "parallel_" in text
            if "refused" not in WRONG[case] or rank != 1:
                assert text.startswith("RuntimeError: ")
                assert re.search(WRONG[case], text)
            else:
                assert not text.startswith("RuntimeError: rank")


def test_what_is_wrong_everywhere_is_said_everywhere(run):
    for everywhere in run(ranks.everybody_wrong):
        for rank, said in enumerate(everywhere):
            assert "target out of range" in said["range"]
            assert "integers, got torch.float64" in said["probabilities"]
            assert "dtype=torch.float32" in said["integers"]
            assert "0-d" in said["0-d"]
            assert "once_differentiable" in said["twice"]
            assert "torch.func cannot" in said["vmap"]
            if rank:
                assert "not in the group" in said["group"]


@several
def test_nobody_waits_for_long(run):
    """For a rank that does not come: the timeout of the group, 1 second."""
    for said in itertools.islice(run(ranks.late, 1), 1):
        for text in said[:1] + said[2:]:
            assert "waited in vain: another rank failed" in text
            assert "parallel_linear_cross_entropy(): rank" in text


def test_autocast(run):
    for everywhere in run(ranks.autocast):
        assert all(all(found) for found in everywhere)


def test_tensors_of_a_mesh_then_a_compiler_then_a_process_dies():
    with Processes(2, timeout=20) as both:
        for text in both.run(ranks.dtensors, (4, 3)):
            assert "the classes must be Shard(1), got R" in text
        both.run(ranks.compiled, (4, 3))
        with pytest.raises(RuntimeError) as caught:
            both.run(ranks.dies, (4, 3))
        assert "process 1: the process died" in str(caught.value)
        assert "parallel_softmax(): rank 0 waited in vain" in str(
            caught.value
        )
    with pytest.raises(RuntimeError, match="have been ended"):
        both.run(ranks.dies, (4, 3))


def test_a_group_comes_first(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallel_logsumexp(torch.zeros(3), 0)


def test_run_processes_ends_what_it_starts():
    before = set(multiprocessing.active_children())
    assert run_processes(math.factorial, 1) == [1]
    with pytest.raises(RuntimeError, match="(?s)process 0: .*TypeError"):
        run_processes(math.factorial, 1, "one argument too many")
    assert set(multiprocessing.active_children()) <= before
