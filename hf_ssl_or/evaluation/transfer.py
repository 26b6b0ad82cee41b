"""Any number of encoders on any number of data sets, by any number of protocols: one table, resumed after a kill."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.encoder_loading import FrozenEncoder, load_encoder
from hf_ssl_or.evaluation.evaluator import EvaluationArguments, Evaluator
from hf_ssl_or.evaluation.labeled import find_test_split, load_labeled
from hf_ssl_or.evaluation.protocols import Protocol, get_protocol
from hf_ssl_or.evaluation.store import Store

Report = Callable[[str], None]


def evaluate_transfer(
    encoders: Sequence[str],
    datasets: Sequence[str],
    arguments: EvaluationArguments,
    *,
    data: DataArguments,
    device: torch.device | str = "cpu",
    report: Report = lambda line: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates every encoder on every data set. What an earlier, interrupted call finished is not computed again.

    Images are resized, cropped and normalized as each encoder's own image processor does. Features and results are
    kept in the folder `evaluation` of the image cache.

    Args:
        encoders: Names as for `load_encoder`.
        datasets: What `data.dataset` takes.
        arguments: Protocols, seeds and sizes.
        data: Everything about the data sets but their name and size; a set without a test split is evaluated on its
            validation split.
        device: Where to encode and to train probes.
        report: Is told a line about each cell of the table.
        progress: Shows bars.

    Returns:
        `encoders`, a list of descriptions; `datasets`, a list of names; and `evaluations`, the entries of
        `evaluate_encoder` with the `encoder` and the `dataset` of each.

    Raises:
        InputError: A name is unknown or given twice, or what `evaluate_encoder` refuses.
    """
    labels, names = short_names(encoders, "encoder"), short_names(datasets, "data set")
    protocols = [get_protocol(name) for name in arguments.protocols]
    if not protocols:
        raise InputError("evaluation.protocols: name one or more; see hf-ssl-or list protocols")
    store = Store(data.cache_folder() / "evaluation")
    load = functools.lru_cache(maxsize=len(datasets))(functools.partial(_load, data))
    described, evaluations = [], []
    for source, label in zip(encoders, labels, strict=True):
        encoder = load_encoder(source, image_size=data.image_size)
        described.append(encoder.describe() | {"name": label})
        encoder.model.to(device)
        for dataset, name in zip(datasets, names, strict=True):
            images = load(dataset, encoder)
            table = _Row(encoder, *images, arguments, store, device=device, progress=progress)
            for protocol in protocols:
                entry, known = table.evaluate(protocol)
                report(f"{label} on {name}, {protocol.name}: {_headline(entry)}{' (known)' if known else ''}")
                evaluations.append({"encoder": label, "dataset": name, **entry})
    return {"encoders": described, "datasets": names, "evaluations": evaluations}


class _Row:
    """One encoder on one data set."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        train: ImageSet,
        test: ImageSet,
        arguments: EvaluationArguments,
        store: Store,
        *,
        device: torch.device | str,
        progress: bool,
    ) -> None:
        self.store, self.arguments = store, arguments
        self.key = {"encoder": encoder.key(), "preprocessing": train.preprocessing.to_dict()}
        self.labels = _hash(train.labels, test.labels)
        self.work = Evaluator(
            encoder.model,
            train,
            test,
            arguments,
            remember=self._remember,
            device=device,
            progress=progress,
        )

    def evaluate(self, protocol: Protocol) -> tuple[dict[str, Any], bool]:
        """Returns the entry, and whether it was known."""
        seeds = self.arguments.seeds if protocol.seeded else []
        key = self.key | {"data": self.work.data, "labels": self.labels, "protocol": protocol.hash, "seeds": seeds}
        found = self.store.find_result(key)
        if found is not None:
            return found, True
        entry = self.work.evaluate(protocol)
        self.store.write_result(key, entry)
        return entry, False

    def _remember(self, key: dict[str, Any], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.store.features(self.key | key, compute)


def _load(data: DataArguments, dataset: str, encoder: FrozenEncoder) -> tuple[ImageSet, ImageSet]:
    """Loads a data set as the encoder wants it."""
    data, like = encoder.prepare(find_test_split(replace(data, dataset=dataset)))
    labeled = load_labeled(data, num_channels=encoder.processing.num_channels, like=like)
    assert labeled is not None
    return labeled


def _hash(*tensors: torch.Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def short_names(names: Sequence[str], what: str) -> list[str]:
    """Returns the last part of each path, or as many parts as tell them apart; other names stay as they are.

    Raises:
        InputError: A name is given twice.
    """
    if len({_tail(name, 99) for name in names}) < len(names):
        raise InputError(f"{what}s: one is named twice: {', '.join(names)}")
    depth = 1
    while len({_tail(name, depth) for name in names}) < len(names):
        depth += 1
    return [_tail(name, depth) for name in names]


def _tail(name: str, depth: int) -> str:
    prefix, path = ("random:", name.removeprefix("random:")) if name.startswith("random:") else ("", name)
    expanded = Path(path).expanduser()
    return prefix + "/".join(expanded.resolve().parts[-depth:]) if expanded.exists() else name


def _headline(entry: dict[str, Any]) -> str:
    metric = entry["metrics"][entry["headline"]]
    return f"{metric['mean']:.2f}" + ("" if metric["std"] is None else f" ± {metric['std']:.2f}")


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Arranges results as a table of encoders by data sets and protocols, with each protocol's headline metric.

    Returns:
        The heads of the columns, and the rows.
    """
    evaluations = results["evaluations"]
    columns = list(dict.fromkeys((entry["dataset"], entry["protocol"]) for entry in evaluations))
    cells = {(entry["encoder"], entry["dataset"], entry["protocol"]): _headline(entry) for entry in evaluations}
    heads = ["encoder", *(f"{dataset} {protocol}" for dataset, protocol in columns)]
    names = [encoder["name"] for encoder in results["encoders"]]
    return heads, [[name, *(cells.get((name, *column), "") for column in columns)] for name in names]


def markdown_table(results: dict[str, Any]) -> str:
    """Writes the table for a README: accuracies in percent, mean ± standard deviation over seeds."""
    heads, rows = table_rows(results)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
