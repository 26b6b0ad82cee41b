"""How fast is an evaluation? Logistic regression beside scikit-learn's, exact kNN, and where the time goes.

    python benchmarks/evaluation.py --machine cpu [--quick] [--threads 2] [--dataset /data/cifar10]

Features are real ones of width 512: responses of 128 patches of the training images, averaged over quadrants. Ours and
scikit-learn's classifiers get the same standardized float32 features, and take turns. "one penalty" is a single fit;
"protocol" is all of linear-lbfgs: nine penalties, each from the minimum before, evaluated on held-out images, and the
last fit on all. The profile takes ResNet-18 with the small stem at 32 pixels; times of an image are measured on a
sample, and those of the votes at full size. Prints lines and writes benchmarks/results/<machine>/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression as Reference
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.evaluation.protocols.knn import knn_accuracy
from hf_ssl_or.evaluation.protocols.linear_probe import LogisticProtocol
from hf_ssl_or.evaluation.protocols.logistic import LogisticRegression
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.randomness import keyed_generator, keyed_permutation

L2 = 1e-3
PATCHES, PATCH = 128, 6

Split = tuple[Tensor, Tensor]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of `work`, the device's queue included, and what it gives."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def patch_features(images: ImageSet, source: ImageSet) -> Tensor:
    """Rectified responses to patches of `source`, averaged over quadrants: (n, 4 * PATCHES)."""
    chosen = torch.randint(len(source), (PATCHES,), generator=keyed_generator("benchmark")).numpy()
    middle = (source.image_size - PATCH) // 2
    patches = source.unit_squares(chosen)[:, :, middle : middle + PATCH, middle : middle + PATCH]
    patches = F.normalize((patches - patches.mean((1, 2, 3), keepdim=True)).flatten(1)).view_as(patches)
    parts = []
    for index_B in torch.arange(len(images)).split(1000):
        response = F.conv2d(images.unit_squares(index_B.numpy()), patches, stride=2) - 0.1
        parts.append(F.adaptive_avg_pool2d(response.relu(), 2).flatten(1))
    return torch.cat(parts)


def scikit_fit(x: Tensor, y: Tensor, l2: float) -> Reference:
    return Reference(C=1 / (len(y) * l2), max_iter=10_000).fit(x.cpu().numpy(), y.cpu().numpy())


def scikit_protocol(x: Tensor, y: Tensor) -> Reference:
    """Linear-lbfgs with scikit-learn: the same held-out images, penalties and warm starts."""
    protocol = LogisticProtocol(name="linear-lbfgs")
    order = torch.from_numpy(keyed_permutation(len(y), 0, "held out"))
    aside = round(protocol.held_out * len(y))
    kept, held_out = order[aside:], order[:aside]
    model, scores = Reference(max_iter=10_000, warm_start=True), []
    for l2 in protocol.penalties:
        model.C = 1 / (len(kept) * l2)
        scores.append(model.fit(x[kept].numpy(), y[kept].numpy()).score(x[held_out].numpy(), y[held_out].numpy()))
    return scikit_fit(x, y, protocol.penalties[scores.index(max(scores))])


def linear(train: Split, test: Split, repeats: int, device: torch.device, protocol: bool) -> dict[str, Any]:
    """Both classifiers in turn: seconds (medians) and accuracies in percent."""
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    classes, seconds = int(y.max()) + 1, {"ours": [], "scikit_learn": []}
    there = x.to(device), y.to(device)
    if protocol:
        evaluate = LogisticProtocol(name="linear-lbfgs")
        work = {
            "ours": lambda: evaluate.fit(*there, classes, 0),
            "scikit_learn": lambda: scikit_protocol(x, y),
        }
    else:
        work = {
            "ours": lambda: LogisticRegression(*there, classes).solve(L2),
            "scikit_learn": lambda: scikit_fit(x, y, L2),
        }
    results = {}
    for _ in range(repeats):
        for name, run in work.items():
            spent, results[name] = timed(run, device)
            seconds[name].append(spent)
    ours = results["ours"]
    weight, bias = (ours.weight.detach(), ours.bias.detach()) if protocol else ours
    correct = (x_test @ weight.cpu().T + bias.cpu()).argmax(1) == y_test
    row = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    return row | {
        "task": "protocol" if protocol else f"one penalty, {L2:g}",
        "times_faster": row["scikit_learn_seconds"] / row["ours_seconds"],
        "ours_top1": 100 * float(correct.double().mean()),
        "scikit_learn_top1": 100 * results["scikit_learn"].score(x_test.numpy(), y_test.numpy()),
        "images": len(y),
        "width": x.shape[1],
    }


def profile(arguments: DataArguments, sample: int, totals: int, votes: float, device: torch.device) -> dict[str, Any]:
    """Shares of a whole kNN evaluation: decoding, transfer and normalization, forward passes, votes."""
    arguments = DataArguments(
        dataset=arguments.dataset, fraction=sample / totals, cache="none", num_workers=torch.get_num_threads()
    )
    load_images(arguments, "test", squares=True)  # opens the files once
    decoding, images = timed(lambda: load_images(arguments, "train", squares=True), device)
    encoder = create_encoder("resnet18", image_size=32, stem="small").eval().to(device)
    moving = forward = 0.0
    with torch.no_grad():
        encoder(torch.zeros(256, 3, 32, 32, device=device))
        shares = np.array_split(np.arange(len(images)), -(-len(images) // 256))
        batches = images.clean(shares, device)
        for _ in shares:
            spent, x = timed(lambda: next(batches), device)
            moving += spent
            forward += timed(lambda x=x: encoder(x).pooler_output.cpu(), device)[0]
    scale = totals / len(images)
    seconds = {"decode": decoding * scale, "transfer": moving * scale, "forward": forward * scale, "votes": votes}
    whole = sum(seconds.values())
    return {
        "images": totals,
        "measured_on": len(images),
        **{f"{name}_seconds": value for name, value in seconds.items()},
        **{f"{name}_share": value / whole for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="cpu", help="name of the folder under benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dataset", help="labeled images of 32 pixels (default: $HF_SSL_OR_DATA/cifar10, or shapes)")
    parser.add_argument("--quick", action="store_true", help='a tenth of the images, once, without "protocol"')
    parser.add_argument("--repeats", type=int, default=3, help="of a single fit and of the votes")
    parser.add_argument("--no-protocol", action="store_true", help='without "protocol", most of the time')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cifar = Path(os.environ.get("HF_SSL_OR_DATA", "")) / "cifar10"
    dataset = args.dataset or (str(cifar) if cifar.is_dir() else "shapes")
    share, repeats = (0.1, 1) if args.quick else (1.0, args.repeats)
    data = DataArguments(dataset=dataset, fraction=share, shapes_train=50_000, shapes_test=10_000)
    images, test_images = load_images(data, "train", squares=True), load_images(data, "test", squares=True)
    train = patch_features(images, images), images.labels
    test = patch_features(test_images, images), test_images.labels

    rows = []
    for protocol in (False,) if args.quick or args.no_protocol else (False, True):
        row = linear(train, test, 1 if protocol else repeats, device, protocol)
        rows.append(row)
        print(
            f"logistic regression, {row['task']}: ours {row['ours_seconds']:.2f} s {row['ours_top1']:.2f} %, "
            f"scikit-learn {row['scikit_learn_seconds']:.2f} s {row['scikit_learn_top1']:.2f} %, "
            f"{row['times_faster']:.1f}x",
            flush=True,
        )
    there = [tensor.to(device) for tensor in (*train, *test)]
    votes = statistics.median(timed(lambda: knn_accuracy(*there), device)[0] for _ in range(repeats))
    print(f"kNN, {len(test[0])} x {len(train[0])} x {train[0].shape[1]}: {votes:.2f} s", flush=True)
    total = len(train[0]) + len(test[0])
    spent = profile(data, 500 if args.quick else 2000, total, votes, device)
    print(
        "evaluation: "
        + ", ".join(f"{n} {spent[f'{n}_share']:.1%}" for n in ("decode", "transfer", "forward", "votes"))
    )

    path = Path(__file__).parent / "results" / args.machine / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "scikit_learn": sklearn.__version__, "device": str(device)}
    about |= {"threads": args.threads, "quick": args.quick, "dataset": Path(dataset).name}
    knn = {"queries": len(test[0]), "bank": len(train[0]), "width": train[0].shape[1], "seconds": votes}
    path.write_text(json.dumps({**about, "linear": rows, "knn": knn, "profile": spent}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
