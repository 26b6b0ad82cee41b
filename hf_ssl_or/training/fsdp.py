"""Training with every weight, gradient and optimizer state spread over all processes (FSDP2, `fully_shard`).

A process holds 1/W of each tensor and gathers the weights of one block while it computes with them; gradients are
averaged on their way back, as DDP does. The method that is sharded is a copy: the encoder that was handed over stays
full, waits in host memory, and is brought up to date when it is evaluated or saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_ssl_or.distributed import full_tensor, shard_like, world_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.methods.decoder import Decoder
from hf_ssl_or.methods.heads import ProjectionHead, PrototypeHead
from hf_ssl_or.models.adapters import EncoderAdapter
from hf_ssl_or.models.modeling_ssl import SSLModel


def shard(method: SSLMethod, device: torch.device, *, compile: bool = False) -> SSLMethod:
    """Returns a copy of a method that is sharded over all processes, on the device.

    What is gathered together: each block of an encoder, a teacher's included; each head; and, for the whole step, the
    rest (stems, last norms, tokens).

    Args:
        method: The method, the same on every process.
        device: Where this process computes.
        compile: Compiles each block of the encoders.
    """
    sharded = copy.deepcopy(method).to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    mesh = init_device_mesh(device.type, (world_size(),))
    blocks = list(_blocks(sharded))
    if compile:
        for block in blocks:
            block.compile()
    for unit in (*blocks, *_heads(sharded), sharded):
        fully_shard(unit, mesh=mesh)
    return sharded


def _blocks(method: SSLMethod) -> Iterator[nn.Module]:
    for encoder in method.encoders():
        if isinstance(encoder, SSLModel | EncoderAdapter):
            yield from encoder.blocks()


def _heads(method: SSLMethod) -> Iterator[nn.Module]:
    for module in method.modules():
        if isinstance(module, ProjectionHead):
            yield module.mlp
        elif isinstance(module, PrototypeHead | Decoder):
            yield module


def gather_groups(groups: dict[str, dict[str, Tensor]], *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Gathers sharded tensors of a state, one at a time, into host memory; others stay as they are.

    Args:
        groups: Named groups of tensors, the same names on every process, since each of them must call this.
        keep: False on processes that only lend their parts: they get empty groups.
    """
    gathered: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            full = full_tensor(tensor.detach())
            if keep:
                gathered[group][name] = tensor if full is tensor else full.cpu()
    return gathered


def load_full(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state of full tensors into a module, sharded or not.

    Raises:
        InputError: A tensor is missing, unknown or of another shape.
    """
    own = module.state_dict()
    if wrong := sorted(own.keys() ^ state.keys()):
        problem = "unknown" if wrong[0] in state else "missing"
    elif wrong := [name for name, tensor in own.items() if tensor.shape != state[name].shape]:
        problem = "of another shape"
    if wrong:
        raise InputError(f"weights: {wrong[0]!r} is {problem}; was the state made by another version of hf_ssl_or?")
    module.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in state.items()})


def shard_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes this process's part of full optimizer tensors `<parameter>/<entry>`, sharded as the parameters are."""
    parts = {}
    groups = optimizer.param_groups
    parameters = {n: p for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)}
    for name, tensor in tensors.items():
        parameter = parameters.get(name.rpartition("/")[0], tensor)
        parts[name] = shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor  # or a step counter
    return parts


@torch.no_grad()
def update_full(module: nn.Module, sharded: nn.Module) -> None:
    """Copies the weights and buffers of a sharded module into a full one, tensor by tensor."""
    own = module.state_dict()
    for name, tensor in sharded.state_dict().items():
        own[name].copy_(full_tensor(tensor))
