"""What the fork server of `processes` imports before it forks; nothing here computes, so that a fork is safe."""

from __future__ import annotations

import matplotlib.pyplot
import torch.distributed
import torch.nn.parallel
import torch.utils.tensorboard

import hf_ssl_or.cli
import hf_ssl_or.report.preview
import hf_ssl_or.run
import hf_ssl_or.show
from hf_ssl_or.hub.redaction import mask
from hf_ssl_or.methods import available_methods, get_method

__all__ = ["hf_ssl_or", "mask", "matplotlib", "torch"]

for name in ("byol", "barlow_twins"):
    get_method(name)
assert available_methods()
