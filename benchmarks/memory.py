"""How much memory does a training step need? Each way of saving it, for two encoders and 2, 4 and 8 views.

    python benchmarks/memory.py --machine cpu [--quick] [--threads 2]
    python benchmarks/memory.py --machine h200 --device cuda --images 64

The peak of what torch allocates in one forward and backward pass of VICReg, beyond weights, views and gradients:

    plain        every activation is kept
    blocks       training.gradient_checkpointing: those inside a block are computed twice
    parts        training.forward_chunks = V: V parts, each computed twice. With a ResNet's batch
                 normalization over the whole batch that is "blocks", so it is measured for a ViT alone
    views        the same for a ResNet with training.batch_norm: per_view, whose parts are whole views; stands in the
                 column "parts"

"gradient" is the largest relative difference of a parameter's gradient from the one of the plain step (of "views": of
the plain step with batch_norm: per_view), in float64 and with fewer images. Writes
benchmarks/results/<machine>/memory.json.
"""

from __future__ import annotations

import os

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler else writes lines into the table

import argparse
import warnings

import torch
from common import Row, Table, parser, prepare, write
from torch import Tensor

from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_method
from hf_ssl_or.structures import MultiViewBatch

MEBI = 2**20
WAYS = {"resnet50": ("plain", "blocks", "views"), "vit_small": ("plain", "blocks", "parts")}
COLUMNS = {
    "encoder": ("encoder", ""),
    "views": ("views", "d"),
    "plain_mib": ("plain", ".0f"),
    "blocks_mib": ("blocks", ".0f"),
    "parts_mib": ("parts", ".0f"),
    "gradient_difference": ("gradient", ".0e"),
}


def build(encoder: str, views: int, images: int, size: int, way: str) -> SSLMethod:
    """Builds the method, the same weights for every way; "plain per view" is what "views" is compared with."""
    recipe = recipe_from_dict(
        {
            "data": {"dataset": "shapes", "image_size": size},
            "encoder": {"name": encoder, "patch_size": 16} if encoder.startswith("vit") else {"name": encoder},
            "method": {"name": "vicreg"},
            "views": {"count": views},
            "orthogonality": {"penalty": "none"},
            "training": {"batch_size": images},
        }
    )
    method = build_method(recipe).train()
    use_global_batch_norm(method, images if "view" in way else None)
    method.prepare_chunks(views if way in ("parts", "views") else 1, recompute_blocks=way == "blocks")
    return method


def draw(views: int, images: int, size: int, device: torch.device, dtype: torch.dtype) -> MultiViewBatch:
    """Draws noise."""
    generator = torch.Generator().manual_seed(0)
    views_VBCHW = torch.randn(views, images, 3, size, size, generator=generator, dtype=dtype).to(device)
    return MultiViewBatch(views_VBCHW=views_VBCHW, index_B=torch.arange(images, device=device))


def peak_mebibytes(method: SSLMethod, batch: MultiViewBatch) -> float:
    """Returns the most that torch has allocated at once during a step whose gradients are there already."""
    method(batch).loss.backward()
    if batch.views_VBCHW.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        method(batch).loss.backward()
        return (torch.cuda.max_memory_allocated() - before) / MEBI
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        method(batch).loss.backward()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak / MEBI


def gradients(encoder: str, views: int, way: str) -> dict[str, Tensor]:
    """Computes gradients of a small batch in float64."""
    method = build(encoder, views, 4, 32, way).double()
    method(draw(views, 4, 32, torch.device("cpu"), torch.float64)).loss.backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def gradient_difference(encoder: str, views: int, way: str) -> float:
    """Returns the largest relative difference of a gradient from that of the whole batch kept in memory."""
    want = gradients(encoder, views, "plain per view" if way == "views" else "plain")
    got = gradients(encoder, views, way)
    largest = max(gradient.norm() for gradient in want.values())
    return max(((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-6 * largest)).item() for n in want)


def measure(args: argparse.Namespace, device: torch.device, encoder: str, views: int) -> Row:
    """Measures every way for one encoder and number of views."""
    row: Row = {"encoder": encoder, "views": views}
    for way in WAYS[encoder]:
        method = build(encoder, views, args.images, args.size, way).to(device)
        key = "parts_mib" if way == "views" else f"{way}_mib"
        row[key] = peak_mebibytes(method, draw(views, args.images, args.size, device, torch.float32))
        del method
    row["gradient_difference"] = max(gradient_difference(encoder, views, way) for way in WAYS[encoder][1:])
    return row


def main() -> None:
    arguments = parser(__doc__, seconds=0)
    arguments.add_argument("--images", type=int, default=8)
    arguments.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    arguments.add_argument("--views", type=int, nargs="+", default=[2, 4, 8])
    args = arguments.parse_args()
    if args.quick:
        args.size = 64
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
    device = prepare(args)
    print(f"MiB for {args.images} images of {args.size} pixels")
    table = Table(COLUMNS)
    for encoder in WAYS:
        for views in args.views:
            table.add(measure(args, device, encoder, views))
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
