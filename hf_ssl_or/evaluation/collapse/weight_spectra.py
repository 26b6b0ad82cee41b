"""Spectra of an encoder's weights, and which of its filters resemble each other."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import as_matrix, normalized_eigenvalues

_STAGE = re.compile(r"(?:^|\.)(layer\d+|stages\.\d+)\.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.(?:attn\.proj|mlp\.fc2)$")
_BISECTIONS = 4  # up to 16 groups of filters


def weight_spectra(encoder: nn.Module) -> dict[str, np.ndarray]:
    """Returns the normalized eigenvalues of the encoder's telling weights, see `select_weights`.

    As in He, Du & Ma (NeurIPS 2024, section 5), a weight is a matrix of its inputs (rows, the samples) by its outputs.

    Returns:
        float64 array (outputs,) for every selected parameter name.
    """
    return {name: normalized_eigenvalues(w_OI.T, name) for name, w_OI in select_weights(encoder).items()}


def weight_matrices(encoder: nn.Module) -> dict[str, Tensor]:
    """Every convolution's and linear layer's weight as a matrix (outputs, inputs * kernel), by parameter name."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    modules = encoder.named_modules()
    return {f"{name}.weight".lstrip("."): m.weight.detach().flatten(1) for name, m in modules if isinstance(m, layers)}


def select_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Selects the weights whose spectra are plotted, each as (outputs, inputs * kernel).

    ResNets: the last convolution of each stage. Vision transformers: `attn.proj` and `mlp.fc2` of the first, middle
    and last block. Any other encoder: every weight.
    """
    matrices = weight_matrices(encoder)
    last_of_stage: dict[str, str] = {}
    of_block: dict[int, list[str]] = {}
    for name in matrices:
        module = name.removesuffix(".weight")
        if (stage := _STAGE.search(module)) and ".downsample." not in module:
            last_of_stage[stage[1]] = name
        elif block := _BLOCK.search(module):
            of_block.setdefault(int(block[1]), []).append(name)
    if last_of_stage:
        return {name: matrices[name] for name in last_of_stage.values()}
    if of_block:
        depth = len(of_block)
        return {name: matrices[name] for i in sorted({0, depth // 2, depth - 1}) for name in of_block[i]}
    return matrices


def filter_correlations(weight: Tensor | np.ndarray, *, ordered: bool = True) -> np.ndarray:
    """Absolute correlations among the filters of a layer, as plotted in figure 5 of He, Du & Ma (NeurIPS 2024).

    Filters that resemble each other stand together, so that groups of redundant filters show as blocks. The paper
    orders by spectral biclustering. Here, for lack of a fixed number of clusters, the filters are split in two by the
    second eigenvector of the normalized similarity (Shi & Malik, TPAMI 2000), and each half again, up to 16 groups.

    Args:
        weight: Weight (O, I, ...), each filter its own row.
        ordered: False keeps the order of the filters.

    Returns:
        float64 array (O, O) in [0, 1], with ones on the diagonal; a constant filter correlates with no other.

    Raises:
        InputError: The weight has fewer than two axes, or holds NaN or infinite values.
    """
    matrix = torch.as_tensor(weight)
    if matrix.ndim < 2:
        raise InputError(f"weight: wants (filters, inputs, ...), not shape {tuple(matrix.shape)}")
    w_OI = as_matrix(matrix.flatten(1), "weight").double()
    centered_OI = w_OI - w_OI.mean(1, keepdim=True)
    constant_O1 = centered_OI.norm(dim=1, keepdim=True) <= 1e-12 * w_OI.norm(dim=1, keepdim=True)
    unit_OI = nn.functional.normalize(centered_OI.masked_fill(constant_O1, 0), dim=1)
    similarity_OO = (unit_OI @ unit_OI.T).abs().clamp(max=1).fill_diagonal_(1)
    if not ordered:
        return similarity_OO.numpy()
    order_O = _seriate(similarity_OO, torch.arange(len(w_OI)), _BISECTIONS)
    return similarity_OO[order_O][:, order_O].numpy()


def _seriate(similarity_OO: Tensor, members: Tensor, bisections: int) -> Tensor:
    """Orders members so that similar ones are neighbors: sorts by the second eigenvector, then within each side."""
    if len(members) < 3:
        return members
    part = similarity_OO[members][:, members]
    scale = part.sum(1).rsqrt()
    along = torch.linalg.eigh(scale[:, None] * part * scale)[1][:, -2] * scale
    ranked = along.argsort(stable=True)
    first = int((along < 0).sum())
    if not bisections or not 0 < first < len(members):
        return members[ranked]
    halves = ranked[:first], ranked[first:]
    return torch.cat([_seriate(similarity_OO, members[half], bisections - 1) for half in halves])
