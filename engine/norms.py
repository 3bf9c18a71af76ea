"""Batch norm on XLA, compiled for a CPU, and over several processes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def full_precision(values):
    """The values in float32, or in float64 if they are float64: losses and statistics use this precision."""
    return values if values.dtype == torch.float64 else values.float()


def normalized(images, mean, var, norm):
    """(N, C, …) normalised by mean and var (C,), scaled and shifted by ``norm``; the dtype stays."""
    values = full_precision(images)
    shape = [1, -1, *[1] * (images.ndim - 2)]
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return (values * scale.view(shape) + (norm.bias - mean * scale).view(shape)).to(images.dtype)


class _AnyBatchNorm(_BatchNorm):
    """Batch norm of images and of vectors, then its children: timm puts an activation there."""

    def _check_input_dim(self, images):
        pass

    def forward(self, images):
        """(N, C, …) → the same."""
        images = self._normalize(images)
        for module in self.children():
            images = module(images)
        return images

    def _track(self, mean, var, count):
        """Update the running statistics with a batch that has ``count`` values in each channel."""
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_var.lerp_(var.detach() * count / max(1, count - 1), self.momentum)
                self.num_batches_tracked.add_(1)


class XLABatchNorm(_AnyBatchNorm):
    """Batch norm with a gradient in evaluation mode on XLA; torch_xla 2.9 has none."""

    def _normalize(self, images):
        if self.training:
            return _BatchNorm.forward(self, images)
        return normalized(images, self.running_mean, self.running_var, self)


class SumBatchNorm(_AnyBatchNorm):
    """Batch norm that computes its statistics as sums if it is compiled for a CPU.

    ``torch.compile`` turns PyTorch's batch norm into Welford's algorithm, which cannot work on several values
    at once.
    """

    @staticmethod
    def fits(norm):
        """Whether a batch norm is one of PyTorch's own, affine and with running statistics."""
        whole = norm.affine and norm.track_running_stats and norm.momentum is not None
        return whole and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def _normalize(self, images):
        if not (self.training and torch.compiler.is_compiling()):
            return _BatchNorm.forward(self, images)
        values = full_precision(images)
        dims, count = [0, *range(2, images.ndim)], images.numel() // images.shape[1]
        # relative to one value of the batch, so that the difference of squares keeps its digits
        one = values.detach()[(slice(1), slice(None), *[slice(1)] * (images.ndim - 2))]
        offset = values - one
        mean, square = offset.sum(dims) / count, offset.square().sum(dims) / count
        var = square - mean.square()
        self._track(one.flatten() + mean, var, count)
        return normalized(offset, mean, var, self).to(images.dtype)


class _MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes. Linear and symmetric: both derivatives are this mean, too."""

    @staticmethod
    def forward(tensor):
        mean = tensor.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return _MeanOverProcesses.apply(gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return _MeanOverProcesses.apply(tangent)


class SyncBatchNorm(_AnyBatchNorm):
    """Batch norm with statistics over the batches of all processes, which have the same size.

    ``torch.nn.SyncBatchNorm`` runs only on CUDA and has no forward derivative, which the exact feedback
    needs. This class needs one reduction of 2 · C numbers in the forward pass and one in the backward pass.
    Statistics are float32 (or float64) for images of any precision.
    """

    def _normalize(self, images):
        if not self.training:
            return _BatchNorm.forward(self, images)
        values = full_precision(images)
        dims = [0, *range(2, images.ndim)]
        var, mean = torch.var_mean(values, dims, correction=0)
        # relative to the running mean, so that the difference of squares keeps its digits
        shift = self.running_mean.clone()
        offset = mean - shift
        moments = _MeanOverProcesses.apply(torch.stack((offset, var + offset.square())))
        offset = moments[0]
        mean, var = shift + offset, moments[1] - offset.square()
        self._track(mean, var, values.numel() // values.shape[1] * dist.get_world_size())
        return normalized(images, mean, var, self)


def with_norms(network, kind, fits=lambda norm: True):
    """Replace the batch norms of a network for which ``fits`` is true by batch norms of class ``kind``, with
    the same parameters and names; returns the network."""
    for name, module in network.named_children():
        if isinstance(module, _BatchNorm) and fits(module):
            other = kind(module.num_features, module.eps, module.momentum)
            other.weight, other.bias = module.weight, module.bias
            other.running_mean, other.running_var = module.running_mean, module.running_var
            other.num_batches_tracked = module.num_batches_tracked
            for inner in module.named_children():
                other.add_module(*inner)
            setattr(network, name, other.train(module.training))
        else:
            with_norms(module, kind, fits)
    return network
