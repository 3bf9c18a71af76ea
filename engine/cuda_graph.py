"""A training step that is captured once as a CUDA graph and replayed."""

import gc
import sys

import torch


class StepGraph:
    """A training step that a CUDA device replays with one launch instead of one launch per kernel.

    The first steps are not replayed: in them compilers and cuDNN's search run and optimisers create their
    state. Then one step is captured, which computes nothing. From then on each step is a replay: the same
    kernels on the same memory, with a new batch, new random numbers and new values of ``Runtime.number``.

    Args:
        runtime: a ``Runtime`` on CUDA with a single process.
        function: (batch, step) → {name: () tensor}; batch is a named tuple of tensors or None. It may not
            wait for the device. Its Python values are frozen when it is captured.
        generators: the device generators that it draws from, beside the default generator; all are seeded
            before each step.
    """

    WARM_UP = 3
    NUMBERS = 16  # more than a step has

    def __init__(self, runtime, function, generators):
        self.runtime, self.function, self.generators = runtime, function, generators
        self.warm_up = self.WARM_UP
        self.graph = None

    def __call__(self, batch, step):
        """The scalars of the step; the next step overwrites them."""
        if self.warm_up:
            self.warm_up -= 1
            return self.function(batch, step)
        if self.graph is None:
            self._capture(batch, step)
        for tensor, new in zip(self.batch, batch, strict=True):
            if tensor is not None:
                tensor.copy_(new)
        for tensor, function in zip(self.numbers, self.functions, strict=False):  # some are unused
            tensor.fill_(function(step))
        self.graph.replay()
        return self.scalars

    def number(self, function):
        """A () tensor for a number that changes from step to step; each replay first sets it to
        ``function(step)``."""
        self.functions.append(function)
        return self.numbers[len(self.functions) - 1]

    def _capture(self, batch, step):
        # inputs need memory from outside the graph: memory allocated during the capture is reused inside the
        # graph, so that a replay would overwrite inputs before it reads them
        self.batch = type(batch)(*(None if tensor is None else tensor.clone() for tensor in batch))
        self.numbers = torch.zeros(self.NUMBERS, device=self.runtime.device).unbind()
        self.functions = []
        gc.collect()  # leftover gradients of earlier steps would tie the capture to their stream
        self.runtime.capturing = self
        try:
            self.graph, capturing = self._new_graph()
            with capturing:
                self.scalars = self.function(self.batch, step)
        except torch.OutOfMemoryError:
            print(
                "a CUDA graph of the step does not fit: it needs memory of its own, beside the memory of "
                "eager steps; use --no-cuda-graph, or a smaller --batch-size or --mu",
                file=sys.stderr,
            )
            raise
        except RuntimeError:
            print(
                "the step cannot become a CUDA graph: the traceback shows where. Does it wait for the device "
                "there, as .item() and a branch on a tensor do? --no-cuda-graph runs it without a graph",
                file=sys.stderr,
            )
            raise
        finally:
            self.runtime.capturing = None

    def _new_graph(self):
        """An empty graph, and the context that captures into it."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # other threads, such as the threads that pin images, may use CUDA during the capture
        return graph, torch.cuda.graph(graph, capture_error_mode="thread_local")
