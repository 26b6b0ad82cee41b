"""What a sweep keeps of chosen arms for figures: spectra, filters and features of each arm's first seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hf_ssl_or.errors import InputError
from hf_ssl_or.report.embeddings import embed, has_umap
from hf_ssl_or.report.filters import correlate_filters
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.reader import RunRecord, read_run
from hf_ssl_or.runs.representations import Embedding, Representations, Spectrum
from hf_ssl_or.runs.results import read_record
from hf_ssl_or.runs.sweep_results import RunValues, SweepResults
from hf_ssl_or.sweeps.gather import run_folder
from hf_ssl_or.sweeps.plan import Plan

MOST_EIGENVALUES = 100  # of a curve
BLOCKS = 64  # rows and columns of the image of the filters
_NO_UMAP = "umap: needs the package umap-learn, so PCA is drawn; install it with: pip install 'hf-ssl-or[report]'"

Change = Callable[[str, RunValues], Representations | None]


def keep_representations(plan: Plan, results: SweepResults, root: Path) -> SweepResults:
    """Returns results with what the folder's earlier `results.json` has of the same weights, and the plan asks for."""
    try:
        earlier = read_record(SweepResults, root / layout.RESULTS)
    except InputError:  # there is none that can be read
        return results
    known: dict[tuple[str, int, str | None], Representations | None] = {
        (arm.name, run.seed, run.weights_sha256): run.representations
        for arm in earlier.arms
        for run in arm.runs
        if run.weights_sha256 is not None
    }

    def kept(arm: str, run: RunValues) -> Representations | None:
        found = known.get((arm, run.seed, run.weights_sha256)) or Representations()
        if arm not in plan.spectra:
            found = replace(found, step=None, spectra={}, filters=None)
        return found if arm in plan.umap else replace(found, embedding=None)

    return _of_first_seeds(results, kept)


def add_representations(plan: Plan, results: SweepResults, root: Path, tell: Callable[[str], None]) -> SweepResults:
    """Returns results with what is missing of what `spectra` and `umap` of the plan ask for.

    Args:
        plan: The sweep.
        results: What its runs have measured.
        root: Its folder.
        tell: Is told a line about what takes long or cannot be drawn.
    """
    method = "UMAP" if has_umap() else "PCA"
    if plan.umap and method == "PCA":
        tell(_NO_UMAP)

    known = {arm.name: arm for arm in plan.arms}

    def added(arm: str, run: RunValues) -> Representations | None:
        if not run.metrics or not {arm} & {*plan.spectra, *plan.umap}:
            return None
        found = run.representations or Representations()
        record = read_run(run_folder(root, known[arm], run.seed))
        if arm in plan.spectra and not found.spectra:
            found = _with_spectra(found, record)
            if not found.spectra:
                tell(f"spectra: arm {arm} has none; its recipe wants training.monitor_every above 0")
        if arm in plan.umap and (found.embedding is None or found.embedding.method != method):
            found = replace(found, embedding=_embedding(record, arm, method, tell))
        return found

    return _of_first_seeds(results, added)


def _of_first_seeds(results: SweepResults, change: Change) -> SweepResults:
    arms = []
    for arm in results.arms:
        first, *others = arm.runs
        representations = change(arm.name, first)
        if representations == Representations():
            representations = None
        arms.append(replace(arm, runs=[replace(first, representations=representations), *others]))
    return replace(results, arms=arms)


def _with_spectra(found: Representations, record: RunRecord) -> Representations:
    if not record.spectra:
        return found
    step, latest = record.spectra[-1]
    spectra = {key: Spectrum.of(eigenvalues, MOST_EIGENVALUES) for key, eigenvalues in latest.items()}
    return replace(found, step=step, spectra=spectra, filters=correlate_filters(record, BLOCKS))


def _embedding(record: RunRecord, arm: str, method: str, tell: Callable[[str], None]) -> Embedding | None:
    if not record.features:
        tell(f"umap: arm {arm} has no {layout.FEATURES} that can be read")
        return None
    tell(f"umap: arm {arm}: features in two dimensions by {method}")
    return embed(record.features, method)
