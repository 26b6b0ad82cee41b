"""Sums, gathers and batch normalisation over the global batch, with the gradient that data parallelism needs.

The one rule: every process computes the same loss of the global batch, and DDP averages gradients over W processes. A
process's own rows carry dL/d(rows), and the sum over processes is the true gradient, so what flows back into the rows
must be W times as large for the average to give the sum. Hence `gather_batch` and `sum_over_ranks` multiply by W and
take the own slice in backward, with no communication. Parameters used after a gather receive the same full gradient
on every process, which the average keeps. With one process both are the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_batch(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenates every process's `x` along `dim`, in the order of ranks, with gradient.

    Shapes must agree on all processes. The result is the global batch in the order a single process would see it.
    """
    return x if world_size() == 1 else _Gather.apply(x, dim)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sums `x` over processes, with gradient; the result is the same tensor on each."""
    return x if world_size() == 1 else _Sum.apply(x)


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Averages `x` over processes, without gradient."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size = dim, x.shape[dim]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(ctx.dim, rank() * ctx.size, ctx.size) * world_size(), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * world_size()


# ---------------------------------------------------------------------------------------------------------------------
# Batch normalisation over the global batch


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation whose statistics are those of all processes' images, on any device.

    `torch.nn.SyncBatchNorm` refuses CPU tensors; this is the same mathematics on gloo and NCCL, so that what is tested
    on two CPU processes is what runs on GPUs. Input is (V*B, C, ...); with `views` = V > 1 each view has statistics of
    its own, as code that forwards view by view does.
    """

    views: int = 1
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (batch, channels, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (V*B, C, ...)."""
        if not self.training or (world_size() == 1 and self.views == 1):
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[0] % self.views:
            raise ValueError(f"a batch of {input.shape[0]} images does not divide into {self.views} views")
        x_VBCS = input.reshape(self.views, -1, input.shape[1], input[0, 0].numel())
        out, mean_VC, var_VC, count = _GlobalBatchNorm.apply(x_VBCS, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update_running(mean_VC, var_VC * (count / max(count - 1, 1)))
        return out.reshape(input.shape)

    @torch.no_grad()
    def _update_running(self, mean_VC: Tensor, var_VC: Tensor) -> None:
        for mean_C, var_C in zip(mean_VC, var_VC, strict=True):
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self._momentum())
            self.running_var.lerp_(var_C.to(self.running_var.dtype), self._momentum())

    def _momentum(self) -> float:
        if self.momentum is None:
            raise ValueError("batch normalisation with a cumulative average (momentum=None) is not supported")
        return self.momentum


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalises (V, B, C, S) by the mean and variance of each (view, channel) over all processes.

    Every process holds as many images, so the global mean is the mean of the processes' means, and the global variance
    the mean of their variances plus the variance of their means: one collective in each direction, no cancellation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        x_VBCS = _at_least_float32(x)
        var_VC, mean_VC = torch.var_mean(x_VBCS, dim=(1, 3), correction=0)
        count = x_VBCS.shape[1] * x_VBCS.shape[3] * world_size()
        if world_size() > 1:
            local = torch.stack([mean_VC, var_VC])
            parts = [torch.empty_like(local) for _ in range(world_size())]
            dist.all_gather(parts, local)
            mean_RVC, var_RVC = torch.stack(parts).unbind(1)
            mean_VC = mean_RVC.mean(0)
            var_VC = var_RVC.mean(0) + (mean_RVC - mean_VC).square().mean(0)
        inverse_std_VC = (var_VC + eps).rsqrt()
        normal = (x_VBCS - mean_VC[:, None, :, None]) * inverse_std_VC[:, None, :, None]
        ctx.save_for_backward(normal, inverse_std_VC, weight)
        ctx.count, ctx.has_bias, ctx.dtype = count, bias is not None, x.dtype
        out = normal if weight is None else normal * weight[:, None]
        out = out if bias is None else out + bias[:, None]
        ctx.mark_non_differentiable(mean_VC, var_VC)
        return out.to(x.dtype), mean_VC, var_VC, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normal, inverse_std_VC, weight = ctx.saved_tensors
        grad_VBCS = _at_least_float32(grad)
        sums_2VC = torch.stack([grad_VBCS.sum((1, 3)), (grad_VBCS * normal).sum((1, 3))])
        grad_bias, grad_weight = sums_2VC.sum(1)  # of this process; DDP averages them
        if world_size() > 1:
            dist.all_reduce(sums_2VC)
        mean_2VC = sums_2VC / ctx.count
        dx = grad_VBCS - mean_2VC[0][:, None, :, None] - normal * mean_2VC[1][:, None, :, None]
        scale_VC = inverse_std_VC if weight is None else inverse_std_VC * weight
        dx = (dx * scale_VC[:, None, :, None]).to(ctx.dtype)
        return dx, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def use_global_batch_norm(module: nn.Module, views: int = 1) -> nn.Module:
    """Turns every plain BatchNorm of `module` into `GlobalBatchNorm`, in place, with the same parameters and names.

    Args:
        module: Any module; its state dict does not change.
        views: 1 for statistics over all views together, V for statistics per view.

    Raises:
        ValueError: A subclass of BatchNorm (say, one fused with an activation) cannot be converted.
    """
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, GlobalBatchNorm)
    for name, child in module.named_modules():
        if type(child) in plain:
            child.__class__ = GlobalBatchNorm
            child.views = views
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name}: a {type(child).__name__} cannot take statistics over the global batch")
    return module


def has_batch_statistics(module: nn.Module) -> bool:
    """Says whether the output for one image depends on the other images of the batch while training."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
