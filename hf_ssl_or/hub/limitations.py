"""What a card warns of: each sentence is there only if a fact of the run calls for it."""

from __future__ import annotations

from collections.abc import Iterator

from hf_ssl_or.hub.card_sections import counted, seeds_of
from hf_ssl_or.hub.export.pixels import TIMES
from hf_ssl_or.hub.markdown import code
from hf_ssl_or.runs.reader import RunRecord

_SMALL_PIXELS, _FEW_EPOCHS = 64, 100


def limitations(run: RunRecord) -> Iterator[str]:
    """Yields the limitations of a run, one sentence or two each."""
    yield from _of_training(run)
    yield from _of_evaluation(run)
    yield "The training images were not examined for biases and sensitive content."


def _of_training(run: RunRecord) -> Iterator[str]:
    data, loop = run.recipe["data"], run.recipe["training"]
    size = data["image_size"]
    if data["dataset"] == "shapes":
        yield "The training images are generated shapes: this is a demonstration, not an encoder of photographs."
    if size <= _SMALL_PIXELS:
        yield (
            f"It was trained on images of {size:d} {TIMES} {size:d} pixels; the image processor resizes every image "
            "to that size, and detail is lost."
        )
    if not loop["max_steps"] and loop["epochs"] < _FEW_EPOCHS:
        yield f"Training was short: {counted(loop['epochs'], 'epoch')}; papers on small images train for 200 to 1000."
    if (p := run.preprocessing) is not None and not p.eight_bit and p.value_range != "dtype":
        low, high = p.value_range
        yield (
            f"Pixel values below {low:,.6g} and above {high:,.6g} are clipped: images from another instrument or on "
            "another scale need an encoder trained on them."
        )
    yield f"This is one run with one seed ({loop['seed']:d}): the variation between runs is unknown."


def _of_evaluation(run: RunRecord) -> Iterator[str]:
    entries = run.evaluations
    if run.results is None:
        yield "When this card was written, the run had not ended or was not evaluated."
    if not entries:
        yield "No accuracy was measured."
        return
    if run.results is not None and not run.results.baselines:
        yield "No baseline was measured."
    if len(seeds_of(entries)) == 1:
        yield "Trained probes were trained once: their variation between seeds is unknown."
    evaluated, trained = entries[0].data, run.recipe["data"]["dataset"]
    if evaluated is None:
        return
    if evaluated.test.name == trained:
        yield f"It was evaluated on {code(trained)} only, the data set that it was pretrained on."
    if run.recipe["evaluation"]["train_limit"] is not None:
        yield f"Probes were fit on {evaluated.train.size:,} images, a sample of the training images."
