"""What does a loss cost? This package's loss functions and lightly's, on the same embeddings.

    python benchmarks/losses.py --machine cpu --threads 2 [--methods vicreg simclr] [--quick]
    python benchmarks/losses.py --machine h200 --device cuda

Forward and backward from embeddings (for DINO and SwAV from scores, whose number of prototypes is the dimension) of
two views, which lightly gets as two tensors (ours joins their gradients in one). Both must first give the same loss
and gradient; the largest relative differences are in the table. Then they take turns, so that a busy machine slows
them alike: times are medians, and "faster" is the median of the pairs' ratios. Memory is the peak of what torch
allocates beyond the inputs, the gradient included. `--views` adds what more views cost us. Writes
benchmarks/results/<machine>/losses.json.
"""

from __future__ import annotations

import os

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler else writes lines into the table

import argparse
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from common import Row, clocked, faster, medians, parser, prepare, take_turns, write
from lightly import loss as reference
from torch import Tensor
from torch.nn import functional as F

QUEUE = 4096
MEBI = 2**20


class Pair(NamedTuple):
    """One loss twice: ours of (V, N, D), and lightly's of two (N, D)."""

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor, Tensor], Tensor]
    same: bool = True  # whether both are the same function


Sizes = list[tuple[int, int]]  # of images and dimensions
Build = Callable[[ModuleType, Tensor], Pair]
BUILDERS: dict[str, Build] = {}


def compared(build: Build) -> Build:
    """Registers how to build the losses of the method that the function is named after.

    It gets the method's module and a constant (V, N, D), for targets and the like. Where sizes do not suit the method
    it raises ValueError.
    """
    BUILDERS[build.__name__] = build
    return build


@compared
def barlow_twins(method: ModuleType, constant_VND: Tensor) -> Pair:
    return Pair(lambda z: method.barlow_twins_loss(z, 0.005)[0], reference.BarlowTwinsLoss(lambda_param=0.005))


@compared
def vicreg(method: ModuleType, constant_VND: Tensor) -> Pair:
    return Pair(lambda z: method.vicreg_loss(z)[0], reference.VICRegLoss())


@compared
def frossl(method: ModuleType, constant_VND: Tensor) -> Pair:
    theirs = reference.FroSSLLoss()
    return Pair(lambda z: method.frossl_loss(z)[0], lambda *views: theirs(list(views)))


@compared
def simclr(method: ModuleType, constant_VND: Tensor) -> Pair:
    return Pair(lambda z: method.simclr_loss(z, 0.2)[0], reference.NTXentLoss(0.2))


@compared
def dcl(method: ModuleType, constant_VND: Tensor) -> Pair:
    return Pair(lambda z: method.dcl_loss(z, 0.2)[0], reference.DCLLoss(0.2))


@compared
def dclw(method: ModuleType, constant_VND: Tensor) -> Pair:
    return Pair(lambda z: method.dclw_loss(z, 0.2)[0], reference.DCLWLoss(0.2))


@compared
def moco_v2(method: ModuleType, constant_VND: Tensor) -> Pair:
    """Each view against the other's keys and a queue of its own, which lightly's also moves on."""
    views, images, dim = constant_VND.shape
    keys_VND = F.normalize(constant_VND, dim=-1)
    others_VOND = torch.stack([keys_VND.roll(-shift, 0) for shift in range(1, views)], dim=1)
    queue_VQD = F.normalize(torch.randn(views, QUEUE, dim, device=constant_VND.device), dim=-1)
    losses = [reference.NTXentLoss(0.2, memory_bank_size=(QUEUE, dim)).to(constant_VND.device) for _ in range(2)]
    for loss, queue_QD in zip(losses, queue_VQD, strict=False):
        loss.memory_bank.bank = queue_QD.clone()
    return Pair(
        lambda z: method.moco_v2_loss(z, others_VOND, queue_VQD, 0.2)[0],
        lambda a, b: (losses[0](a, keys_VND[1]) + losses[1](b, keys_VND[0])) / 2,
    )


@compared
def nnclr(method: ModuleType, constant_VND: Tensor) -> Pair:
    """Lightly's guide to NNCLR uses SimCLR's loss, with all other predictions and neighbors as negatives."""
    loss = reference.NTXentLoss(0.1)
    return Pair(
        lambda z: method.nnclr_loss(z, constant_VND, 0.1)[0],
        lambda a, b: (loss(constant_VND[0], b) + loss(constant_VND[1], a)) / 2,
        same=False,
    )


@compared
def byol(method: ModuleType, constant_VND: Tensor) -> Pair:
    loss = reference.NegativeCosineSimilarity()
    return Pair(
        lambda z: method.byol_loss(z, constant_VND),
        lambda a, b: 4 + 2 * (loss(a, constant_VND[1]) + loss(b, constant_VND[0])),
    )


@compared
def simsiam(method: ModuleType, constant_VND: Tensor) -> Pair:
    loss = reference.NegativeCosineSimilarity()
    return Pair(
        lambda z: method.simsiam_loss(z, constant_VND),
        lambda a, b: (loss(a, constant_VND[1]) + loss(b, constant_VND[0])) / 2,
    )


@compared
def dino(method: ModuleType, constant_VND: Tensor) -> Pair:
    """Both move the center."""
    center_K = constant_VND.new_zeros(constant_VND.shape[-1])
    loss = reference.DINOLoss(output_dim=len(center_K), teacher_temp=0.4, student_temp=1.0).to(constant_VND.device)

    def ours(z_VND: Tensor) -> Tensor:
        loss = method.dino_loss(z_VND, constant_VND, center_K, 1.0, 0.4)[0]
        center_K.lerp_(constant_VND.mean((0, 1)), 0.1)
        return loss

    return Pair(ours, lambda *views: loss(list(constant_VND), list(views)))


@compared
def swav(method: ModuleType, constant_VND: Tensor) -> Pair:
    """Scores of standard deviation 1 in place of 0.1, so temperatures ten times as large."""
    heads = importlib.import_module("hf_ssl_or.methods.heads")
    loss = reference.SwaVLoss(temperature=1.0, sinkhorn_epsilon=0.5)
    return Pair(
        lambda z: heads.swapped_cross_entropy(z, method.sinkhorn(z.detach(), 0.5), 1.0)[0],
        lambda *views: loss(list(views), []).squeeze(),
    )


@compared
def mmcr(method: ModuleType, constant_VND: Tensor) -> Pair:
    """Lightly's adds up the centroids as they are, so it gets unit vectors."""
    loss = reference.MMCRLoss(lmda=0.0)

    def theirs(*views: Tensor) -> Tensor:
        unit = [F.normalize(view, dim=-1)[:, None] for view in views]
        return loss(*unit)

    return Pair(lambda z: method.mmcr_loss(z)[0], theirs)


@compared
def lejepa(method: ModuleType, constant_VND: Tensor) -> Pair:
    """One global view, the others local; both draw directions."""
    loss = reference.LeJEPALoss().to(constant_VND.device)

    def ours(z_VND: Tensor) -> Tensor:
        directions = torch.randn(z_VND.shape[-1], 1024, device=z_VND.device)
        return method.lejepa_loss(z_VND, F.normalize(directions, dim=0), 1)[0]

    return Pair(ours, lambda a, b: loss(global_proj=a[None], local_proj=b[None]))


@compared
def wmse(method: ModuleType, constant_VND: Tensor) -> Pair:
    """Both draw one permutation; sub-batches have twice as many images as there are dimensions."""
    views, images, dim = constant_VND.shape
    size = 2 * dim
    if images % size:
        raise ValueError(f"needs batches of a multiple of {size} images")
    loss = reference.WMSELoss(embedding_dim=dim, w_size=size, track_running_stats=False)

    def ours(z_VND: Tensor) -> Tensor:
        return method.wmse_loss(z_VND, torch.randperm(images).to(z_VND.device)[None], size)[0]

    return Pair(ours, lambda *views: loss(torch.cat(views)))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], float]:
    """Returns a function that returns the seconds of one forward and backward, the device's queue included."""

    def work() -> None:
        loss(*inputs).backward()

    def run() -> float:
        for leaf in inputs:
            leaf.grad = None
        return clock()

    clock = clocked(work, inputs[0].device)
    return run


def peak_mebibytes(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """Returns the most that torch has allocated at once during one forward and backward, inputs excluded."""
    for leaf in inputs:
        leaf.grad = None
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(*inputs).backward()
        return (torch.cuda.max_memory_allocated() - before) / MEBI
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss(*inputs).backward()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak / MEBI


def differences(pair: Pair, z_VND: Tensor, views: tuple[Tensor, ...]) -> tuple[float, float]:
    """Returns the relative differences of the two losses and of their gradients, for the same random numbers."""
    torch.manual_seed(0)
    ours = pair.ours(z_VND)
    torch.manual_seed(0)
    theirs = pair.theirs(*views)
    ours.backward()
    theirs.backward()
    expected_VND = torch.stack([view.grad for view in views])
    gradient = (z_VND.grad - expected_VND).norm() / expected_VND.norm()
    return ((ours - theirs) / theirs).abs().item(), gradient.item()


def embeddings(views: int, images: int, dim: int, device: torch.device) -> Tensor:
    """Draws views that have half of their variance in common."""
    noise_VND = torch.randn(views, images, dim, device=device)
    return (torch.randn(images, dim, device=device) + noise_VND) / 2**0.5


def compare(name: str, images: int, dim: int, device: torch.device, budget: float) -> Row:
    """Measures ours and lightly's in turns, until `budget` seconds have passed, but three times at least.

    Raises:
        ModuleNotFoundError: The method is not there.
        ValueError: It cannot work with these sizes.
        RuntimeError: The two losses or gradients are not the same.
    """
    torch.manual_seed(0)
    method = importlib.import_module(f"hf_ssl_or.methods.{name}")
    z_VND, constant_VND = embeddings(2, images, dim, device), embeddings(2, images, dim, device)
    pair = BUILDERS[name](method, constant_VND)
    views = tuple(view.clone().requires_grad_() for view in z_VND)
    inputs = (z_VND.requires_grad_(),)
    loss_difference, gradient_difference = differences(pair, z_VND, views)
    # The sum over 8 million terms in lightly's DINO loss is off by 2e-3 in float32; its gradient is not.
    if pair.same and (loss_difference > 1e-2 or gradient_difference > 1e-3):
        raise RuntimeError(f"losses differ by {loss_difference:.1e}, gradients by {gradient_difference:.1e}")
    times = take_turns([timed(pair.ours, inputs), timed(pair.theirs, views)], budget, warm=False)
    ours_ms, theirs_ms = medians(times)
    ours_mib, theirs_mib = peak_mebibytes(pair.ours, inputs), peak_mebibytes(pair.theirs, views)
    return {
        "method": name,
        "images": images,
        "dim": dim,
        "rounds": len(times),
        "ours_ms": ours_ms,
        "lightly_ms": theirs_ms,
        "times_faster": faster(times, 0, 1),
        "ours_mib": ours_mib,
        "lightly_mib": theirs_mib,
        "times_leaner": theirs_mib / ours_mib,
        "same_function": pair.same,
        "loss_difference": loss_difference,
        "gradient_difference": gradient_difference,
    }


def measure_views(name: str, counts: list[int], images: int, dim: int, device: torch.device, budget: float) -> Row:
    """Measures ours for several numbers of views, in turns."""
    method = importlib.import_module(f"hf_ssl_or.methods.{name}")
    runs = []
    for views in counts:
        torch.manual_seed(0)
        loss = BUILDERS[name](method, embeddings(views, images, dim, device)).ours
        runs.append(timed(loss, (embeddings(views, images, dim, device).requires_grad_(),)))
    times = medians(take_turns(runs, budget))
    return {"method": name, "images": images, "dim": dim, "ours_ms": dict(zip(counts, times, strict=True))}


def show(row: Row) -> None:
    same = f"{row['loss_difference']:10.0e}{row['gradient_difference']:9.0e}" if row["same_function"] else "   another"
    print(
        f"{row['method']:14}{row['images']:6}{row['dim']:6}{row['ours_ms']:11.2f}{row['lightly_ms']:12.2f}"
        f"{row['times_faster']:8.2f}x{row['ours_mib']:11.1f}{row['lightly_mib']:12.1f}{row['times_leaner']:8.2f}x{same}",
        flush=True,
    )


def compare_all(args: argparse.Namespace, sizes: Sizes, device: torch.device) -> list[Row]:
    heads = f"{'ours ms':>11}{'lightly ms':>12}{'faster':>9}{'ours MiB':>11}{'lightly MiB':>12}{'leaner':>9}"
    print(f"{'method':14}{'images':>6}{'dim':>6}{heads}{'loss':>10}{'gradient':>9}")
    rows = []
    for name in args.methods:
        for images, dim in sizes:
            try:
                rows.append(compare(name, images, dim, device, args.seconds))
                show(rows[-1])
            except (ModuleNotFoundError, ValueError, RuntimeError) as error:
                print(f"{name:14}{images:6}{dim:6}   not measured: {error}", flush=True)
    return rows


def compare_views(args: argparse.Namespace, sizes: Sizes, device: torch.device) -> list[Row]:
    print(f"\nours, milliseconds for several numbers of views\n{'method':14}{'images':>6}{'dim':>6}", end="")
    print("".join(f"{views:>11}" for views in args.views))
    rows = []
    for name in args.methods:
        for images, dim in sizes:
            try:
                row = measure_views(name, args.views, images, dim, device, args.seconds)
            except (ModuleNotFoundError, ValueError) as error:
                print(f"{name:14}{images:6}{dim:6}   not measured: {error}", flush=True)
                continue
            rows.append(row)
            print(f"{name:14}{images:6}{dim:6}" + "".join(f"{ms:11.2f}" for ms in row["ours_ms"].values()), flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__, seconds=5)
    arguments.add_argument("--methods", nargs="+", choices=BUILDERS, default=list(BUILDERS), metavar="NAME")
    arguments.add_argument("--dims", type=int, nargs="+", default=[256, 2048, 8192])
    arguments.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    arguments.add_argument(
        "--views", type=int, nargs="*", default=[2, 4, 8], help="ours alone for so many; none to skip"
    )
    args = arguments.parse_args()
    if args.quick:
        args.batches, args.dims, args.seconds = [256], [256, 2048], 0.5
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # lightly's DCLW
    device = prepare(args)
    sizes = [(images, dim) for images in args.batches for dim in args.dims]
    rows = compare_all(args, sizes, device)
    view_rows = compare_views(args, sizes[:1], device) if args.views else []
    write(__file__, args, rows=rows, views=view_rows)


if __name__ == "__main__":
    main()
