"""Several processes on this machine that form one group, and can talk.

For the tests, the chapter and the benchmark of `softmaxlib.distributed`, and
for whoever wants to try `torch.distributed` without a second machine.
"""

import contextlib
import datetime
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import torch
from torch import distributed, multiprocessing

__all__ = ["Processes", "call_own", "run_processes"]

Pipe = connection.Connection


class Processes:
    """Processes on this machine that form one group, with a thread each.

    They are started fresh and import PyTorch, which takes seconds; after
    that they run one function after the other. A context manager: on leaving
    it every process is ended, whatever happened inside.

    Args:
        world: how many processes.
        timeout: the seconds after which a collective that waits for another
            process gives up; and those that the others get to answer once
            a process has failed.

    Example:
        >>> with Processes(2) as both:  # doctest: +SKIP
        ...     first = both.run(function, 1)
        ...     second = both.run(function, 2)
    """

    def __init__(self, world: int, *, timeout: float = 60.0):
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory()
        self._children: list[tuple[Any, Pipe]] = []
        spawn = multiprocessing.get_context("spawn")
        place = os.path.join(self._folder.name, "store")
        try:
            for rank in range(world):
                here, there = spawn.Pipe()
                arguments = rank, world, place, timeout, there
                child = spawn.Process(
                    target=_serve, args=arguments, daemon=True
                )
                child.start()
                there.close()
                self._children.append((child, here))
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(rank, *args)`` in every process at once.

        Args:
            function: from an importable module, not from a cell of a
                notebook. ``torch.distributed`` is set up where it runs, with
                gloo.
            args: what it takes after its rank; anything that can be pickled.

        Returns:
            What it returned, in the order of the ranks.

        Raises:
            RuntimeError: a process raised or died; its traceback is in the
                message. One that has not answered by then is ended.
        """
        if not self._children:
            raise RuntimeError("the processes have been ended")
        task = pickle.dumps((function, args))
        waiting = {}
        for rank, (_, pipe) in enumerate(self._children):
            with contextlib.suppress(OSError):  # it died: noticed below
                pipe.send_bytes(task)
            waiting[pipe] = rank
        results: list[Any] = [None] * len(waiting)
        failures: list[str] = []
        while waiting:
            limit = self.timeout if failures else None
            ready = connection.wait(list(waiting), limit)
            for pipe in [p for p in waiting if p in ready]:
                rank = waiting.pop(pipe)
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    good, value = False, "the process died"
                if good:
                    results[rank] = value
                else:
                    failures.append(f"process {rank}: {value}")
            if not ready:
                failures.append(f"no answer of {sorted(waiting.values())}")
                self.close()
                break
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        """End every process."""
        for child, pipe in self._children:
            pipe.close()
            child.kill()
        for child, _ in self._children:
            child.join()
            child.close()
        self._children = []
        self._folder.cleanup()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def run_processes(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 60.0,
) -> list[Any]:
    """Call ``function(rank, *args)`` in several processes at once.

    They form one group of ``torch.distributed`` (gloo), have one thread
    each, and are ended before this returns or raises.

    Args:
        function, args: as in :meth:`Processes.run`.
        world: how many processes.
        timeout: as in :class:`Processes`.

    Returns:
        What the function returned, in the order of the ranks.

    Raises:
        RuntimeError: a process raised or died; its traceback is in the
            message.

    Example:
        >>> import math
        >>> run_processes(math.factorial, 3)  # doctest: +SKIP
        [1, 1, 2]
    """
    with Processes(world, timeout=timeout) as processes:
        return processes.run(function, *args)


def call_own(
    rank: int, function: Callable[..., Any], arguments: Any
) -> tuple[Any, list[torch.Tensor]]:
    """Call a function with the arguments of one's own rank.

    For a notebook, whose own functions cannot be sent to another process.

    Args:
        rank: of this process.
        function: from an importable module; returns a tensor.
        arguments: for each rank a tuple of what the function takes.

    Returns:
        The result, and the gradients of its sum in those arguments that
        require one.

    Example:
        >>> import torch
        >>> z = torch.tensor([0.0, 0.0], requires_grad=True)
        >>> call_own(0, torch.logsumexp, [(z, 0)])
        (tensor(0.6931), [tensor([0.5000, 0.5000])])
    """
    own = arguments[rank]
    value = function(*own)
    leaves = [
        x for x in own if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    if not leaves:
        return value, []
    return value.detach(), list(torch.autograd.grad(value.sum(), leaves))


def _serve(
    rank: int,
    world: int,
    place: str,
    timeout: float,
    pipe: Pipe,
) -> None:
    """What a process does: join the group, then answer until it is ended."""
    torch.set_num_threads(1)
    names = {name for _, name in socket.if_nameindex()}
    for loopback in names & {"lo", "lo0"}:
        # Gloo would look the machine's name up, and may not find it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{place}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
            answer = pickle.dumps((True, function(rank, *args)))
        except EOFError:
            return
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
