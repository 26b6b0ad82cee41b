"""Which matrices of an encoder are regularised.

Every convolution and linear weight, seen as (out, in * kh * kw). A grouped convolution is as many matrices as it has
groups, because groups share neither inputs nor outputs. With `split_qkv` a fused attention weight (3 * d, d) is three
matrices. Norms, biases, tokens, position tables and weights without inputs or outputs are never among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@dataclass(frozen=True)
class Site:
    """A layer whose weight is `parts` equal matrices, one below the other.

    The weight is read from the layer at each use, so the encoder may be moved, cast or loaded in between.
    """

    name: str
    layer: Layer
    parts: int

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return self.layer.weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (O, I) of one matrix."""
        outputs = self.weight.shape[0]
        return outputs // self.parts, self.weight.numel() // outputs

    def matrices(self, gathered: Tensor | None = None) -> Tensor:
        """The weight as a stack (parts, O, I); a view of contiguous weights, and of channels-last ones that are wide.

        Args:
            gathered: All of a weight that is sharded over processes.
        """
        weight = self.weight if gathered is None else gathered
        return self._ordered(weight).reshape(self.parts, *self.matrix_shape)

    def like_weight(self, update_POI: Tensor) -> Tensor:
        """An update of `matrices()` with the shape, memory order and type of the weight."""
        weight = self.weight
        ordered = self._ordered(weight)
        update = update_POI.reshape(ordered.shape)
        return (update if ordered is weight else update.movedim(-1, 1)).to(weight.dtype)

    def _ordered(self, weight: Tensor) -> Tensor:
        """Orders the columns as they lie in memory, which penalties do not see; the vectors of tall matrices do."""
        outputs, inputs = self.matrix_shape
        return weight if weight.is_contiguous() or outputs > inputs else weight.movedim(1, -1)


def select_sites(encoder: nn.Module, config: OrthogonalityConfig) -> list[Site]:
    """Selects the weights that `include`, `exclude` and `split_qkv` ask for, each shared weight once.

    Raises:
        InputError: A pattern matches no weight, `split_qkv` finds no fused weight, a weight is parametrised, or
            nothing is selected.
    """
    names = {name for name, _ in encoder.named_parameters()}  # a shared weight under its first name only
    layers = {}
    for path, layer in encoder.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(layer, Layer) and (name in names or not isinstance(layer.weight, nn.Parameter)):
            layers[name] = layer
    included = _matches("include", config.include, layers) if config.include else layers.keys()
    excluded = _matches("exclude", config.exclude, layers)
    sites = [
        Site(name, layer, _parts(name, layer, config.split_qkv))
        for name, layer in layers.items()
        if name in included and name not in excluded and layer.weight.numel()
    ]
    if not sites:
        raise InputError("orthogonality: no convolution or linear weight is selected; see include and exclude")
    if config.split_qkv and not any(_is_fused(site.name, site.layer) for site in sites):
        raise InputError("orthogonality.split_qkv: no selected weight is a fused qkv weight; leave it false")
    for site in sites:
        if site.name not in names:
            raise InputError(f"orthogonality: {site.name!r} is parametrised, not a parameter; add it to exclude")
    return sites


def _matches(field: str, patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise unknown(f"orthogonality.{field} pattern", pattern, names)
        found |= matched
    return found


def _parts(name: str, layer: Layer, split_qkv: bool) -> int:
    if isinstance(layer, nn.Linear):
        return 3 if split_qkv and _is_fused(name, layer) else 1
    return layer.groups


def _is_fused(name: str, layer: Layer) -> bool:
    if not isinstance(layer, nn.Linear) or "." not in name:
        return False
    return "qkv" in name.split(".")[-2] and layer.out_features == 3 * layer.in_features
