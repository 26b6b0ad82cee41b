"""Pictures of what the encoder sees alike: nearest neighbors of images, and test features in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hf_ssl_or.errors import InputError
from hf_ssl_or.report.style import FAINT, MARKERS, Drawn, add_legend, color, legend_height, panels, save, shorten
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.reader import RunRecord

MOST_CLASSES = 10  # that a legend tells apart
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
    if not found:
        return []
    points = [principal_components(run.features["features"]) for run in found]
    axes = [f"{run.name}: {100 * share:.0f} % of the variance" for run, (_, share) in zip(found, points, strict=True)]
    drawn = [_scatter(found, [xy for xy, _ in points], folder, "embedding-pca", "PCA", f" {'; '.join(axes)}.")]
    if umap:
        xy = [_umap(run.features["features"]) for run in found]
        drawn.append(_scatter(found, xy, folder, "embedding-umap", "UMAP", " Distances between groups mean little."))
    return drawn


def check_umap() -> None:
    """Refuses UMAP where it is not installed, before anything is drawn."""
    try:
        import umap  # noqa: F401
    except ImportError as error:
        raise InputError(_NEEDS_UMAP) from error


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


def _scatter(
    runs: Sequence[RunRecord], points: Sequence[np.ndarray], folder: Path, file: str, method: str, note: str
) -> Drawn:
    names = _class_names(runs)
    labels = [shorten(name, 20) for name in names]
    top = 0.4 + legend_height(labels, 3.2 * min(len(runs), 3))
    figure, all_axes = panels(len(runs), width=2.95, height=2.95, left=0.15, gap=(0.25, 0.5), top=top, bottom=0.15)
    for axes, run, xy in zip(all_axes, runs, points, strict=True):
        _scatter_classes(axes, xy, run.features.get("labels"))
        axes.set(xticks=[], yticks=[])
        axes.set_title(shorten(run.name))
        for spine in axes.spines.values():
            spine.set(visible=True, color=FAINT)
    handles = [_dot(i) for i in range(len(names))]
    add_legend(figure, handles, labels)
    colors = "" if "labels" not in runs[0].features else " Colors and shapes are classes."
    many = " There are more classes than can be told apart; colors repeat." if colors and not names else ""
    count = ", ".join(f"{run.name}: {len(xy)} images" for run, xy in zip(runs, points, strict=True))
    title = f"Features in two dimensions ({method})"
    alt = f"Scatter plot of features by {method}, one panel per run ({count}).{colors}{note}"
    caption = f"Features of the run's sample of test images (training images without a test set).{colors}{many}{note}"
    return save(figure, folder, file, title=title, alt=alt, caption=caption)


def _class_names(runs: Sequence[RunRecord]) -> list[str]:
    """Names the classes that all runs share, if they are few enough for a legend."""
    lists = []
    for run in runs:
        labels, given = run.features.get("labels"), run.features.get("class_names")
        count = 0 if labels is None else min(int(labels.max()), MOST_CLASSES) + 1  # the last: too many
        if given is not None and given.ndim == 1 and len(given) >= count:
            lists.append([printable(name) for name in given[:count]])
        else:
            lists.append([f"class {i}" for i in range(count)])
    return lists[0] if lists and all(names == lists[0] for names in lists) and len(lists[0]) <= MOST_CLASSES else []


def _scatter_classes(axes: Axes, xy: np.ndarray, labels: np.ndarray | None) -> None:
    if labels is None:
        axes.scatter(xy[:, 0], xy[:, 1], s=6, color=color(0), alpha=0.6, linewidths=0, rasterized=True)
        return
    for i in range(MOST_CLASSES):
        mine = labels % MOST_CLASSES == i
        axes.scatter(
            xy[mine, 0], xy[mine, 1], s=8, color=color(i), marker=MARKERS[i], alpha=0.7, linewidths=0, rasterized=True
        )


def _dot(i: int) -> Line2D:
    return Line2D([], [], color=color(i), marker=MARKERS[i], linestyle="none")
