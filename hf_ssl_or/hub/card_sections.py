"""The parts of a card that hold numbers, made from the record of a run; nothing that is not there is said."""

from __future__ import annotations

import json
import statistics
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import yaml
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.pixels import TIMES, pixel_table
from hf_ssl_or.hub.markdown import block, code, escape, table
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.strength import resolve_weight
from hf_ssl_or.runs.labels import baseline_label, duration, metric_label
from hf_ssl_or.runs.reader import RunRecord
from hf_ssl_or.runs.results import Evaluation, Metric, WeightMeasures

NONE = "\N{EN DASH}"
PENALTIES = {
    "so": "soft orthogonality (SO)",
    "srip": "spectral restricted isometry (SRIP)",
    "dso": "double soft orthogonality (DSO)",
    "mutual_coherence": "mutual coherence (MC)",
}
_COLLAPSE = (
    *("rankme", "effective_rank", "participation_ratio", "alpha_req", "nesum"),
    *("feature_std", "dead_dimensions"),
)


def counted(number: float, what: str) -> str:
    """Returns a number with its noun, say "1 epoch" or "9 epochs"."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------------------
# What was run


def method_of(run: RunRecord) -> tuple[str, str]:
    """Returns the method in words, and its BibTeX entry; of a method from elsewhere its name alone."""
    name = run.recipe["method"]["name"]
    if name not in available_methods():
        return f"{code(name)}, a method from outside this package", ""
    method = get_method(name)
    words = (import_module(method.__module__).__doc__ or name).strip().partition("\n")[0]
    return words.rstrip("."), method.citation


def penalty_of(run: RunRecord) -> str | None:
    """Returns the penalty in words, with the weight that "auto" stood for; None for none."""
    settings = run.recipe["orthogonality"]
    if settings["penalty"] == "none":
        return None
    words, weight = PENALTIES[settings["penalty"]], settings["weight"]
    if settings.get("strength") is not None:
        return f"{words} towards {settings['target']}, strength {settings['strength']:g}"
    if weight == "auto":
        named = SimpleNamespace(config=SimpleNamespace(architecture=run.recipe["encoder"]["name"]))
        try:
            weight = resolve_weight(cast(nn.Module, named), OrthogonalityConfig.from_dict(settings))
        except InputError:
            return f"{words}, the paper's weight"
    return f"{words}, weight {weight:g}"


def summary(run: RunRecord) -> str:
    """Says in a few sentences what this is."""
    recipe = run.recipe
    size, views, start = recipe["data"]["image_size"], recipe["views"]["count"], recipe["encoder"]["init_from"]
    count = "images" if run.results is None else f"{run.results.data.images:,} images"
    width = "" if run.results is None else f" with {run.results.collapse.dimension:d} features"
    penalty = penalty_of(run)
    return (
        f"An image encoder, {code(recipe['encoder']['name'])}{width}, pretrained without labels on {count} of "
        f"{code(recipe['data']['dataset'])} ({size:d} {TIMES} {size:d} pixels) by {code(recipe['method']['name'])} on "
        f"{views:d} views of each image{f', with {penalty}' if penalty else ''}. "
        f"{f'Training started from the weights of {code(start)}. ' if start else ''}"
        "This card was written by `hf-ssl-or card` from the files of the run."
    )


def training(run: RunRecord) -> str:
    """Returns what was run, as a table, and what the recipe alone does not rebuild."""
    recipe = run.recipe
    loop, optimizer, data, views = recipe["training"], recipe["training"]["optimizer"], recipe["data"], recipe["views"]
    images = "" if run.results is None else f", {run.results.data.images:,} images"
    local = f", and {views['local_count']:d} smaller ones" if views["local_count"] else ""
    whitening, decay_end = recipe["feature_whitening"]["weight"], optimizer.get("weight_decay_end")
    decay_end = "" if decay_end is None else f" to {decay_end:g}"
    share = "" if data["fraction"] == 1 else f" (a seeded {100 * data['fraction']:g} % of the split)"
    length = "" if loop["max_steps"] else f"{counted(loop['epochs'], 'epoch')}, "
    rows = {
        "Images": f"{code(data['dataset'])}, split {code(data['train_split'])}{images}{share}; labels were not used",
        "Encoder": _encoder(recipe["encoder"]),
        "Method": method_of(run)[0],
        "Views": f"{views['count']:d} of each image{local}{_sizes(views.get('size_schedule') or [])}",
        "Orthogonality penalty": penalty_of(run) or "none",
        "Feature whitening": f"weight {whitening:g}" if whitening else "none",
        "Length": f"{length}{run.steps:,} steps of {loop['batch_size']:,} images",
        "Optimizer": f"{code(optimizer['name'])}, learning rate {optimizer['lr']:g}, weight decay "
        f"{optimizer['weight_decay']:g}{decay_end}, schedule {code(optimizer['schedule'])}",
        "Precision": "float32" if loop["mixed_precision"] == "no" else code(loop["mixed_precision"]),
        "Seed": f"{loop['seed']:d}",
    }
    return table(("", ""), list(rows.items()), words=2) + _objects(recipe.get("objects") or [])


def _sizes(schedule: list[list[float]]) -> str:
    steps = [f"{size:d} pixels from {100 * share:g} % of the run" for share, size in schedule]
    return f"; {', '.join(steps)}" if steps else ""


def _objects(names: list[str]) -> str:
    if not names:
        return ""
    return (
        f"\n\nThese were Python objects: {', '.join(map(code, names))}. The recipe describes them, but it does not "
        "rebuild the run alone."
    )


def pixels(run: RunRecord) -> str:
    """Returns what becomes of an image before the encoder sees it, as a table; empty where no result says it."""
    if run.preprocessing is None:
        return ""
    chosen, origin = run.recipe["data"].get("value_range"), ""
    if not run.preprocessing.eight_bit and isinstance(chosen, list):
        origin = "as set in the recipe"
    elif not run.preprocessing.eight_bit and chosen == "auto":
        origin = "measured by percentiles on a sample of the training images"
    return pixel_table(run.preprocessing, origin)


def _encoder(encoder: dict[str, Any]) -> str:
    shapes = ("stem", "patch_size", "channels", "init_from")
    options = {name: encoder[name] for name in shapes if encoder[name] is not None} | encoder["model_args"]
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return ", ".join(map(code, [encoder["name"], *(f"{name}: {text}" for name, text in texts.items())]))


def compute(run: RunRecord) -> str:
    """Returns what the run cost, as measured, as a table."""
    rows, place = [], None if run.results is None else run.results.environment
    if place is not None:
        threads = f", {counted(place.threads, 'thread')} each" if place.threads is not None else ""
        rows += [("Device", code(place.device)), ("Processes", f"{place.processes:d}{threads}")]
    if run.step_seconds is not None:
        rows.append(("Time in training steps", duration(run.step_seconds)))
        rows.append(("Speed, median", f"{run.images_per_second:,.0f} images/s, each in all its views"))
    if run.results is not None:
        seconds = duration(run.results.run.train_seconds_this_session)
        rows.append(("Last session, with monitoring and checkpoints", seconds))
    rows.append(("Energy", "not measured"))
    if place is not None:
        packages = {"python": place.python, **place.packages}
        rows.append(("Software", ", ".join(code(f"{name} {version}") for name, version in packages.items())))
    return table(("", ""), rows, words=2)


# ---------------------------------------------------------------------------------------------------------------------
# What was measured


def evaluation_settings(run: RunRecord) -> dict[str, Any]:
    """Returns the settings of the images of the evaluations."""
    return run.recipe.get("evaluation_data") or run.recipe["data"]


def seeds_of(entries: list[Evaluation]) -> list[int]:
    """Lists the seeds that any of the evaluations was run with."""
    return sorted({seed for entry in entries for seed in entry.seeds})


def evaluated_on(run: RunRecord) -> str:
    """Says which images the probes were fit on, and which they were tested on."""
    data, settings = run.evaluations[0].data, evaluation_settings(run)
    if data is None:
        return "The encoder is frozen. Probes are fit on its features, with labels."
    train, test = (
        f"{side.size:,} images of {code(side.name)}, split {code(settings[split])}"
        for side, split in ((data.train, "train_split"), (data.test, "test_split"))
    )
    return f"The encoder is frozen. Probes are fit on its features of {train}, with labels, and tested on {test}."


def evaluation(run: RunRecord) -> str:
    """Returns every evaluation beside the baselines, as a table."""
    assert run.results is not None
    baselines = list(run.results.baselines)
    rows = []
    for entry in run.evaluations:
        names = [code(entry.protocol), code(entry.protocol_hash)]
        for name, value in entry.test_metrics():
            mark = "**" if name == entry.headline else ""
            seeds = ", ".join(f"{seed:d}" for seed in entry.seeds) or NONE
            others = [_or_none(run.results.baseline(baseline, entry, name)) for baseline in baselines]
            rows.append([*names, measure(name), seeds, f"{mark}{value.describe()}{mark}", *others])
            names = ["", ""]
    others = [escape(baseline_label(name)) for name in baselines]
    return table(["Protocol", "Hash", "Measure", "Seeds", "This encoder", *others], rows, words=3)


def _or_none(metric: Metric | None) -> str:
    return NONE if metric is None else metric.describe()


def measure(name: str) -> str:
    """Returns the name of an accuracy in words."""
    return escape(metric_label(name).name)


def reading(run: RunRecord) -> str:
    """Says how to read the table of evaluations."""
    many = len(seeds_of(run.evaluations)) > 1
    spreads = "\N{PLUS-MINUS SIGN}: standard deviation over the probe's seeds. " if many else ""
    return (
        f"Accuracy in %. {spreads}{NONE}: not measured, or no randomness in the probe. "
        "Only numbers with the same hash, which identifies all settings of the protocol, are comparable."
    )


def protocols(run: RunRecord) -> str:
    """Returns the settings of every protocol."""
    settings = [{"hash": entry.protocol_hash, **entry.settings} for entry in run.evaluations]
    return block(yaml.safe_dump(settings, sort_keys=False, width=100), "yaml")


def collapse(run: RunRecord) -> str:
    """Returns the label-free measures, as a table."""
    if run.results is None:
        return ""
    found, rows = run.results.collapse, []
    for name in _COLLAPSE:
        label, value = metric_label(name), found.measures.get(name)
        direction = f"; {label.better} is better" if label.better in ("higher", "lower") else ""
        direction = "; near 1 is good" if label.better == "near 1" else direction
        rows.append((label.name, "undefined" if value is None else f"{value:.4g}", f"{label.meaning}{direction}"))
    notes = "".join(f"\n- {code(note)}" for note in found.notes)
    sizes = f"{found.dimension:d} features of {found.samples:,} training images, without augmentation"
    return f"{sizes}:\n\n{table(('Measure', 'Value', 'Meaning'), rows, words=3)}{notes and chr(10) + notes}"


def layers(run: RunRecord) -> tuple[str, str]:
    """Returns sentences on the orthogonality of the weights, and a table of all layers, empty if not measured."""
    if run.results is None or not run.results.weights:
        return "", ""
    after, before = run.results.weights, run.results.weights_before
    errors = [[layer.orthogonality_error for layer in report.values()] for report in (before, after) if report]
    medians = " before training and ".join(f"{statistics.median(values):.3g}" for values in errors)
    sentence = (
        "Orthogonality error of the weights, the Frobenius norm of G - I with G the smaller Gram matrix of a layer: "
        f"the median of {len(after)} layers is {medians}{' after' if len(errors) == 2 else ''}. 0 is orthogonal."
    )
    rows = [
        (code(name), _error(before.get(name)), _error(layer), f"{layer.stable_rank:.3g}")
        for name, layer in after.items()
    ]
    return sentence, table(("Layer", "Error before", "Error after", "Stable rank after"), rows)


def _error(layer: WeightMeasures | None) -> str:
    return NONE if layer is None else f"{layer.orthogonality_error:.3g}"


def skipped(run: RunRecord) -> str:
    """Returns the weights that the penalty leaves out, by reason; empty without a penalty or without any."""
    if run.results is None or not run.results.skipped or penalty_of(run) is None:
        return ""
    reasons: dict[str, list[str]] = {}
    for name, reason in run.results.skipped.items():
        reasons.setdefault(reason, []).append(name)
    return "\n".join(f"- {escape(reason)}: {', '.join(map(code, names))}" for reason, names in reasons.items())
