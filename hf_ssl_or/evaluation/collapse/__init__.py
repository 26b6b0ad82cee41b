"""Measures of dimensional collapse: ranks and spectra of representations, of hidden features and of weights."""

from __future__ import annotations

from hf_ssl_or.evaluation.collapse.measures import (
    AlphaReq,
    alpha_req,
    collapse_report,
    effective_rank,
    lidar,
    nesum,
    participation_ratio,
    rankme,
    stable_rank,
    weight_report,
)

__all__ = [
    "AlphaReq",
    "alpha_req",
    "collapse_report",
    "effective_rank",
    "lidar",
    "nesum",
    "participation_ratio",
    "rankme",
    "stable_rank",
    "weight_report",
]
