"""The parts of a card that hold numbers: each is made from a run's facts, and nothing that is not there is said."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import yaml
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.pixels import TIMES, pixel_table
from hf_ssl_or.hub.markdown import block, code, table
from hf_ssl_or.hub.run_record import RunFacts, counted, duration, seeds_of
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.strength import resolve_weight

NONE = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
PENALTIES = {
    "so": "soft orthogonality (SO)",
    "srip": "spectral restricted isometry (SRIP)",
    "dso": "double soft orthogonality (DSO)",
    "mutual_coherence": "mutual coherence (MC)",
}
BASELINES = {"untrained": "Untrained encoder", "pixels": "Raw pixels"}
_COLLAPSE = {
    "rankme": ("RankMe", "higher: more dimensions in use"),
    "effective_rank": ("Effective rank", "higher: more dimensions in use"),
    "participation_ratio": ("Participation ratio", "higher: variance shared by more dimensions"),
    "alpha_req": ("alpha-ReQ", "decay of the spectrum; near 1 is good"),
    "nesum": ("NESum", "higher: a flatter spectrum"),
    "feature_std": ("Standard deviation of a feature", "0: collapsed to a point"),
    "dead_dimensions": ("Dead dimensions", "features that are the same for all images"),
}


# ---------------------------------------------------------------------------------------------------------------------
# What was run


def method_of(facts: RunFacts) -> tuple[str, str]:
    """Returns the method in words, and its BibTeX entry; of a method from elsewhere its name alone."""
    name = facts.recipe["method"]["name"]
    if name not in available_methods():
        return f"{code(name)}, a method of its user's own", ""
    method = get_method(name)
    words = (import_module(method.__module__).__doc__ or name).strip().partition("\n")[0]
    return words.rstrip("."), method.citation


def penalty_of(facts: RunFacts) -> str | None:
    """Returns the penalty in words, with the weight that "auto" stood for; None for none."""
    settings = facts.recipe["orthogonality"]
    if settings["penalty"] == "none":
        return None
    words, weight = PENALTIES[settings["penalty"]], settings["weight"]
    if weight == "auto":
        named = SimpleNamespace(config=SimpleNamespace(architecture=facts.recipe["encoder"]["name"]))
        try:
            weight = resolve_weight(cast(nn.Module, named), OrthogonalityConfig.from_dict(settings))
        except InputError:
            return f"{words}, the paper's weight"
    return f"{words}, weight {weight:g}"


def summary(facts: RunFacts) -> str:
    """Says in two sentences what this is."""
    recipe, images = facts.recipe, facts.results.get("data", {})
    size, views = recipe["data"]["image_size"], recipe["views"]["count"]
    count = f"{images['images']:,} images" if images else "images"
    start = recipe["encoder"]["init_from"]
    penalty = penalty_of(facts)
    return (
        f"An image encoder, {code(recipe['encoder']['name'])}{_width(facts)}, pretrained without labels on {count} of "
        f"{code(recipe['data']['dataset'])} ({size:d} {TIMES} {size:d} pixels) by {code(recipe['method']['name'])} on "
        f"{views:d} views of each image{f', with {penalty}' if penalty else ''}. "
        f"{f'It started from the weights of {code(start)}. ' if start else ''}"
        "This card was written by `hf-ssl-or card` from the files of the run."
    )


def _width(facts: RunFacts) -> str:
    width = facts.results.get("collapse", {}).get("dimension")
    return f" with {width:d} features" if width else ""


def training(facts: RunFacts) -> str:
    """Returns what was run, as a table."""
    recipe = facts.recipe
    loop, optimizer, data, views = recipe["training"], recipe["training"]["optimizer"], recipe["data"], recipe["views"]
    images = facts.results.get("data", {})
    local = f", and {views['local_count']:d} smaller ones" if views["local_count"] else ""
    whitening = recipe["feature_whitening"]["weight"]
    share = "" if data["fraction"] == 1 else f" (a seeded {100 * data['fraction']:g} % of the split)"
    length = "" if loop["max_steps"] else f"{counted(loop['epochs'], 'epoch')}, "
    rows = {
        "Images": f"{code(data['dataset'])}, split {code(data['train_split'])}"
        f"{', ' + format(images['images'], ',') + ' images' if images else ''}{share}; labels were not used to train",
        "Encoder": _encoder(recipe["encoder"]),
        "Method": method_of(facts)[0],
        "Views": f"{views['count']:d} of each image{local}",
        "Orthogonality penalty": penalty_of(facts) or "none",
        "Feature whitening": f"weight {whitening:g}" if whitening else "none",
        "Length": f"{length}{facts.steps:,} steps of {loop['batch_size']:,} images",
        "Optimizer": f"{code(optimizer['name'])}, learning rate {optimizer['lr']:g}, weight decay "
        f"{optimizer['weight_decay']:g}, schedule {code(optimizer['schedule'])}",
        "Precision": "float32" if loop["mixed_precision"] == "no" else code(loop["mixed_precision"]),
        "Seed": f"{loop['seed']:d}",
    }
    return table(("", ""), list(rows.items()), words=2)


def pixels(facts: RunFacts) -> str:
    """Returns what becomes of an image before the encoder sees it, as a table; empty where no result says it."""
    if facts.preprocessing is None:
        return ""
    chosen, origin = facts.recipe["data"].get("value_range"), ""
    if not facts.preprocessing.eight_bit and isinstance(chosen, list):
        origin = "as the recipe sets it"
    elif not facts.preprocessing.eight_bit and chosen == "auto":
        origin = "measured by percentiles on a sample of the training images"
    return pixel_table(facts.preprocessing, origin)


def _encoder(encoder: dict[str, Any]) -> str:
    shapes = ("stem", "patch_size", "channels", "init_from")
    options = {name: encoder[name] for name in shapes if encoder[name] is not None} | encoder["model_args"]
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return ", ".join(map(code, [encoder["name"], *(f"{name}: {text}" for name, text in texts.items())]))


def compute(facts: RunFacts) -> str:
    """Returns what the run cost, as measured, as a table."""
    place, timing = facts.results.get("environment", {}), facts.results.get("run", {})
    rows = []
    if place:
        threads = f", {counted(place['threads'], 'thread')} each" if "threads" in place else ""
        rows += [("Device", code(place["device"])), ("Processes", f"{place['processes']:d}{threads}")]
    if facts.step_seconds is not None:
        rows.append(("Time in training steps", duration(facts.step_seconds)))
        rows.append(("Speed, median", f"{facts.images_per_second:,.0f} images/s, each in all its views"))
    if timing:
        seconds = duration(timing["train_seconds_this_session"])
        rows.append(("Last session, with monitoring and checkpoints", seconds))
    rows.append(("Energy", "not measured"))
    if place:
        packages = {"python": place["python"], **place["packages"]}
        rows.append(("Software", ", ".join(code(f"{name} {version}") for name, version in packages.items())))
    return table(("", ""), rows, words=2)


# ---------------------------------------------------------------------------------------------------------------------
# What was measured


def shown_metrics(entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the measures of an evaluation that were taken on test images."""
    return ((name, value) for name, value in entry["metrics"].items() if not name.startswith("train_"))


def spread(value: dict[str, Any]) -> str:
    """Returns a measure as mean and standard deviation over seeds."""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" {PLUS_MINUS} {value['std']:.2f}")


def evaluated_on(facts: RunFacts) -> str:
    """Says which images the probes were fit on, and which they were tested on."""
    data, settings = facts.evaluations[0]["data"], facts.evaluation_data
    train, test = (
        f"{data[side]['size']:,} images of {code(data[side]['name'])}, split {code(settings[f'{side}_split'])}"
        for side in ("train", "test")
    )
    return f"The encoder is frozen. Probes are fit on its features of {train}, with labels, and tested on {test}."


def evaluation(facts: RunFacts) -> str:
    """Returns every evaluation beside the baselines, as a table."""
    baselines = facts.results.get("baselines", {})
    head = ["Protocol", "Hash", "Measure", "Seeds", "This encoder", *(BASELINES.get(b, code(b)) for b in baselines)]
    rows = []
    for entry in facts.evaluations:
        names = [code(entry["protocol"]), code(entry["protocol_hash"])]
        for name, value in shown_metrics(entry):
            mark = "**" if name == entry["headline"] else ""
            seeds = ", ".join(f"{seed:d}" for seed in entry["seeds"]) or NONE
            others = [_baseline(entries, entry["protocol_hash"], name) for entries in baselines.values()]
            rows.append([*names, measure(name), seeds, f"{mark}{spread(value)}{mark}", *others])
            names = ["", ""]
    return table(head, rows, words=3)


def _baseline(entries: list[dict[str, Any]], protocol_hash: str, name: str) -> str:
    for entry in entries:
        if entry["protocol_hash"] == protocol_hash and name in entry["metrics"]:
            return spread(entry["metrics"][name])
    return NONE


def measure(name: str) -> str:
    """Returns the name of an accuracy in words."""
    known = re.fullmatch(r"top(\d+)(?:_k(\d+))?", name)
    return f"top-{known[1]}{f', k = {known[2]}' if known[2] else ''}" if known else code(name)


def reading(facts: RunFacts) -> str:
    """Says how to read the table of evaluations."""
    many = len(seeds_of(facts.evaluations)) > 1
    spreads = f"{PLUS_MINUS}: standard deviation over the probe's seeds. " if many else ""
    return (
        f"Accuracy in %. {spreads}{NONE}: not measured, or no randomness in the probe. "
        "Only numbers of one hash, which stands for all settings of the protocol, compare."
    )


def protocols(facts: RunFacts) -> str:
    """Returns the settings of every protocol."""
    settings = [{"hash": entry["protocol_hash"], **entry["settings"]} for entry in facts.evaluations]
    return block(yaml.safe_dump(settings, sort_keys=False, width=100), "yaml")


def collapse(facts: RunFacts) -> str:
    """Returns the measures of collapse, as a table."""
    measured = facts.results.get("collapse")
    if not measured:
        return ""
    rows = [
        (words, f"{measured[name]:.4g}" if name in measured else "undefined", meaning)
        for name, (words, meaning) in _COLLAPSE.items()
    ]
    head = ("Measure", "Value", "Reading")
    notes = "".join(f"\n- {code(note)}" for note in measured.get("notes", ()))
    sizes = f"Of {measured['dimension']:d} features of {measured['samples']:,} training images, without augmentation"
    return f"{sizes}:\n\n{table(head, rows, words=3)}{notes and chr(10) + notes}"


def layers(facts: RunFacts) -> tuple[str, str]:
    """Returns one sentence on the orthogonality of the weights, and a table of all layers, empty if not measured."""
    after, before = facts.results.get("weights", {}), facts.results.get("weights_before", {})
    if not after:
        return "", ""
    errors = [[layer["orthogonality_error"] for layer in report.values()] for report in (before, after) if report]
    medians = " before training and ".join(f"{statistics.median(values):.3g}" for values in errors)
    rows = [
        (
            code(name),
            f"{before[name]['orthogonality_error']:.3g}" if name in before else NONE,
            f"{layer['orthogonality_error']:.3g}",
            f"{layer['stable_rank']:.3g}",
        )
        for name, layer in after.items()
    ]
    sentence = (
        "Orthogonality error of the weights, the Frobenius norm of G - I with G the smaller Gram matrix of a layer: "
        f"the median of {len(after)} layers is {medians}{' after' if len(errors) == 2 else ''}. 0 is orthogonal."
    )
    return sentence, table(("Layer", "Error before", "Error after", "Stable rank after"), rows)
