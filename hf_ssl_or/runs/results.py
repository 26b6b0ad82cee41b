"""What `results.json` is: one set of dataclasses, by which it is written and read."""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.runs.labels import printable

SCHEMA_VERSION = 1
OWN_LIBRARY = "hf_ssl_or"
_ROW = re.compile(r"\[\n[-\d.,eE+\s]*\]")  # a list of numbers; within a text of JSON there is no end of a line
_COLLAPSE_KEYS = ("samples", "dimension", "notes", "alpha_req_range")


class Record:
    """Plain JSON values of a dataclass, and back; fields that may be None by default are left out when they are."""

    @classmethod
    def from_dict(cls, tree: Any, where: str = "results") -> Self:
        """Builds the record from plain data.

        Args:
            tree: What `to_dict` returns. Keys that the record does not have are ignored.
            where: Name of the data for messages.

        Raises:
            InputError: A key is missing, or a value is of another type; the message names it.
        """
        return _build(cls, tree, where)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return _plain(self)

    def write(self, path: Path) -> None:
        """Writes the record as JSON; a kill leaves the old file or the new one.

        Raises:
            InputError: The file cannot be written.
        """
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(_ROW.sub(_on_one_line, json.dumps(self.to_dict(), indent=2)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, kw_only=True)
class Metric(Record):
    """One measure of a protocol, over its seeds.

    Attributes:
        mean: Over the seeds.
        std: Standard deviation over the seeds; None for one value.
        values: One per seed.
    """

    mean: float
    std: float | None
    values: list[float]

    def describe(self) -> str:
        """Returns mean and standard deviation in words."""
        return f"{self.mean:.2f}" + ("" if self.std is None else f" \N{PLUS-MINUS SIGN} {self.std:.2f}")


@dataclass(frozen=True, kw_only=True)
class EvaluatedImages(Record):
    """The images of one side of an evaluation.

    Attributes:
        name: The data set.
        size: Number of images used.
        fingerprint: Hash of their content, where one is known.
    """

    name: str
    size: int
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationData(Record):
    """The images that a probe was fit on, and those that it was tested on."""

    train: EvaluatedImages
    test: EvaluatedImages


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """What one protocol measured.

    Attributes:
        protocol: Its name.
        protocol_hash: Hash of its settings; only measures of one hash compare.
        settings: Its settings.
        seeds: Seeds that it was run with; none where it has no randomness.
        headline: Name of the metric that stands for the protocol.
        metrics: By name.
        greater_is_better: False where a lower value of the headline is better.
        data: The images; None for a baseline that has none of its own.
        encoder: Name of the encoder, in a table of several.
        dataset: Name of the data set, in a table of several.
    """

    protocol: str
    protocol_hash: str
    settings: dict[str, Any]
    seeds: list[int]
    headline: str
    metrics: dict[str, Metric]
    greater_is_better: bool | None = None
    data: EvaluationData | None = None
    encoder: str | None = None
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.headline not in self.metrics:
            raise InputError(f"headline: {printable(self.headline)} is none of the metrics")

    @property
    def headline_metric(self) -> Metric:
        """The metric that stands for the protocol."""
        return self.metrics[self.headline]

    def test_metrics(self) -> Iterator[tuple[str, Metric]]:
        """Yields the metrics that were measured on test images."""
        return ((name, value) for name, value in self.metrics.items() if not name.startswith("train_"))


@dataclass(frozen=True, kw_only=True)
class Collapse(Record):
    """Label-free measures of features; in JSON, the measures stand beside the other keys.

    Attributes:
        samples: Number of images.
        dimension: Number of features.
        measures: Values by name; what is undefined is absent.
        notes: Why something is undefined.
        alpha_req_range: The slice of eigenvalues that alpha-ReQ was fit to.
    """

    samples: int
    dimension: int
    measures: dict[str, float]
    notes: list[str] = field(default_factory=list)
    alpha_req_range: list[int] | None = None

    @classmethod
    def from_dict(cls, tree: Any, where: str = "collapse") -> Self:
        """Builds the record from what `collapse_report` returns."""
        if not isinstance(tree, dict):
            raise InputError(f"{where}: is {_kind(tree)}, not an object")
        measures = {name: value for name, value in tree.items() if name not in _COLLAPSE_KEYS}
        own = {name: tree[name] for name in _COLLAPSE_KEYS if name in tree}
        return _build(cls, own | {"measures": measures}, where)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        plain = _fields_of(self)
        return plain.pop("measures") | plain


@dataclass(frozen=True, kw_only=True)
class WeightMeasures(Record):
    """Measures of one weight of the encoder.

    Attributes:
        orthogonality_error: ||G - I||_F with G the smaller Gram matrix.
        stable_rank: Squared Frobenius norm over squared spectral norm.
    """

    orthogonality_error: float
    stable_rank: float


@dataclass(frozen=True, kw_only=True)
class EncoderDescription(Record):
    """How the saved encoder is loaded.

    Attributes:
        library: "hf_ssl_or" for an encoder of this package; "transformers", "timm" or "torch" for one saved as itself.
        name: What its library calls it.
        loading_lines: Lines of Python that load it from the folder FOLDER and make `features` of `pixel_values`; none
            for an encoder of this package.
    """

    library: str
    name: str
    loading_lines: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunLength(Record):
    """How long a run was.

    Attributes:
        steps: Optimizer steps of the full run.
        train_seconds_this_session: Wall-clock time of the last session, with monitoring and checkpoints.
    """

    steps: int
    train_seconds_this_session: float


@dataclass(frozen=True, kw_only=True)
class TrainingData(Record):
    """The training images.

    Attributes:
        name: The data set.
        images: Number of images.
        fingerprint: Hash of their content, where one is known.
        preprocessing: Settings of `Preprocessing`; None where they are not known.
    """

    name: str
    images: int
    fingerprint: str | None = None
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.pixels()

    def pixels(self) -> Preprocessing | None:
        """Returns how images become pixels.

        Raises:
            InputError: The settings are not valid.
        """
        try:
            return None if self.preprocessing is None else Preprocessing(**self.preprocessing)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"preprocessing: {printable(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Environment(Record):
    """Software and kind of device; no host, user or path.

    Attributes:
        python: Version of Python.
        packages: Versions by package.
        device: Kind of device.
        processes: Number of processes.
        threads: Threads of each process.
    """

    python: str
    packages: dict[str, str]
    device: str
    processes: int
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Results(Record):
    """A finished run.

    Attributes:
        schema_version: Version of this form.
        recipe: The resolved recipe as plain data.
        run: How long it was.
        data: The training images.
        encoder: How the encoder is loaded; None for an encoder of this package.
        evaluations: One per protocol; none without labels.
        collapse: Label-free measures of the final features.
        weights: Measures of each regularizable weight at the end, by name.
        weights_before: The same before the first step.
        skipped: Why a weight is not regularized, by name.
        baselines: Evaluations of what was not trained, by name ("untrained", "pixels").
        environment: Software and kind of device.
        weights_sha256: Hash of the weights that were evaluated.
    """

    schema_version: int = SCHEMA_VERSION
    recipe: dict[str, Any]
    run: RunLength
    data: TrainingData
    encoder: EncoderDescription | None = None
    evaluations: list[Evaluation]
    collapse: Collapse
    weights: dict[str, WeightMeasures]
    weights_before: dict[str, WeightMeasures] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    baselines: dict[str, list[Evaluation]] = field(default_factory=dict)
    environment: Environment
    weights_sha256: str | None = None

    def baseline(self, name: str, evaluation: Evaluation, measure: str) -> Metric | None:
        """Returns a baseline's metric of the very same protocol, or None."""
        for entry in self.baselines[name]:
            if entry.protocol_hash == evaluation.protocol_hash and measure in entry.metrics:
                return entry.metrics[measure]
        return None


@dataclass(frozen=True, kw_only=True)
class EncoderResults(Record):
    """One encoder evaluated on one data set.

    Attributes:
        schema_version: Version of this form.
        encoder: Name of the encoder.
        evaluations: One per protocol.
        collapse: Label-free measures of the training images' features.
        environment: Software and kind of device.
    """

    schema_version: int = SCHEMA_VERSION
    encoder: str
    evaluations: list[Evaluation]
    collapse: Collapse
    environment: Environment


def read_results(path: Path) -> Results:
    """Reads a run's `results.json`, see `read_record`."""
    return read_record(Results, path)


def read_record(kind: type[R], path: Path) -> R:
    """Reads the JSON of a record that has a `schema_version`.

    Raises:
        InputError: It cannot be read, is of another schema version, or a key is missing or of another type; the
            message names the file and the key.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {printable(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds {_kind(tree)}, not an object")
    version = tree.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        said = "none" if version is None else printable(version)
        raise InputError(f"{path}: schema_version: is {said}, and {SCHEMA_VERSION} is what this version reads")
    try:
        return kind.from_dict(tree, str(path))
    except InputError as error:
        raise InputError(str(error).replace(f"{path}.", f"{path}: ", 1)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Plain data and dataclasses


def _build(kind: Any, value: Any, where: str) -> Any:
    """Converts JSON values to a type: a record, a list, a mapping, an optional or a plain value."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _build(next(t for t in inner if t is not type(None)), value, where)
    if origin is list:
        _require(isinstance(value, list), value, "a list", where)
        return [_build(inner[0], item, f"{where}.{i}") for i, item in enumerate(value)]
    if origin is dict or is_dataclass(kind):
        _require(isinstance(value, dict), value, "an object", where)
    if origin is dict:
        return {key: _build(inner[1], item, f"{where}.{printable(key)}") for key, item in value.items()}
    if is_dataclass(kind):
        return _build_record(kind, value, where)
    _require(_is_plain(kind, value), value, _NAMES[kind], where)
    return value


def _build_record(kind: Any, tree: dict[str, Any], where: str) -> Any:
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):
        place = f"{where}.{item.name}"
        if item.name in tree:
            hint, value = hints[item.name], tree[item.name]
            values[item.name] = Collapse.from_dict(value, place) if hint is Collapse else _build(hint, value, place)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{place}: is missing")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error


_NAMES = {str: "text", int: "a whole number", float: "a finite number"}


def _is_plain(kind: type, value: Any) -> bool:
    if kind is str or isinstance(value, bool):
        return kind is str and isinstance(value, str)
    if kind is int:
        return isinstance(value, int)
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _require(fits: bool, value: Any, wanted: str, where: str) -> None:
    if not fits:
        raise InputError(f"{where}: is {_kind(value)}, not {wanted}")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return printable(json.dumps(value))
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def _on_one_line(found: re.Match[str]) -> str:
    return f"[{' '.join(found[0][1:-1].split())}]"


def _plain(value: Any) -> Any:
    if isinstance(value, Collapse):
        return value.to_dict()
    if is_dataclass(value):
        return _fields_of(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _fields_of(record: Any) -> dict[str, Any]:
    values = ((item, getattr(record, item.name)) for item in fields(record))
    return {item.name: _plain(value) for item, value in values if value is not None or item.default is not None}
