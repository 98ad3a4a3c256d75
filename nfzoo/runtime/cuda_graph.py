"""Launch work that repeats, such as a training step, as one CUDA graph instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from nfzoo.torch_internals import tree_leaves, tree_map

WARM_UP = 3
"""Calls before the capture, in which libraries choose kernels, compilers compile and optimizers create their state."""

In = TypeVar("In")
Out = TypeVar("Out")


class CudaGraph(Generic[In, Out]):
    """Call a function of tensors on a GPU; after `WARM_UP` calls capture it, and from then on replay its kernels.

    The function has to launch the same kernels on the same memory in each call, and must not wait for the device. What
    else it reads has to lie in tensors that are written in place. The host launches a replay at once, whatever the
    number of kernels. The graph keeps the memory of all intermediate values to itself.

    Args:
        fn: a function of one argument: tensors, or tuples, lists and dictionaries of tensors. It returns the like.
    """

    def __init__(self, fn: Callable[[In], Out]) -> None:
        self._fn = fn
        self._calls = 0
        self._captured: tuple[torch.cuda.CUDAGraph, In, Out] | None = None

    @property
    def captured(self) -> bool:
        """Return whether calls replay the graph."""
        return self._captured is not None

    def __call__(self, inputs: In) -> Out:
        """Return what the function returns. Once the graph is captured, the next call overwrites it.

        Raises:
            ValueError: if the tensors are not of the shapes and dtypes that were captured.
        """
        if self._captured is None:
            if self._calls < WARM_UP:
                self._calls += 1
                return self._fn(inputs)
            self._captured = self._capture(inputs)
        graph, static, outputs = self._captured
        targets, sources = tree_leaves(static), tree_leaves(inputs)
        kinds, given = ([(t.shape, t.dtype) for t in tensors] for tensors in (targets, sources))
        if kinds != given:
            raise ValueError(f"the CUDA graph was captured for tensors {kinds}, not {given}")
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(self, inputs: In) -> tuple[torch.cuda.CUDAGraph, In, Out]:
        static: Any = tree_map(torch.clone, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._fn(static)
        return graph, static, outputs
