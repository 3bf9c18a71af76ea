"""A CUDA graph on the CPU: what a captured and replayed step does, without a CUDA device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.cuda_graph import StepGraph


def fuse(optimizer):
    """Take SGD's step as on CUDA, in one kernel for each group, which reads its rate from a tensor."""
    for group in optimizer.param_groups:
        group["fused"] = True


def tensors_of(tree):
    """All tensors with memory of their own."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if not leaf._is_zerotensor() and leaf.untyped_storage().nbytes()]


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: operators that are repeated on the memory of the first time.

    Context in which they are recorded and leave nothing behind: all memory that they write to, and the random
    generators, are as before when it is left. The memory that a graph takes for itself is not its own between
    two replays: each begins with NaN there.
    """

    def __init__(self, generators):
        super().__init__()
        self.generators = [torch.default_generator, *generators]
        self.calls, self.overwritten, self.taken = [], {}, {}

    def __enter__(self):
        self.states = [generator.get_state() for generator in self.generators]
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.overwritten.values():
            storage.copy_(content)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        undeclared = "batch_norm" in function.name()  # writes running statistics
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if undeclared or (argument.alias_info and argument.alias_info.is_write):
                for storage in (tensor.untyped_storage() for tensor in tensors_of(value)):
                    self.overwritten.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        for tensor in tensors_of(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.taken[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return result

    def replay(self):
        for storage in self.taken.values():
            storage.fill_(0xFF)
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                if function.is_view:
                    continue
                for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new and not old._is_zerotensor():
                        old.detach().copy_(new)


class RecordedStep(StepGraph):
    WARM_UP = 1  # in which momentum begins

    def _new_graph(self):
        recording = Recording(self.generators)
        return recording, recording
