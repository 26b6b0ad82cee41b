"""How much memory does a training step need? Each way of saving it, for two encoders and 2, 4 and 8 views.

    python benchmarks/memory.py --machine cpu [--quick] [--threads 2]
    python benchmarks/memory.py --machine h200 --device cuda --images 64

The peak of what torch allocates in one forward and backward pass of VICReg, beyond weights, views and gradients:

    plain        every activation is kept
    blocks       training.gradient_checkpointing: those inside a block are computed twice
    parts        training.gradient_accumulation_steps = V: V parts, each computed twice. With a ResNet's batch
                 normalisation over the whole batch that is "blocks", so it is measured for a ViT alone
    views        the same for a ResNet with training.batch_norm: per_view, whose parts are whole views

"gradient" is the largest relative difference of a parameter's gradient from the one of the plain step (of "views": of
the plain step with batch_norm: per_view), in float64 and with fewer images. Writes
benchmarks/results/<machine>/memory.json.
"""

from __future__ import annotations

import os

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler else writes lines into the table

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ssl_or.distributed import use_global_batch_norm
from hf_ssl_or.methods.base import SSLMethod
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import build_method
from hf_ssl_or.structures import MultiViewBatch

MEBI = 2**20
WAYS = {"resnet50": ("plain", "blocks", "views"), "vit_small": ("plain", "blocks", "parts")}


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
    method.prepare_accumulation(views if way in ("parts", "views") else 1, recompute_blocks=way == "blocks")
    return method


def draw(views: int, images: int, size: int, device: torch.device, dtype: torch.dtype) -> MultiViewBatch:
    """Draws noise."""
    generator = torch.Generator().manual_seed(0)
    views_VBCHW = torch.randn(views, images, 3, size, size, generator=generator, dtype=dtype).to(device)
    return MultiViewBatch(views_VBCHW=views_VBCHW, index_B=torch.arange(images, device=device))


def peak_mebibytes(method: SSLMethod, batch: MultiViewBatch) -> float:
    """Gives the most that torch has allocated at once during a step whose gradients are there already."""
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
    """Gives the largest relative difference of a parameter's gradient from that of the whole batch kept in memory."""
    want = gradients(encoder, views, "plain per view" if way == "views" else "plain")
    got = gradients(encoder, views, way)
    largest = max(gradient.norm() for gradient in want.values())
    return max(((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-6 * largest)).item() for n in want)


def measure(args: argparse.Namespace, encoder: str, views: int) -> dict[str, Any]:
    """Measures every way for one encoder and number of views."""
    device, row = torch.device(args.device), {"encoder": encoder, "views": views}
    for way in WAYS[encoder]:
        method = build(encoder, views, args.images, args.size, way).to(device)
        row[f"{way}_mib"] = peak_mebibytes(method, draw(views, args.images, args.size, device, torch.float32))
        del method
    row["gradient_difference"] = max(gradient_difference(encoder, views, way) for way in WAYS[encoder][1:])
    return row


def show(row: dict[str, Any]) -> None:
    cells = [row["plain_mib"], row["blocks_mib"], row["views_mib" if "views_mib" in row else "parts_mib"]]
    numbers = "".join(f"{cell:13.0f}" for cell in cells)
    print(f"{row['encoder']:12}{row['views']:6}{numbers}{row['gradient_difference']:12.0e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="cpu", help="name of the folder under benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--quick", action="store_true", help="8 images of 64 pixels")
    args = parser.parse_args()
    if args.quick:
        args.images, args.size = 8, 64
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
    torch.set_num_threads(args.threads)
    print(f"MiB for {args.images} images of {args.size} pixels")
    print(f"{'encoder':12}{'views':>6}{'plain':>13}{'blocks':>13}{'parts, views':>13}{'gradient':>12}")
    rows = []
    for encoder in WAYS:
        for views in args.views:
            rows.append(measure(args, encoder, views))
            show(rows[-1])
    about = {"torch": torch.__version__, "device": args.device, "images": args.images, "size": args.size}
    path = Path(__file__).parent / "results" / args.machine / "memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "quick": args.quick, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
