"""Embeds a set of images: features in a file, and what they say about the set.

What is done is kept beside the output until it is complete, so that a killed run, started again, ends as one that was
not interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.in_memory import ListSource
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.published import resolve_dataset
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.curation import Curation, Findings, curate
from hf_ssl_or.evaluation.embeddings import Embeddings
from hf_ssl_or.evaluation.encoder_loading import FrozenEncoder, Processing, load_encoder
from hf_ssl_or.evaluation.feature_file import (
    FORMATS,
    Parts,
    arrays_of,
    fixed_lists,
    join_tables,
    make_table,
    matrix,
    other_features,
    read_metadata,
    read_tables,
    write_features,
)
from hf_ssl_or.evaluation.features import evaluating
from hf_ssl_or.evaluation.neighbors import as_rgb
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import preprocessing_of
from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.report.contact_sheet import SIDE, plot_findings
from hf_ssl_or.training.lock import RunLock

_PART = 1024  # images after which what is done is written
_NAMED = 100  # unreadable images that the file names
_ROW_OF_LIST = re.compile(r" \(row \d+ of [^()]*\)$")  # which the source adds to a path that a list names
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def embed(
    encoder: str | nn.Module | FrozenEncoder,
    dataset: str | Sequence[Any],
    output: str | Path | None = None,
    *,
    split: str | None = None,
    overrides: Sequence[str] = (),
    preprocessing: Any = None,
    batch_size: int = 256,
    dtype: Literal["fp32", "bf16"] = "fp32",
    neighbors: int = 0,
    duplicates: float | Literal["auto"] | None = None,
    outliers: int = 0,
    sheet: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Embeddings:
    """Embeds a set of images, in evaluation mode, and says which are alike, near-duplicates or outliers.

    Args:
        encoder: A name as for `hf-ssl-or evaluate`, or a module whose output has `pooler_output`.
        dataset: What `data.dataset` takes, or a list of PIL images or arrays.
        output: A .parquet or .npz file; None writes none. What an interrupted call of the same arguments has done is
            taken over, and so are the features of a complete file, if only other curation is asked for.
        split: Split of the set; None takes `data.train_split`.
        overrides: `data.*` settings.
        preprocessing: Of a module: a `Preprocessing` or an image processor; None takes that of its configuration.
        batch_size: Images per forward pass.
        dtype: "bf16" encodes under autocast.
        neighbors: See `Curation`.
        duplicates: See `Curation`.
        outliers: See `Curation`.
        sheet: A PNG of what was found; None puts it beside the output.
        overwrite: Replaces an output of another encoder, set or setting.
        progress: Shows a bar on a terminal.

    Raises:
        InputError: Something from outside is wrong; the message names it.
    """
    curation = Curation(neighbors=neighbors, duplicates=duplicates, outliers=outliers)
    output, sheet = _check_paths(output, sheet, curation)
    if batch_size < 1:
        raise InputError(f"batch_size: at least 1, not {batch_size}")
    if dtype not in _AUTOCAST:
        raise InputError(f"dtype: fp32 or bf16, not {dtype}")
    source, data = _named(dataset, overrides)
    frozen, device = _frozen(encoder, preprocessing)
    images = _images(frozen, data, source, split)
    curation.check(len(images))
    work = _Work(
        frozen,
        images,
        _folder_of(resolve_dataset(data).dataset),
        curation,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        bar=progress,
    )
    if output is None:
        tables = list(work.tables(0))
        findings, columns = work.curate(tables, sheet)
        arrays, metadata = arrays_of(join_tables(tables, columns)), work.metadata(findings)
        return Embeddings.from_arrays(arrays, metadata, lambda: arrays["features"], work.images_per_second)
    reuse = not overwrite and _holds(output, work.made_from)
    with _naming(output), RunLock(part := output.with_name(f"{output.name}.part")):
        _complete(work, output, part, sheet, reuse=reuse, overwrite=overwrite)
    return Embeddings.read(output, images_per_second=work.images_per_second)


def _check_paths(
    output: str | Path | None, sheet: str | Path | None, curation: Curation
) -> tuple[Path | None, Path | None]:
    """Refuses paths that cannot be written, before anything is loaded."""
    output, sheet = (None if path is None else Path(path).expanduser() for path in (output, sheet))
    if output is not None and output.suffix not in FORMATS:
        raise InputError(f"--output: {output}: the name ends in {' or '.join(FORMATS)}")
    if sheet is not None and not curation.wanted:
        raise InputError("--sheet: shows what --neighbors, --duplicates or --outliers find; ask for one of them")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise InputError(f"--sheet: {sheet}: the name ends in .png")
    if sheet is None and output is not None and curation.wanted:
        sheet = output.with_suffix(".png")
    for path, option in ((output, "--output"), (sheet, "--sheet")):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option}: {path} is a folder; name a file")
        probe = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"{option}: cannot write to {path.parent} ({error.strerror}); name another") from error
    return output, sheet


@contextlib.contextmanager
def _naming(output: Path) -> Iterator[None]:
    """Names the output in an error of the operating system: a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(output)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Encoder and images


def _frozen(encoder: str | nn.Module | FrozenEncoder, preprocessing: Any) -> tuple[FrozenEncoder, torch.device]:
    """Loads an encoder, or takes a module where it is."""
    if isinstance(encoder, nn.Module):
        config = getattr(encoder, "config", None)
        given = preprocessing or getattr(config, "preprocessing", None)
        if given is None:
            raise InputError("preprocessing: give a Preprocessing or the image processor of this encoder")
        if isinstance(given, dict):
            given = Preprocessing(**given)
        exact = given if isinstance(given, Preprocessing) else preprocessing_of(given)
        own = Processing.of(exact, exact=True)
        name, device = type(encoder).__name__, next((p.device for p in encoder.parameters()), torch.device("cpu"))
        frozen = FrozenEncoder(
            name=name, model=encoder, pooling="pooler output", image_size=exact.image_size, processing=own
        )
        return frozen, device
    if preprocessing is not None:
        raise InputError("preprocessing: belongs to a module; a named encoder brings its own")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = load_encoder(encoder) if isinstance(encoder, str) else encoder
    frozen.model.to(device)
    return frozen, device


def _named(dataset: str | Sequence[Any], overrides: Sequence[str]) -> tuple[ListSource | None, DataArguments]:
    """Returns the source of images that are in memory, and the settings of the data."""
    if wrong := [text for text in overrides if not text.startswith("data.")]:
        raise InputError(f"{wrong[0]}: only data.* settings concern embed")
    source = None
    if not isinstance(dataset, str):
        if not len(dataset) or isinstance(dataset[0], str | Path):
            raise InputError("dataset: a list holds one or more PIL images or arrays; of files name the folder")
        source, dataset = ListSource(dataset), "images"
    recipe = recipe_from_dict({"data": {"dataset": dataset}}, "embed")
    return source, recipe.override(overrides).data


def _images(frozen: FrozenEncoder, data: DataArguments, source: ListSource | None, split: str | None) -> ImageSet:
    """Loads the images as the encoder wants them."""
    data, like = frozen.prepare(data)
    split = split or data.train_split
    if data.streaming:
        data = dataclasses.replace(data, train_split=split)
    return load_images(
        data, split, num_channels=frozen.processing.num_channels, like=like, squares=True, source=source
    )


def _folder_of(dataset: str) -> str:
    """Returns what the places of a local set's images begin with: its folder, or that of a list or a pattern."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return f"{path}/"
    plain = re.split(r"[{*?\[]", str(path), maxsplit=1)[0]
    return plain[: plain.rfind("/") + 1] if path.exists() or plain != str(path) else ""


def public_encoder_name(name: str) -> str:
    """Leaves out where on this machine an encoder is."""
    kind, colon, path = name.rpartition(":")
    folder, at, size = path.rpartition("@") if re.search(r"@\d+$", path) else (path, "", "")
    local = Path(folder).expanduser()
    return f"{kind}{colon}{local.resolve().name}{at}{size}" if local.exists() else name


# ---------------------------------------------------------------------------------------------------------------------
# The work


class _Work:
    """One encoder on one set."""

    def __init__(
        self,
        frozen: FrozenEncoder,
        images: ImageSet,
        prefix: str,
        curation: Curation,
        *,
        batch_size: int,
        dtype: Literal["fp32", "bf16"],
        device: torch.device,
        bar: bool,
    ) -> None:
        self.frozen, self.images, self.prefix, self.curation = frozen, images, prefix, curation
        self.batch_size, self.dtype, self.device, self.bar = batch_size, dtype, device, bar
        self.part = max(1, _PART // batch_size) * batch_size
        self.images_per_second: float | None = None
        encoder = {"name": public_encoder_name(frozen.name), "weights": frozen.key(), "features": frozen.pooling}
        made_from = {
            "encoder": encoder,
            "dataset": {"name": images.name, "fingerprint": images.fingerprint},
            "preprocessing": images.preprocessing.to_dict(),
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device.type,
            "hf_ssl_or": importlib.metadata.version("hf-ssl-or"),
        }
        self.made_from: dict[str, Any] = json.loads(json.dumps(made_from))

    def metadata(self, findings: Findings) -> dict[str, Any]:
        """Returns what the file says of itself."""
        unreadable = dict(sorted((self.images.left_out | self.images.failures).items()))
        named = [self._public(reason) for reason in list(unreadable.values())[:_NAMED]]
        return {
            **self.made_from,
            "class_names": self.images.class_names if self.images.labels is not None else None,
            "curation": dataclasses.asdict(self.curation),
            "duplicate_threshold": findings.threshold,
            "unreadable": {"count": len(unreadable), "named": named},
        }

    def _public(self, text: str) -> str:
        """Leaves out where on this machine the set is, addresses in memory, and bytes that are no letters."""
        text = text.replace(self.prefix, "") if self.prefix else text
        text = re.sub(r" at 0x[0-9a-f]+", "", text)
        return text.encode(errors="surrogateescape").decode(errors="replace")

    # -- features -----------------------------------------------------------------------------------------------------

    def tables(self, done: int) -> Iterator[pa.Table]:
        """Encodes the images part by part.

        Args:
            done: Parts that are there already.
        """
        n, first = len(self.images), done * self.part
        if first >= n:
            return
        starts = range(first, n, self.batch_size)
        batches = (np.arange(start, min(start + self.batch_size, n)) for start in starts)
        begun, known = time.perf_counter(), set(self.images.failures)
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        autocast = torch.autocast(self.device.type, _AUTOCAST[self.dtype], enabled=_AUTOCAST[self.dtype] is not None)
        with self._progress(first, n) as advance, evaluating(self.frozen.model):
            for start, x_BCHW in zip(starts, self.images.clean(batches, self.device), strict=True):
                with torch.no_grad(), autocast:
                    output = self.frozen.model(x_BCHW)
                if getattr(output, "pooler_output", None) is None:
                    raise InputError(f"{self.frozen.name}: its output has no pooler_output, the features of an image")
                features_BF = output.pooler_output.flatten(1).float().cpu()
                kept.append(self._readable(start, features_BF))
                advance(len(x_BCHW))
                stop = start + len(x_BCHW)
                if stop % self.part == 0 or stop == n:
                    self.images_per_second = (stop - first) / (time.perf_counter() - begun)
                    yield self._table(kept, known)
                    kept, known = [], set(self.images.failures)

    def _readable(self, start: int, features_BF: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of a batch's images and their features, without those that another image stands for."""
        index_B = np.arange(start, start + len(features_BF))
        if self.images.failures:
            sound_B = ~np.isin(self.images.job.rows[index_B], list(self.images.failures))
            index_B, features_BF = index_B[sound_B], features_BF[torch.from_numpy(sound_B)]
        bad_B = (~features_BF.isfinite()).any(1).numpy()
        if bad_B.any():
            first = self._public(self.images.describe(int(index_B[bad_B][0])))
            raise InputError(f"{self.images.name}: the encoder's features are NaN or infinite, first of {first}")
        return index_B, features_BF.numpy()

    def _table(self, kept: list[tuple[np.ndarray, np.ndarray]], known: set[int]) -> pa.Table:
        index_N = np.concatenate([index_B for index_B, _ in kept])
        labels = self.images.labels
        return make_table(
            np.concatenate([features_BF for _, features_BF in kept]),
            [_ROW_OF_LIST.sub("", self._public(self.images.describe(int(i)))) for i in index_N],
            self.images.job.rows[index_N].astype(np.int64),
            None if labels is None else labels.numpy()[index_N],
            self.images.class_names,
            {row: reason for row, reason in self.images.failures.items() if row not in known},
        )

    @contextlib.contextmanager
    def _progress(self, done: int, total: int) -> Iterator[Callable[[int], None]]:
        note = TextColumn("{task.description}  {task.fields[note]}")
        columns = (TextColumn("embedding"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), note)
        hidden = not self.bar or not sys.stderr.isatty()
        begun, now = time.perf_counter(), done
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
            task = progress.add_task(self.images.name, total=total, completed=done, note="")

            def advance(count: int) -> None:
                nonlocal now
                now += count
                speed = (now - done) / (time.perf_counter() - begun)
                progress.update(task, advance=count, note=f"{speed:,.0f} img/s")

            yield advance

    # -- curation -----------------------------------------------------------------------------------------------------

    def curate(self, tables: Iterable[pa.Table], sheet: Path | None) -> tuple[Findings, dict[str, pa.Array]]:
        """Finds what is asked for, and draws it; returns also the columns of the file."""
        if not self.curation.wanted:
            return Findings(), {}
        parts = [(matrix(table["features"]), table["file"].to_pylist(), table["row"].to_numpy()) for table in tables]
        features_NF, rows_N = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
        files = [file for _, names, _ in parts for file in names]
        del parts
        findings = curate(self._on_device(torch.from_numpy(features_NF)), self.curation)
        if sheet is not None:
            plot_findings(findings, files, functools.partial(self._thumbnails, rows_N), sheet)
        return findings, _columns(findings, rows_N)

    def _on_device(self, features_NF: Tensor) -> Tensor:
        """Moves features to the device, where it has room for them and for what is computed of them."""
        if self.device.type == "cuda" and 4 * features_NF.nbytes < torch.cuda.mem_get_info(self.device)[0]:
            return features_NF.to(self.device)
        return features_NF

    def _thumbnails(self, rows_N: np.ndarray, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Returns small pictures of images, (H, W, 3) uint8, by their places."""
        index = np.searchsorted(self.images.job.rows, rows_N[wanted])
        mean_C11, std_C11 = (torch.tensor(v).view(-1, 1, 1) for v in (self.images.mean, self.images.std))
        pictures = {}
        # One by one, as a batch of images from all over a stream would hold all their blocks.
        for i, x_1CHW in zip(wanted, self.images.clean(index[:, None]), strict=True):
            x_BCHW = as_rgb(x_1CHW * std_C11 + mean_C11)
            if x_BCHW.shape[-1] > SIDE:
                x_BCHW = F.interpolate(x_BCHW, (SIDE, SIDE), mode="bilinear", antialias=True)
            pictures[i] = (x_BCHW[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return pictures


def _columns(findings: Findings, rows_N: np.ndarray) -> dict[str, pa.Array]:
    columns = {}
    if findings.neighbor_index is not None and findings.neighbor_similarities is not None:
        columns["neighbor_rows"] = fixed_lists(rows_N[findings.neighbor_index.numpy()])
        columns["neighbor_similarities"] = fixed_lists(findings.neighbor_similarities.contiguous().numpy())
    if findings.duplicate_group is not None:
        columns["duplicate_group"] = pa.array(findings.duplicate_group.numpy())
    if findings.outlier_score is not None:
        columns["outlier_score"] = pa.array(findings.outlier_score.numpy())
    return columns


def _holds(output: Path, made_from: dict[str, Any]) -> bool:
    """Says whether the output is there already; refuses one that was made from something else."""
    if not output.exists():
        return False
    known = read_metadata(output)
    if known is None or any(known.get(name) != value for name, value in made_from.items()):
        raise other_features(output, known, made_from)
    return True


def _complete(work: _Work, output: Path, part: Path, sheet: Path | None, *, reuse: bool, overwrite: bool) -> None:
    """Writes the output: from parts, of which some may be there already, or from the features that it holds."""
    known = read_metadata(output) if reuse else None
    asked = dataclasses.asdict(work.curation)
    parts = Parts(part, work.made_from, overwrite=overwrite)
    if known is not None and known["curation"] == asked and (sheet is None or sheet.exists()):
        parts.remove()
        return
    if known is None:
        work.images.failures.update(parts.unreadable())
        for table in work.tables(parts.count):
            parts.append(table)
    tables = functools.partial(iter, parts) if known is None else functools.partial(read_tables, output)
    findings, columns = work.curate(tables(), sheet)
    metadata = work.metadata(findings)
    if known is not None:
        metadata["unreadable"] = known["unreadable"]
    write_features(parts.unfinished(output), tables(), columns, metadata)
    parts.finish(output)
