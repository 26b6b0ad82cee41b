"""Sums, gathers and batch normalization over the global batch, with the gradient that data parallelism needs.

The one rule: every process computes the same loss of the global batch, and DDP averages gradients over W processes. A
process's own rows carry dL/d(rows), and the sum over processes is the true gradient, so what flows back into the rows
must be W times as large for the average to give the sum. Hence `gather_batch` and `sum_over_ranks` multiply by W and
take the own slice in backward, with no communication. Parameters used after a gather receive the same full gradient
on every process, which the average keeps. With one process both are the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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
# Tensors of which each process holds a part; a tensor that is not sharded passes through unchanged


def full_tensor(x: Tensor) -> Tensor:
    """Gathers a sharded tensor, with gradient: a collective call, so every process must make it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather_full_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gathers several tensors, with gradient; those of one shape travel in one message."""
    of_shape: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        of_shape.setdefault(tensor.shape, []).append(i)
    gathered = list(tensors)
    for indices in of_shape.values():
        if isinstance(tensors[indices[0]], DTensor):
            stack = full_tensor(torch.stack([tensors[i] for i in indices]))
            for i, tensor in zip(indices, stack.unbind(), strict=True):
                gathered[i] = tensor
    return gathered


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Takes this process's part of `x`, which every process has whole, sharded as `like` is; sends nothing."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def local_part(x: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor; changes to it change the tensor. Not for autograd."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean length of each of P tensors, all of them sharded or none: (P,)."""
    length_P = torch.stack(torch._foreach_norm([local_part(tensor) for tensor in tensors]))
    if not isinstance(tensors[0], DTensor):
        return length_P
    square_P = length_P.square()
    dist.all_reduce(square_P)
    return square_P.sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Batch normalization over the global batch


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization whose statistics are those of all processes' images, on any device.

    `torch.nn.SyncBatchNorm` refuses CPU tensors; this is the same mathematics on gloo and NCCL, so that what is tested
    on two CPU processes is what runs on GPUs. Input is (V*B, C, ...); with `images_per_view` = B each view has
    statistics of its own, as code that forwards view by view does.
    """

    images_per_view: int | None = None
    statistics_kept = False
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (batch, channels, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes (V*B, C, ...)."""
        if not self.training or self._torch_will_do(input):
            return super().forward(input)
        self._check_input_dim(input)
        views, rest = (1, 0) if self.images_per_view is None else divmod(input.shape[0], self.images_per_view)
        if rest:
            raise ValueError(f"{input.shape[0]} images do not divide into views of {self.images_per_view}")
        out, mean_VC, var_VC, count = _GlobalBatchNorm.apply(input, self.weight, self.bias, self.eps, views)
        if self.track_running_stats and not self.statistics_kept:
            self._update_running(mean_VC, var_VC * (count / max(count - 1, 1)))
        return out

    def _torch_will_do(self, input: Tensor) -> bool:
        """One process and one set of statistics; but torch's CPU kernel sums channels-last images in float32."""
        inexact = input.device.type == "cpu" and input.dtype == torch.float32 and not input.is_contiguous()
        return world_size() == 1 and self.images_per_view is None and not inexact

    @torch.no_grad()
    def _update_running(self, mean_VC: Tensor, var_VC: Tensor) -> None:
        for mean_C, var_C in zip(mean_VC, var_VC, strict=True):
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self._momentum())
            self.running_var.lerp_(var_C.to(self.running_var.dtype), self._momentum())

    def _momentum(self) -> float:
        if self.momentum is None:
            raise ValueError("batch normalization with a cumulative average (momentum=None) is not supported")
        return self.momentum


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's `BatchNormAct2d` with statistics of the global batch: a norm, dropped blocks and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes and activates (V*B, C, H, W)."""
        return self.act(self.drop(super().forward(input)))


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalizes (V*B, C, ...) by the mean and variance of each (view, channel) over all processes.

    Sums run over each image first, and over images and processes in float64. So the statistics do not depend on how
    images are spread over processes, not even in the last bit (but for rare ties): a ReLU behind them switches alike.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, views: int
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        x_VBCS = _split(x, views)
        count = x_VBCS.shape[1] * x_VBCS.shape[3] * world_size()
        mean_VC = (_sum_images(x_VBCS.sum(3)) / count).to(x_VBCS.dtype)
        centerd = x_VBCS - mean_VC[:, None, :, None]
        var_VC = _sum_images(centerd.square().sum(3)) / count
        inverse_std_VC = (var_VC + eps).rsqrt().to(x_VBCS.dtype)
        ctx.save_for_backward(centerd, inverse_std_VC, weight)
        ctx.views, ctx.count, ctx.has_bias, ctx.dtype = views, count, bias is not None, x.dtype
        scale_VC = inverse_std_VC if weight is None else inverse_std_VC * weight
        out = torch.empty_like(x, dtype=centerd.dtype)  # no view of another tensor: a ReLU may work on it in place
        if bias is None:
            torch.mul(centerd, scale_VC[:, None, :, None], out=_split(out, views))
        else:
            torch.addcmul(bias[:, None], centerd, scale_VC[:, None, :, None], out=_split(out, views))
        ctx.mark_non_differentiable(mean_VC, var_VC)
        return out.to(x.dtype), mean_VC, var_VC, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centerd, inverse_std_VC, weight = ctx.saved_tensors
        grad_VBCS = _split(grad, ctx.views)
        product = grad_VBCS * centerd
        own_2VC = torch.stack([grad_VBCS.sum(3), product.sum(3)]).double().sum(2)
        total_2VC = own_2VC if world_size() == 1 else own_2VC.clone()
        if world_size() > 1:
            dist.all_reduce(total_2VC)
        scale_VC = inverse_std_VC if weight is None else inverse_std_VC * weight
        shift_VC, slope_VC = (-scale_VC * total_2VC / ctx.count).to(centerd.dtype)
        slope_VC = slope_VC * inverse_std_VC.square()
        dx = torch.addcmul(shift_VC[:, None, :, None], centerd, slope_VC[:, None, :, None], out=product)
        dx = dx.addcmul_(grad_VBCS, scale_VC[:, None, :, None]).reshape(grad.shape).to(ctx.dtype)
        grad_bias, grad_weight = own_2VC[0].sum(0), (own_2VC[1] * inverse_std_VC).sum(0)  # DDP averages them
        return (
            dx,
            None if weight is None else grad_weight.to(weight.dtype),
            grad_bias.to(centerd.dtype) if ctx.has_bias else None,
            None,
            None,
        )


def _sum_images(x_VBC: Tensor) -> Tensor:
    """Sums values of images over the images of all processes, in float64: (V, C)."""
    total = x_VBC.double().sum(1)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def _split(x: Tensor, views: int) -> Tensor:
    """Views (V*B, C, ...) as (V, B, C, S), in at least float32."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return x.reshape(views, x.shape[0] // views, x.shape[1], -1)


_GLOBAL: dict[type[nn.Module], type[GlobalBatchNorm]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), GlobalBatchNorm),
    **{BatchNormAct2d: GlobalBatchNormAct, GlobalBatchNorm: GlobalBatchNorm, GlobalBatchNormAct: GlobalBatchNormAct},
}


def use_global_batch_norm(module: nn.Module, images_per_view: int | None = None) -> nn.Module:
    """Turns every BatchNorm of torch and timm in `module` into `GlobalBatchNorm`, with the same parameters and names.

    Args:
        module: Any module, changed in place; its state dict does not change.
        images_per_view: B, this process's images of one view, for statistics per view; None for all views together.

    Raises:
        ValueError: Another subclass of BatchNorm cannot be converted.
    """
    for name, child in module.named_modules():
        if type(child) in _GLOBAL:
            child.__class__ = _GLOBAL[type(child)]
            child.images_per_view = images_per_view
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name}: a {type(child).__name__} cannot take statistics over the global batch")
    return module


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Holds the running statistics of every `GlobalBatchNorm` of `module`, say while a forward pass is repeated."""
    norms = [child for child in module.modules() if isinstance(child, GlobalBatchNorm)]
    for norm in norms:
        norm.statistics_kept = True
    try:
        yield
    finally:
        for norm in norms:
            norm.statistics_kept = False


def has_batch_statistics(module: nn.Module) -> bool:
    """Says whether the output for one image depends on the other images of the batch while training."""
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())


def images_together(module: nn.Module) -> int | None:
    """Says how many images in a row must pass while training for the output of each to be that in the whole batch.

    Returns:
        1 without batch statistics; B, this process's images of one view, with statistics per view; None for all.
    """
    if not has_batch_statistics(module):
        return 1
    return next((child.images_per_view for child in module.modules() if isinstance(child, GlobalBatchNorm)), None)
