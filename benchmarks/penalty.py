"""What does the orthogonality penalty cost? Closed form against autograd layer by layer, and against a training step.

    python benchmarks/penalty.py --machine cpu [--quick] [--threads 2]

Per encoder and penalty: milliseconds of `add_gradients`, of the same gradient by autograd in a plain loop over layers,
and of one forward and backward pass of a training step, measured on a small batch and also scaled to 512 images (the
paper's 256 images in two views), since the penalty does not depend on the batch. Prints a table and writes
benchmarks/results/<machine>/penalty.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality import OrthogonalityRegularizer

ENCODERS = ("resnet18", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224")
RUN_IMAGES = 512
SIDE = 32


def milliseconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of `work`, the device's queue included, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def autograd_loop(weights: list[Tensor], penalty: str, vectors: list[Tensor]) -> None:
    """What one writes first: a Gram, a norm and a graph for each layer; for SRIP, the paper's two power iterations."""
    total = weights[0].new_zeros(())
    for weight, v in zip(weights, vectors, strict=True):
        w = weight.flatten(1)
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        m = gram - torch.eye(len(gram), device=w.device)
        if penalty == "so":
            total = total + m.pow(2).sum()
        else:
            u = m @ v
            total = total + (m @ u).norm() / u.norm()
    (1e-6 * total).backward()


def build(name: str) -> nn.Module:
    """The encoder as one uses it on images of 32 x 32: patches of 4, or a stem of one 3 x 3 convolution."""
    if name.startswith("vit"):
        return timm.create_model(name, num_classes=0, img_size=SIDE, patch_size=4)
    encoder = timm.create_model(name, num_classes=0)
    encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    encoder.maxpool = nn.Identity()
    return encoder


def measure(name: str, batch: int, repeats: int, device: torch.device) -> list[dict[str, object]]:
    encoder = build(name).to(device)
    images = torch.randn(batch, 3, SIDE, SIDE, device=device)

    def training_step() -> None:
        encoder.zero_grad()
        encoder(images).square().mean().backward()

    step = milliseconds(training_step, repeats, device)
    rows = []
    for penalty in ("so", "srip"):
        regularizer = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty=penalty, weight=1e-6))
        weights = [encoder.get_parameter(layer) for layer in regularizer.names]
        vectors = [torch.randn(min(w.shape[0], w[0].numel()), device=device) for w in weights]
        ours = milliseconds(regularizer.add_gradients, repeats, device)
        loop = milliseconds(lambda p=penalty, w=weights, v=vectors: autograd_loop(w, p, v), repeats, device)
        rows.append(
            {
                "encoder": name,
                "penalty": penalty,
                "add_gradients_ms": ours,
                "autograd_loop_ms": loop,
                "times_faster": loop / ours,
                "step_ms": step,
                "step_images": batch,
                "share_of_step": ours / (ours + step),
                "share_of_step_at_512_images": ours / (ours + step * RUN_IMAGES / batch),
            }
        )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    heads = ("ours ms", "loop ms", "faster", "step ms", "share", "at 512")
    print(f"{'encoder':24}{'penalty':9}" + "".join(f"{head:>9}" for head in heads))
    for row in rows:
        print(
            f"{row['encoder']:24}{row['penalty']:9}{row['add_gradients_ms']:9.1f}{row['autograd_loop_ms']:9.1f}"
            f"{row['times_faster']:8.1f}x{row['step_ms']:9.1f}{row['share_of_step']:9.1%}"
            f"{row['share_of_step_at_512_images']:9.2%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="cpu", help="name of the folder under benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two encoders, a smaller batch, fewer repeats")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    encoders = (ENCODERS[0], ENCODERS[2]) if args.quick else ENCODERS
    batch, repeats = (8, 3) if args.quick else (32, 5)
    rows = [row for name in encoders for row in measure(name, batch, repeats, device)]
    show(rows)
    path = Path(__file__).parent / "results" / args.machine / "penalty.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "device": str(device), "threads": args.threads, "side": SIDE}
    path.write_text(json.dumps({**about, "quick": args.quick, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
