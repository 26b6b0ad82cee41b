"""Configurations: the orthogonality settings of a run, and the two families of encoders that carry them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError


@strict
@dataclass(kw_only=True)
class OrthogonalityConfig:
    """How the weights of an encoder are kept near orthogonal (He, Du, Ma, NeurIPS 2024; Bansal et al., NeurIPS 2018).

    Attributes:
        penalty: Soft orthogonality "so", its spectral norm "srip", double-sided "dso", "mutual_coherence", or "none".
        weight: Factor of the summed penalty in the loss; "auto" takes the paper's value for the encoder.
        normalize: Divide each matrix's penalty by its size, so that one weight suits small and large encoders.
        power_iterations: Power iterations per evaluation of the spectral norm (SRIP only).
        fresh_start: Start each power iteration at a random vector instead of the last step's (SRIP only); with two
            iterations, the paper's estimate.
        schedule: How the weight changes during the run: "constant", the "step" decay of Bansal et al., or "cosine".
        every: The penalty acts at every so many steps.
        include: Glob patterns of the parameter names to take; empty for all convolution and linear weights.
        exclude: Glob patterns of the parameter names to leave out.
        split_qkv: Treat the query, key and value rows of a fused attention weight as three matrices.
        seed: Seed of the power iteration's vectors.

    Raises:
        ValueError: A value is out of range.
    """

    penalty: Literal["none", "so", "srip", "dso", "mutual_coherence"] = "so"
    weight: float | int | Literal["auto"] = "auto"
    normalize: bool = False
    power_iterations: int = 1
    fresh_start: bool = False
    schedule: Literal["constant", "step", "cosine"] = "constant"
    every: int = 1
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    split_qkv: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight != "auto" and not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight: a finite number of at least 0 or 'auto', not {self.weight}")
        for name, least in (("power_iterations", 1), ("every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least}, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OrthogonalityConfig":
        """Makes the settings from `to_dict`'s answer, or part of it.

        Raises:
            ValueError: A key is unknown, or a value has the wrong type or range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"orthogonality: unknown key {key!r}, the keys are {', '.join(known)}")
        try:
            return cls(**values)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"orthogonality: {' '.join(str(error).split())}") from error
