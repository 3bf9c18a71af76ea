"""A training step that is captured once as a CUDA graph and replayed."""

import gc
import sys

import torch


class StepGraph:
    """A training step that a CUDA device repeats by itself, launched at once instead of kernel by kernel.

    The first steps are taken as they are: compilers, cuDNN's search and the optimisers' state begin there.
    The next one is captured, which computes nothing, and from then on a step is a replay: the same kernels on
    the same memory, with another batch, other random numbers and other values of ``Runtime.number``.

    Args:
        runtime: on CUDA, the only process.
        function: (batch, step) → {name: () tensor}; batch is a named tuple of tensors or None. It may not
            wait for the device, and what it takes from Python is what it was when it was captured.
        generators: those that it draws from, on the device, beside the default one; seeded before each step.
    """

    WARM_UP = 3
    NUMBERS = 16  # more than a step has

    def __init__(self, runtime, function, generators):
        self.runtime, self.function, self.generators = runtime, function, generators
        self.warm_up = self.WARM_UP
        self.graph = None

    def __call__(self, batch, step):
        """The scalars of the step, which the next one overwrites."""
        if self.warm_up:
            self.warm_up -= 1
            return self.function(batch, step)
        if self.graph is None:
            self._capture(batch, step)
        for tensor, new in zip(self.batch, batch, strict=True):
            if tensor is not None:
                tensor.copy_(new)
        for tensor, function in zip(self.numbers, self.functions, strict=False):  # some are not used
            tensor.fill_(function(step))
        self.graph.replay()
        return self.scalars

    def number(self, function):
        """The () tensor that stands for a number in the step; before each replay it becomes
        ``function(step)``."""
        self.functions.append(function)
        return self.numbers[len(self.functions) - 1]

    def _capture(self, batch, step):
        # what comes from outside lies in memory of its own: the graph's, which is given out while it is
        # captured, is given out more than once, so that a replay would overwrite it before it is read
        self.batch = type(batch)(*(None if tensor is None else tensor.clone() for tensor in batch))
        self.numbers = torch.zeros(self.NUMBERS, device=self.runtime.device).unbind()
        self.functions = []
        gc.collect()  # what is left of earlier steps' gradients would bind this one to their stream
        self.runtime.capturing = self
        try:
            self.graph, capturing = self._new_graph()
            with capturing:
                self.scalars = self.function(self.batch, step)
        except torch.OutOfMemoryError:
            print(
                "a CUDA graph of the step does not fit: it has memory of its own, beside that of steps "
                "that are not replayed; use --no-cuda-graph, or a smaller --batch-size or --mu",
                file=sys.stderr,
            )
            raise
        except RuntimeError:
            print(
                "the step cannot become a CUDA graph; the traceback says where: does it wait for the device "
                "there, as .item() and a branch on a tensor do? --no-cuda-graph takes it as it is",
                file=sys.stderr,
            )
            raise
        finally:
            self.runtime.capturing = None

    def _new_graph(self):
        """A graph without contents, and the context in which it gets them."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # other threads, such as those that pin images from disk, go on meanwhile
        return graph, torch.cuda.graph(graph, capture_error_mode="thread_local")
