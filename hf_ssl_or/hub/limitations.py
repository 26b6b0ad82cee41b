"""What a card warns of: each sentence is there only if a fact of the run calls for it."""

from __future__ import annotations

from collections.abc import Iterator

from hf_ssl_or.hub.export.pixels import TIMES
from hf_ssl_or.hub.markdown import code
from hf_ssl_or.hub.run_record import RunFacts, counted, seeds_of

_SMALL_PIXELS, _FEW_EPOCHS = 64, 100


def limits(facts: RunFacts) -> Iterator[str]:
    """Yields the limits of a run, one sentence or two each."""
    yield from _of_training(facts)
    yield from _of_measuring(facts)
    yield "Biases and sensitive content of the training images were not examined."


def _of_training(facts: RunFacts) -> Iterator[str]:
    data, loop = facts.recipe["data"], facts.recipe["training"]
    size = data["image_size"]
    if data["dataset"] == "shapes":
        yield "The training images are generated shapes: this is a demonstration, not an encoder of photographs."
    if size <= _SMALL_PIXELS:
        yield (
            f"It has seen {size:d} {TIMES} {size:d} pixels only; the image processor resizes every image to "
            "that size, and detail is lost."
        )
    if not loop["max_steps"] and loop["epochs"] < _FEW_EPOCHS:
        yield f"Training was short: {counted(loop['epochs'], 'epoch')}, where papers on small images take 200 to 1000."
    if (p := facts.preprocessing) is not None and not p.eight_bit and p.value_range != "dtype":
        low, high = p.value_range
        yield (
            f"Pixel values below {low:,.6g} and above {high:,.6g} are clipped: images of another instrument or "
            "scale want an encoder that was trained on them."
        )
    yield f"One run with one seed ({loop['seed']:d}): how much the results vary from run to run is not known."


def _of_measuring(facts: RunFacts) -> Iterator[str]:
    entries = facts.evaluations
    if not facts.results:
        yield "The run had not ended, or was not evaluated, when this card was written."
    if not entries:
        yield "No accuracy was measured."
        return
    if not facts.results.get("baselines"):
        yield "No baseline was measured beside it."
    if len(seeds_of(entries)) == 1:
        yield "Probes that are trained were trained once: their own spread is not known."
    evaluated, trained = entries[0]["data"]["test"]["name"], facts.recipe["data"]["dataset"]
    if evaluated == trained:
        yield f"It was evaluated on {code(evaluated)} only, the data set whose training images it was pretrained on."
    used, all_images = entries[0]["data"]["train"]["size"], facts.recipe["evaluation"]["train_limit"]
    if all_images is not None:
        yield f"Probes were fit on {used:,} images, a sample of the training images."
