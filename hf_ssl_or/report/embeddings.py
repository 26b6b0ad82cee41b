"""Pictures of what the encoder sees alike: nearest neighbors of images, and test features in two dimensions."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.curation import nearest_neighbors
from hf_ssl_or.report.style import FAINT, MARKERS, Drawn, add_legend, color, legend_height, panels, save, shorten
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.reader import Arrays, RunRecord
from hf_ssl_or.runs.representations import Embedding, round_to_digits

MOST_CLASSES = 10  # that a legend tells apart
NEIGHBORS = 10
_TILE = 0.72  # inches
_NEEDS_UMAP = "--umap: needs the package umap-learn; install it with: pip install 'hf-ssl-or[report]'"


def plot_neighbors(run: RunRecord, folder: Path, file: str, *, title: str) -> Drawn | None:
    """Draws images of a run, each with its nearest neighbors and their cosine distances."""
    if not run.neighbors:
        return None
    tiles, distances = run.neighbors["images"], run.neighbors["distances"]
    labels = run.neighbors.get("labels")
    queries, shown = tiles.shape[:2]
    figure, (axes,) = panels(
        1, width=_TILE * (shown + 0.35), height=1.28 * _TILE * queries, left=0.1, top=0.3, bottom=0.1
    )
    axes.set(xlim=(0, shown + 0.35), ylim=(1.28 * queries, 0), xticks=[], yticks=[], frame_on=False)
    for q in range(queries):
        for p in range(shown):
            x, y = p + (0.3 if p else 0.0), 1.28 * q
            axes.imshow(tiles[q, p].transpose(1, 2, 0), extent=(x, x + 0.95, y + 0.95, y), interpolation="nearest")
            if p:
                same = labels is not None and labels[q, p] == labels[q, 0]
                mark = "" if labels is None else " \N{CHECK MARK}" if same else " \N{MULTIPLICATION SIGN}"
                axes.text(x + 0.475, y + 1.1, f"{distances[q, p - 1]:.3f}{mark}", ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, shown + 0.35), ylim=(1.28 * queries, 0))
    axes.text(0, -0.1, "image", fontweight="bold")
    axes.text(1.3, -0.1, "nearest neighbors, cosine distance", fontweight="bold")
    alt, marks = f"{queries} images of the sample, each with its {shown - 1} nearest neighbors.", ""
    if labels is not None and shown > 1:
        share = 100 * float((labels[:, 1:] == labels[:, :1]).mean())
        alt += f" {share:.0f} % of the neighbors have the class of their image."
        marks = " \N{CHECK MARK} has the class of the image, \N{MULTIPLICATION SIGN} has another."
    caption = f"Neighbors among the images of the run's sample, by cosine of their features.{marks}"
    return save(figure, folder, file, title=title, alt=alt, caption=caption)


def plot_embedding(runs: Sequence[RunRecord], folder: Path, *, umap: bool) -> list[Drawn]:
    """Draws the features of every run's sample in two dimensions, by PCA and, when asked for, by UMAP.

    Raises:
        InputError: UMAP is asked for and not installed.
    """
    found = [run for run in runs if run.features]
    methods = ["PCA", *(["UMAP"] if umap else [])] if found else []
    return [plot_points({run.name: embed(run.features, method) for run in found}, folder) for method in methods]


def embed(arrays: Arrays, method: str) -> Embedding:
    """Reduces features to two dimensions.

    Args:
        arrays: Those of a run's file of features: `features` (N, F), `labels` (N,) and `class_names`.
        method: "PCA" or "UMAP".
    """
    features_NF, labels, variance = arrays["features"], arrays.get("labels"), None
    if method == "UMAP":
        xy = _umap(features_NF)
    else:
        xy, share = principal_components(features_NF)
        variance = 100 * share
    return Embedding(
        method=method,
        x=round_to_digits(xy[:, 0]),
        y=round_to_digits(xy[:, 1]),
        labels=[] if labels is None else labels.tolist(),
        class_names=_class_names(labels, arrays.get("class_names")),
        variance=variance,
        same_class=None if labels is None else class_agreement(features_NF, labels),
    )


def class_agreement(features_NF: np.ndarray, labels_N: np.ndarray) -> float:
    """Returns the share of each image's 10 nearest neighbors, by cosine, that have its class, in percent."""
    k = min(NEIGHBORS, len(features_NF) - 1)
    _, index_NK = nearest_neighbors(torch.from_numpy(features_NF.astype(np.float32)), k)
    return 100 * float((labels_N[index_NK.numpy()] == labels_N[:, None]).mean())


def check_umap() -> None:
    """Refuses UMAP where it is not installed, before anything is drawn."""
    if not has_umap():
        raise InputError(_NEEDS_UMAP)


def has_umap() -> bool:
    """Says whether UMAP is installed."""
    return importlib.util.find_spec("umap") is not None


def principal_components(features_NF: np.ndarray) -> tuple[np.ndarray, float]:
    """Projects features on their two directions of most variance, found by block power iteration (seeded).

    Returns:
        (N, 2) float32, and the share of the variance that the two hold; zeros for features that do not vary.
    """
    x_NF = features_NF.astype(np.float32)
    x_NF = x_NF - x_NF.mean(0)
    total = float(np.square(x_NF, dtype=np.float64).sum())
    if total == 0:
        return np.zeros((len(x_NF), 2), np.float32), 0.0
    block = np.random.default_rng(0).standard_normal((x_NF.shape[1], min(16, *x_NF.shape))).astype(np.float32)
    for _ in range(8):
        block = np.linalg.qr(x_NF.T @ (x_NF @ block))[0]
    left, singular, _ = np.linalg.svd(x_NF @ block, full_matrices=False)
    return left[:, :2] * singular[:2], float(np.square(singular[:2], dtype=np.float64).sum()) / total


def _umap(features_NF: np.ndarray) -> np.ndarray:
    import warnings

    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed allows one thread only
        neighbors = min(15, len(features_NF) - 1)
        return UMAP(n_neighbors=neighbors, random_state=0).fit_transform(features_NF.astype(np.float32))


def plot_points(found: Mapping[str, Embedding], folder: Path) -> Drawn:
    """Draws features in two dimensions, a panel for each name of a run or arm; all are by one method."""
    method, *_ = {embedding.method for embedding in found.values()}
    names = _shared_names(list(found.values()))
    labels = [shorten(name, 20) for name in names]
    top = 0.4 + legend_height(labels, 3.2 * min(len(found), 3))
    figure, all_axes = panels(len(found), width=2.95, height=2.95, left=0.15, gap=(0.25, 0.5), top=top, bottom=0.15)
    for axes, (name, embedding) in zip(all_axes, found.items(), strict=True):
        _scatter_classes(axes, np.column_stack([embedding.x, embedding.y]), np.array(embedding.labels))
        axes.set(xticks=[], yticks=[])
        axes.set_title(shorten(name))
        for spine in axes.spines.values():
            spine.set(visible=True, color=FAINT)
    add_legend(figure, [_dot(i) for i in range(len(names))], labels)
    colors = " Colors and shapes are classes." if any(embedding.labels for embedding in found.values()) else ""
    many = " There are more classes than can be told apart; colors repeat." if colors and not names else ""
    note = f"{_measures(found)}{' Distances between groups mean little.' if method == 'UMAP' else ''}"
    count = ", ".join(f"{name}: {len(embedding.x)} images" for name, embedding in found.items())
    alt = f"Scatter plot of features by {method}, one panel each ({count}).{colors}{note}"
    caption = f"Features of the run's sample of test images (training images without a test set).{colors}{many}{note}"
    title = f"Features in two dimensions ({method})"
    return save(figure, folder, f"embedding-{method.lower()}", title=title, alt=alt, caption=caption)


def _measures(found: Mapping[str, Embedding]) -> str:
    """Says what the two dimensions hold, and how many neighbors in all dimensions have the class of their image."""
    held = [f"{name}: {e.variance:.0f} % of the variance" for name, e in found.items() if e.variance is not None]
    alike = [f"{name}: {e.same_class:.1f} %" for name, e in found.items() if e.same_class is not None]
    sentences = [f" {'; '.join(held)}."] if held else []
    if alike:
        sentences.append(
            f" Of an image's {NEIGHBORS} nearest neighbors in all dimensions, so many have its class: "
            f"{'; '.join(alike)}."
        )
    return "".join(sentences)


def _class_names(labels: np.ndarray | None, given: np.ndarray | None) -> list[str]:
    """Names the classes, if they are few enough for a legend."""
    count = 0 if labels is None else int(labels.max()) + 1
    if count > MOST_CLASSES:
        return []
    if given is not None and given.ndim == 1 and len(given) >= count:
        return [printable(name) for name in given[:count]]
    return [f"class {i}" for i in range(count)]


def _shared_names(embeddings: Sequence[Embedding]) -> list[str]:
    """Returns the names of classes that all share."""
    first = embeddings[0].class_names
    return first if all(embedding.class_names == first for embedding in embeddings) else []


def _scatter_classes(axes: Axes, xy: np.ndarray, labels: np.ndarray) -> None:
    if not len(labels):
        axes.scatter(xy[:, 0], xy[:, 1], s=6, color=color(0), alpha=0.6, linewidths=0, rasterized=True)
        return
    for i in range(MOST_CLASSES):
        mine = labels % MOST_CLASSES == i
        axes.scatter(
            xy[mine, 0], xy[mine, 1], s=8, color=color(i), marker=MARKERS[i], alpha=0.7, linewidths=0, rasterized=True
        )


def _dot(i: int) -> Line2D:
    return Line2D([], [], color=color(i), marker=MARKERS[i], linestyle="none")
