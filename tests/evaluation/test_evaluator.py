"""Protocols are frozen and hashed; the driver's results are those of the single functions, encoded once."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_features import NORMAL, Encoder, image_set

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation import evaluator, protocols
from hf_ssl_or.evaluation.evaluator import EvaluationArguments, evaluate_encoder, evaluate_features
from hf_ssl_or.evaluation.features import extract_features, pixel_features
from hf_ssl_or.evaluation.protocols import LabeledFeatures, Protocol, available_protocols, get_protocol
from hf_ssl_or.evaluation.protocols.knn import KnnProtocol, knn_accuracy
from hf_ssl_or.evaluation.protocols.linear_probe import GradientProtocol
from hf_ssl_or.structures import ViewSpec

HASHES = {
    "few-shot": "6b1dfe610c4f",
    "fine-tune": "715fb7dce5c6",
    "fine-tune-layer-decay": "fd1508100c0a",
    "knn": "53a583e01993",
    "knn-t0.1": "f5e0fa92457b",
    "linear-averaged-views": "b5b52dbe1743",
    "linear-lbfgs": "c2db4019b4fd",
    "linear-sgd": "e8ba6cb5e662",
}


def test_all_protocols_are_found_by_name() -> None:
    assert available_protocols() == sorted(HASHES)
    assert all(get_protocol(name).name == name for name in available_protocols())
    with pytest.raises(InputError, match="unknown evaluation protocol 'linear_sgd': did you mean 'linear-sgd'"):
        get_protocol("linear_sgd")


def test_hashes_are_pinned() -> None:
    """A changed hash means that results are no longer comparable: give the protocol a new name instead."""
    assert {name: get_protocol(name).hash for name in available_protocols()} == HASHES


def test_every_setting_moves_the_hash() -> None:
    for name in available_protocols():
        protocol = get_protocol(name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            protocol.name = "other"
        assert json.loads(json.dumps(protocol.settings())) == protocol.settings()
        for field in dataclasses.fields(protocol):
            value = getattr(protocol, field.name)
            other = "adam" if value == "sgd" else value * 2 + type(value)((1,)) if isinstance(value, tuple) else value
            other = f"{value}x" if field.name == "name" else value + 1 if isinstance(value, (int, float)) else other
            if other != value and field.name != "views":
                assert dataclasses.replace(protocol, **{field.name: other}).hash != protocol.hash, field.name


@pytest.fixture
def quick(monkeypatch) -> None:
    """Protocols of the same kinds that end at once."""
    linear = {"optimizer": "adam", "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.0}
    known = [
        KnnProtocol(name="knn", k=(3, 5)),
        GradientProtocol(name="linear-sgd", **linear),
        GradientProtocol(name="linear-averaged-views", num_views=2, views=(ViewSpec(),), **linear),
    ]
    monkeypatch.setattr(protocols, "_PROTOCOLS", {p.name: p for p in known})


def run(arguments: EvaluationArguments, **changes):
    train, test = changes.pop("train", image_set(40)), changes.pop("test", image_set(15))
    return evaluate_encoder(Encoder(), train, test, arguments, **(NORMAL | changes))


def test_results_say_how_they_came_about(quick) -> None:
    arguments = EvaluationArguments(protocols=["knn", "linear-sgd"], seeds=[0, 1, 2], train_limit=30)
    results = json.loads(json.dumps(run(arguments)))
    knn, linear = results["evaluations"]
    assert list(knn) == [*("protocol", "protocol_hash", "settings", "seeds", "headline", "metrics", "data")]
    assert knn["protocol_hash"] == get_protocol("knn").hash and knn["settings"]["k"] == [3, 5]
    assert knn["headline"] == "top1_k3"
    assert knn["seeds"] == [] and linear["seeds"] == [0, 1, 2]
    assert knn["data"]["train"] == {"name": "noise", "fingerprint": image_set(40).fingerprint, "size": 30}
    assert knn["data"]["test"]["size"] == 15
    top1 = linear["metrics"][linear["headline"]]
    values = torch.tensor(top1["values"])
    assert len(values) == 3 and values.unique().numel() > 1
    assert top1["mean"] == pytest.approx(float(values.mean())) and top1["std"] == pytest.approx(float(values.std()))
    assert knn["metrics"]["top1_k3"]["std"] is None
    assert results["collapse"]["samples"] == 30 and results["collapse"]["dimension"] == 6


def test_numbers_are_those_of_the_functions(quick) -> None:
    train, test = image_set(40), image_set(15)
    results = run(EvaluationArguments(protocols=["knn"]))
    features = [extract_features(Encoder(), images, **NORMAL) for images in (train, test)]
    expected = knn_accuracy(features[0], train.labels, features[1], test.labels, k=(3, 5))
    assert {name: m["mean"] for name, m in results["evaluations"][0]["metrics"].items()} == expected
    assert run(EvaluationArguments(protocols=["knn"])) == results


def test_features_are_encoded_once_for_all_protocols(quick, monkeypatch) -> None:
    calls = []

    def counted(encoder, images, **options):
        calls.append((len(images), options["num_views"]))
        return extract_features(encoder, images, **options)

    monkeypatch.setattr(evaluator, "extract_features", counted)
    run(EvaluationArguments(protocols=["linear-averaged-views", "knn", "linear-sgd"], seeds=[0, 1]))
    assert sorted(calls) == [(15, 1), (15, 2), (40, 1), (40, 2)]


def test_without_labels_only_ranks_can_be_had() -> None:
    bare = image_set(40, labels=False)
    with pytest.raises(InputError, match="noise: labels are needed: set data.label_column"):
        run(EvaluationArguments(), train=bare)
    results = run(EvaluationArguments(protocols=[]), train=bare)
    assert results["evaluations"] == [] and results["collapse"]["rankme"] > 1


def test_pixels_are_evaluated_by_the_same_protocol() -> None:
    train, test = image_set(40), image_set(15)
    pixels = [pixel_features(images) for images in (train, test)]
    protocol = KnnProtocol(name="knn", k=(1,))
    entry = evaluate_features(protocol, pixels[0], train.labels, pixels[1], test.labels)
    expected = knn_accuracy(pixels[0], train.labels, pixels[1], test.labels, k=1)
    assert {name: metric["mean"] for name, metric in entry["metrics"].items()} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ["kn"]}, "unknown evaluation protocol 'kn'"),
        ({"protocols": ["knn", "knn"]}, "evaluation.protocols: names one twice"),
        ({"seeds": []}, "evaluation.seeds: needs one seed"),
        ({"batch_size": 0}, "evaluation.batch_size: at least 1, not 0"),
        ({"train_limit": 0}, "evaluation.train_limit: at least 1"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationArguments(**change)


@pytest.mark.slow
def test_raw_pixels_of_cifar10(real_data: Path) -> None:
    """Nearest neighbors of raw pixels get about a third of CIFAR-10 right: the floor for every encoder."""
    arguments = DataArguments(dataset=str(real_data / "cifar10"), fraction=0.08, cache="none")
    train, test = (load_images(arguments, split) for split in ("train", "test"))
    accuracy = knn_accuracy(pixel_features(train), train.labels, pixel_features(test), test.labels, k=20)
    assert 24 < accuracy["top1_k20"] < 36


@pytest.fixture
def own_protocol():
    """The class of the first example of docs/evaluation.md."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    names = {"__name__": "notebook"}
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(compile(code, "evaluation.md", "exec", dont_inherit=True), names)
    return names["NearestMean"]


def test_a_protocol_of_your_own_is_passed_beside_names(quick, own_protocol) -> None:
    train, test = image_set(40), image_set(15)
    results = run(EvaluationArguments(seeds=[0, 1]), evaluators=["knn", own_protocol()], train=train, test=test)
    knn, own = results["evaluations"]
    assert knn["protocol"] == "knn" and own["protocol"] == own["settings"]["name"] == "nearest-mean"
    x, y = (extract_features(Encoder(), images, **NORMAL) for images in (train, test))
    means = torch.stack([x[train.labels == label].mean(0) for label in range(3)])
    expected = 100 * float((torch.cdist(y, means).argmin(1) == test.labels).double().mean())
    assert own["metrics"]["top1"]["values"] == [pytest.approx(expected)] and own["seeds"] == []
    assert json.loads(json.dumps(results)) == results


def test_the_class_of_a_protocol_of_your_own_is_in_its_hash(own_protocol) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Error(own_protocol):
        greater_is_better: ClassVar[bool] = False
        least: object = 1
        primary: str = "error"

        @property
        def primary_metric(self) -> str:
            return self.primary

    assert own_protocol().settings()["class"] == "notebook.NearestMean"
    assert own_protocol().hash != Error().hash != Error(least=2).hash
    assert "class" not in KnnProtocol(name="mine").settings()
    data = LabeledFeatures(torch.randn(12, 3), torch.arange(12) % 2)
    with pytest.raises(InputError, match="run does not return its primary metric 'error'; it returns"):
        evaluate_features(Error(), data.features_NF, data.labels_N, data.features_NF, data.labels_N)
    entry = evaluate_features(Error(primary="top1"), *(data.features_NF, data.labels_N) * 2)
    assert entry["greater_is_better"] is False and entry["headline"] == "top1"
    with pytest.raises(InputError, match="nearest-mean: settings must be plain values or tuples of them"):
        _ = Error(least=object()).hash


@pytest.mark.parametrize(
    ("evaluators", "message"),
    [
        (["kn"], "unknown evaluation protocol 'kn'"),
        ("knn", r"evaluators: a list is wanted; write \['knn'\]"),
        ([KnnProtocol], r"is neither a Protocol nor the name of one; make an object of it: KnnProtocol\(...\)"),
        ([7], "evaluators: 7 is neither a Protocol nor the name of one$"),
        (["knn", KnnProtocol(name="knn", k=(3,))], "evaluators: two are named 'knn'; give one another name"),
    ],
)
def test_bad_evaluators_are_refused(evaluators, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(EvaluationArguments(), evaluators=evaluators)


class CountImages(Protocol):
    """A protocol of images: returns their numbers and the seed."""

    def run_on_images(self, encoder, train, test, *, seed, **options) -> dict[str, float]:
        assert options == {"device": "cpu", "progress": False, "mixed_precision": "no"}
        return {"top1": float(len(train) + 100 * len(test) + 10_000 * seed)}


def test_a_protocol_may_evaluate_images() -> None:
    arguments = EvaluationArguments(seeds=[0, 1], train_limit=30)
    (entry,) = run(arguments, evaluators=[CountImages(name="count")])["evaluations"]
    assert (
        entry["metrics"]["top1"]["values"] == [1530, 11530]
        and entry["protocol_hash"] == CountImages(name="count").hash
    )
