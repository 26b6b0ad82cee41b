from __future__ import annotations

from hf_ssl_or.orthogonality.callback import OrthogonalityCallback
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer

__all__ = ["OrthogonalityCallback", "OrthogonalityRegularizer"]
