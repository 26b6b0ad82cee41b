"""The command line: verbs, not fields. Every setting lives in a recipe and is overridden as `section.key=value`."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hf_ssl_or.errors import InputError, NonFiniteLossError, unknown
from hf_ssl_or.habits import HABITS

EXIT_FAILED_RUN = 1  # of a sweep
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command with --resume

EXAMPLES = """\
examples:
  hf-ssl-or train recipes/quickstart.yaml
  hf-ssl-or train recipes/quickstart.yaml training.epochs=5 orthogonality.penalty=srip --output runs/try
  hf-ssl-or train runs/try --resume
  accelerate launch --num_processes 4 -m hf_ssl_or train recipes/cifar10/barlow_twins/resnet18-so.yaml
  hf-ssl-or evaluate runs/try --protocols knn,linear-sgd
  hf-ssl-or evaluate runs/a runs/b timm:resnet18 --datasets cifar10,gtsrb32 --output transfer
  hf-ssl-or evaluate runs/try --select rankme --output best
  hf-ssl-or sweep recipes/sweeps/quick.yaml --jobs 2
  hf-ssl-or embed runs/try --dataset photos --output features.parquet --duplicates --outliers --neighbors 5
  hf-ssl-or preview recipes/quickstart.yaml views.count=8 --output views.png
  hf-ssl-or report runs/none runs/so --output report.html
  hf-ssl-or card runs/try --license apache-2.0 --output model_cards/try
  hf-ssl-or push runs/try org/name --license apache-2.0
  hf-ssl-or export runs/try --to timm --output try-timm
  hf-ssl-or augmentation-graph --augmentations 1,2,4,8,16 --output graph.png
  hf-ssl-or list methods
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all verbs."""
    parser = _Parser(
        prog="hf-ssl-or",
        description="Pretrain image encoders from unlabeled images without dimensional collapse.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    _add_train(verbs)
    _add_evaluate(verbs)
    _add_sweep(verbs)
    _add_embed(verbs)
    _add_preview(verbs)
    _add_report(verbs)
    _add_card(verbs)
    _add_push(verbs)
    _add_export(verbs)
    _add_augmentation_graph(verbs)
    _add_list(verbs)
    return parser


def _add_train(verbs: argparse._SubParsersAction) -> None:
    train = _verb(
        verbs,
        "train",
        "pretrain, evaluate and save an encoder",
        "hf-ssl-or train recipes/quickstart.yaml training.epochs=5",
    )
    train.add_argument("recipe", help="a recipe, or with --resume the folder of a run")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the recipe")
    train.add_argument("--output", type=Path, help="folder of the run (default: runs/<name of the recipe>)")
    train.add_argument(
        "--resume", action="store_true", help="continue exactly where the folder's newest checkpoint is"
    )


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    evaluate = _verb(
        verbs,
        "evaluate",
        "evaluate encoders by kNN, linear probes and few labels, or choose a checkpoint without labels",
        "hf-ssl-or evaluate runs/a runs/b random:resnet18@32 --datasets cifar10,cifar100 --output transfer",
    )
    evaluate.add_argument(
        "encoders",
        nargs="+",
        metavar="ENCODER",
        help="a run's folder, an encoder's folder, a Hub id, timm:NAME or random:NAME (untrained), NAME@64 for images "
        "of 64 pixels; data.* and evaluation.* settings may follow",
    )
    evaluate.add_argument("--dataset", help="images to evaluate one encoder on (default: those of the run)")
    evaluate.add_argument("--datasets", help="comma-separated: a table of encoders by data sets, resumed after a kill")
    evaluate.add_argument("--protocols", help="comma-separated names, see hf-ssl-or list protocols")
    evaluate.add_argument("--select", metavar="MEASURE", help="choose a run's checkpoint by rankme, lidar, ...")
    evaluate.add_argument("--markdown", action="store_true", help="print the table of --datasets as Markdown")
    evaluate.add_argument(
        "--output", type=Path, help="JSON of the results; with --datasets also a folder; with --select the encoder's"
    )
    evaluate.set_defaults(overrides=[])


def _add_sweep(verbs: argparse._SubParsersAction) -> None:
    sweep = _verb(
        verbs,
        "sweep",
        "run arms, a grid and seeds from one file, and compare them",
        "hf-ssl-or sweep recipes/sweeps/quick.yaml --jobs 2 --threads 1",
    )
    sweep.add_argument("file", help="a sweep, see docs/sweep.md; the same command continues it after a kill")
    sweep.add_argument("--output", type=Path, help="folder of the sweep (default: runs/<name of the file>)")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    sweep.add_argument("--threads", type=int, metavar="T", help="threads of each run (default: cores / jobs)")
    sweep.add_argument("--list", action="store_true", help="print one command per missing run, and run nothing")


def _add_embed(verbs: argparse._SubParsersAction) -> None:
    embed = _verb(
        verbs,
        "embed",
        "write the features of a set of images, and find its near-duplicates and outliers",
        "hf-ssl-or embed runs/try --dataset photos --output features.parquet --duplicates --outliers --neighbors 5",
    )
    embed.add_argument("encoder", metavar="ENCODER", help="as for evaluate: a run, a folder, a Hub id, timm:NAME, ...")
    embed.add_argument("overrides", nargs="*", metavar="data.key=value", help="settings of the images")
    embed.add_argument("--dataset", required=True, help="a folder of images, a Hub id, a pattern of .tar files, ...")
    embed.add_argument("--output", type=Path, required=True, help=".parquet or .npz; a killed run continues")
    embed.add_argument("--split", help="split of the set (default: train)")
    embed.add_argument("--batch-size", type=int, default=256, help="images per forward pass (default: 256)")
    embed.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16 encodes under autocast")
    embed.add_argument("--num-workers", type=int, help="threads or processes that decode, as data.num_workers")
    embed.add_argument("--neighbors", type=_count, default=0, metavar="K", help="add the K nearest of each image")
    embed.add_argument(
        "--duplicates",
        nargs="?",
        type=_threshold,
        const="auto",
        metavar="THRESHOLD",
        help="group images of this cosine or more (default: measured on the set, about 0.95 for a trained encoder)",
    )
    embed.add_argument(
        "--outliers",
        nargs="?",
        type=_count,
        const=10,
        default=0,
        metavar="K",
        help="score each image by its mean distance to the K nearest (default: 10)",
    )
    embed.add_argument("--sheet", type=Path, help="PNG of what was found (default: beside the output)")
    embed.add_argument("--overwrite", action="store_true", help="replace features of another encoder or set")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a number of images, 1 or more, not {text!r}")
    return value


def _threshold(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a cosine of more than 0 and at most 1, not {text!r}")
    return value


def _add_preview(verbs: argparse._SubParsersAction) -> None:
    preview = _verb(
        verbs, "preview", "draw a PNG of augmented views", "hf-ssl-or preview recipes/quickstart.yaml views.count=8"
    )
    preview.add_argument("recipe")
    preview.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the recipe")
    preview.add_argument("--images", type=int, default=8, help="number of images, one per row (default: 8)")
    preview.add_argument("--output", type=Path, default=Path("preview.png"))


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = _verb(
        verbs,
        "report",
        "draw figures and one HTML page of one or more runs",
        "hf-ssl-or report runs/none runs/so --output report.html",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a sweep; up to 10")
    report.add_argument("--output", type=Path, help="the page (default: RUN/report.html; of several runs report.html)")
    report.add_argument(
        "--figures", type=Path, help="folder of the figures (default: RUN/figures; of several, beside the page)"
    )
    report.add_argument("--umap", action="store_true", help="also draw features by UMAP (needs umap-learn)")


def _add_push(verbs: argparse._SubParsersAction) -> None:
    push = _verb(
        verbs,
        "push",
        "push a run's encoder to the Hub, with its card and results",
        "hf-ssl-or push runs/quickstart org/name --private",
    )
    push.add_argument("run", type=Path, metavar="RUN", help="folder of a run that has ended")
    push.add_argument("repository", nargs="?", metavar="org/name", help="where to; made if it is not there")
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    push.add_argument("--revision", help="branch to commit to (default: main); made if it is not there")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--message", help="first line of the commit")
    push.add_argument("--license", help="the model's license, as the Hub names it, say apache-2.0")
    push.add_argument("--data-license", help="the license of the training images, in any words")
    push.add_argument("--dry-run", action="store_true", help="check everything and list the files, but send nothing")
    push.add_argument("--resume", action="store_true", help="send what an earlier push could not, and nothing else")


def _add_export(verbs: argparse._SubParsersAction) -> None:
    export = _verb(
        verbs, "export", "write an encoder for another library, checked there", "hf-ssl-or export runs/try --to onnx"
    )
    export.add_argument("encoder", metavar="RUN_OR_ENCODER", help="a run's folder, an encoder's folder or a Hub id")
    export.add_argument("--to", required=True, metavar="LIBRARY", help="timm, transformers, torchvision or onnx")
    export.add_argument("--output", type=Path, help="folder to make (default: <name of the encoder>-<library>)")


def _add_card(verbs: argparse._SubParsersAction) -> None:
    card = _verb(verbs, "card", "write the model card of a run, or a table of runs", "hf-ssl-or card runs/quickstart")
    card.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several with --table")
    card.add_argument(
        "--output", type=Path, help="a .md file, or a folder for the card and what it was made from (default: print)"
    )
    card.add_argument("--license", help="the model's license, as the Hub names it, say apache-2.0")
    card.add_argument("--data-license", help="the license of the training images, in any words")
    card.add_argument("--table", action="store_true", help="a Markdown table that compares the runs, for a README")


def _add_augmentation_graph(verbs: argparse._SubParsersAction) -> None:
    graph = _verb(
        verbs,
        "augmentation-graph",
        "draw what few augmentations leave of the eigenvalues of a graph of two classes, see docs/spectra.md",
        "hf-ssl-or augmentation-graph --same 0.6 --same-class 0.2 --same-pixels 0.15 --neither 0.05",
    )
    probabilities = {
        "--same": (0.6, "its own image"),
        "--same-class": (0.2, "the other image of its class"),
        "--same-pixels": (0.15, "the image of the other class that shares its pixels"),
        "--neither": (0.05, "the fourth image"),
    }
    for option, (value, what) in probabilities.items():
        meaning = f"probability that an augmentation looks like {what} (default: {value})"
        graph.add_argument(option, type=float, default=value, metavar="P", help=meaning)
    graph.add_argument(
        "--augmentations",
        type=_counts,
        default=[1, 2, 4, 8, 16],
        metavar="M,...",
        help="augmentations of each image, comma-separated (default: 1,2,4,8,16)",
    )
    graph.add_argument("--repeats", type=int, default=200, help="graphs sampled for each (default: 200)")
    graph.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    graph.add_argument(
        "--output", type=Path, default=Path("augmentation-graph.png"), help="PNG; an SVG is written beside it"
    )


def _counts(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"whole numbers of 1 or more like 1,2,4, not {text!r}")
    return values


def _add_list(verbs: argparse._SubParsersAction) -> None:
    listing = _verb(
        verbs, "list", "list methods, encoders, data sets, protocols or recipes", "hf-ssl-or list encoders 'vit_*'"
    )
    listing.add_argument("what", choices=["methods", "encoders", "datasets", "protocols", "recipes"])
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern (default: all)")


def _verb(verbs: argparse._SubParsersAction, name: str, what: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"example: {example}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit status: 0, 1 (a run of a sweep has failed), 2 (bad input), 3 (loss not finite) or 75 (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        return _dispatch(arguments)
    except (InputError, NonFiniteLossError, OSError) as error:
        from hf_ssl_or.hub.redaction import mask

        if show_traceback:
            print(mask(traceback.format_exc()), file=sys.stderr)
        process = os.environ.get("RANK", "0")
        where = "" if process == "0" else f"[process {process}] "
        print(f"hf-ssl-or: {where}error: {mask(_one_line(error))}", file=sys.stderr)
        return EXIT_NON_FINITE if isinstance(error, NonFiniteLossError) else EXIT_BAD_INPUT


def _one_line(error: Exception) -> str:
    """Says what is wrong; of an error of the operating system (a full disk, say) the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _dispatch(argv: list[str]) -> int:
    parser = build_parser()
    verbs = {
        "train": _train,
        "evaluate": _evaluate,
        "sweep": _sweep,
        "embed": _embed,
        "preview": _preview,
        "report": _report,
        "card": _card,
        "push": _push,
        "export": _export,
        "augmentation-graph": _augmentation_graph,
        "list": _list,
    }
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise unknown("verb", argv[0], verbs)
    arguments, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-")]  # overrides that come after an option
    if len(late) < len(rest) or (late and "overrides" not in arguments):
        parser.error(_unrecognized([text for text in rest if text not in late] or late))
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    if arguments.verb is None:
        parser.print_help()
        return 0
    return verbs[arguments.verb](arguments)


def _unrecognized(texts: list[str]) -> str:
    """Says what could not be read; of an option that other programs have, say --epochs 5, how it is set here."""
    for text in texts:
        habit = HABITS.get(text.removeprefix("--").partition("=")[0].replace("-", "_"))
        if text.startswith("--") and habit is not None:
            setting, _, note = habit.partition(" ")
            return f"unrecognized argument {text}: write {setting.rstrip(':')}=... {note}".rstrip()
    return f"unrecognized arguments: {' '.join(texts)}"


# The heavy imports (torch, transformers) stay inside the verbs, so that --help and a mistyped verb answer at once.


def _train(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.run import pretrain, recipe_and_folder
    from hf_ssl_or.show import print_results
    from hf_ssl_or.training.signals import TrainingInterrupted, peer_failure

    recipe, folder = recipe_and_folder(
        arguments.recipe, arguments.overrides, output=arguments.output, resume=arguments.resume
    )
    try:
        with peer_failure():
            results = pretrain(recipe, folder, resume=arguments.resume)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk names no file
        raise
    except TrainingInterrupted as interruption:
        print(f"hf-ssl-or: {interruption}; continue with: hf-ssl-or train {folder} --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    if results is not None:
        print_results(results, folder)
        if recipe.training.push is not None:
            print((folder / "push.log").read_text(encoding="utf-8").splitlines()[-1])
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.show import print_choice, print_evaluation, print_transfer

    is_setting = re.compile(r"(data|evaluation)\.[\w.]+=").match
    encoders = [text for text in arguments.encoders if not is_setting(text)]
    overrides = [text for text in arguments.encoders if is_setting(text)] + arguments.overrides
    protocols = arguments.protocols.split(",") if arguments.protocols else None
    _check_evaluate(arguments, encoders)
    warnings.showwarning = lambda message, *_, **__: print(f"hf-ssl-or: warning: {message}", file=sys.stderr)
    if arguments.select:
        from hf_ssl_or.evaluate import select

        print_choice(select(Path(encoders[0]), arguments.select, output=arguments.output), arguments.output)
    elif arguments.datasets:
        from hf_ssl_or.evaluate import transfer

        tell = functools.partial(print, file=sys.stderr, flush=True)
        datasets = arguments.datasets.split(",")
        results = transfer(encoders, datasets, overrides, protocols=protocols, output=arguments.output, report=tell)
        print_transfer(results, markdown=arguments.markdown)
    else:
        from hf_ssl_or.evaluate import evaluate

        print_evaluation(
            evaluate(encoders[0], overrides, dataset=arguments.dataset, protocols=protocols, output=arguments.output)
        )
    return 0


def _check_evaluate(arguments: argparse.Namespace, encoders: list[str]) -> None:
    """Refuses options of `evaluate` that do not go together."""
    if not encoders:
        raise InputError("evaluate: name an encoder; see hf-ssl-or evaluate --help")
    if arguments.dataset and arguments.datasets:
        raise InputError("--dataset, --datasets: give one of them")
    if arguments.select and (arguments.dataset or arguments.datasets or arguments.protocols or len(encoders) > 1):
        raise InputError("--select: takes one run, and no data sets or protocols")
    if not arguments.datasets and len(encoders) > 1:
        raise InputError("evaluate: several encoders are compared on --datasets; name them")
    if arguments.markdown and not arguments.datasets:
        raise InputError("--markdown: goes with --datasets")


def _sweep(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.show import print_sweep
    from hf_ssl_or.sweeps.sweep import SweepInterrupted, list_runs, sweep

    if arguments.list:
        for line in list_runs(arguments.file, arguments.output):
            print(line)
        return 0
    try:
        results = sweep(arguments.file, arguments.output, jobs=arguments.jobs, threads=arguments.threads)
    except SweepInterrupted as interruption:
        print(f"hf-ssl-or: {interruption}; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_sweep(results)
    for arm, failure in results.failures.items():
        print(f"hf-ssl-or: arm {arm} has failed: {failure}", file=sys.stderr)
    return EXIT_FAILED_RUN if results.failures else 0


def _embed(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.embedding import embed

    workers = [] if arguments.num_workers is None else [f"data.num_workers={arguments.num_workers}"]
    embeddings = embed(
        arguments.encoder,
        arguments.dataset,
        arguments.output,
        split=arguments.split,
        overrides=[*arguments.overrides, *workers],
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        neighbors=arguments.neighbors,
        duplicates=arguments.duplicates,
        outliers=arguments.outliers,
        sheet=arguments.sheet,
        overwrite=arguments.overwrite,
    )
    print(embeddings.describe())
    print(f"wrote {arguments.output}")
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.recipe import load_recipe
    from hf_ssl_or.report.preview import plot_preview
    from hf_ssl_or.run import load_training_images, view_specs

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    images, seed = load_training_images(recipe), recipe.training.seed
    plot_preview(images, view_specs(recipe), arguments.output, seed=seed, images=arguments.images)
    print(f"wrote {arguments.output}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.report.html import write_report
    from hf_ssl_or.report.sweep_page import is_sweep, write_sweep_report

    if is_sweep(arguments.runs[0]):
        if len(arguments.runs) > 1 or arguments.umap:
            raise InputError(f"{arguments.runs[0]}: is a sweep; give it alone, without --umap")
        page, figures = write_sweep_report(arguments.runs[0], output=arguments.output, figures=arguments.figures)
        print(f"wrote {page} and {len(figures)} files of figures")
        return 0
    page, figures = write_report(
        arguments.runs, output=arguments.output, figures=arguments.figures, umap=arguments.umap
    )
    print(f"wrote {page} and {len(figures)} files of figures{f' in {figures[0].parent}' if figures else ''}")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.hub.push import push_to_hub, resume_pushes
    from hf_ssl_or.hub.retries import PushKeptError

    if arguments.resume == (arguments.repository is not None):
        raise InputError("push: name the repository, org/name; with --resume leave it out, it is known")
    try:
        if arguments.resume:
            lines = [result.describe() for result in resume_pushes(arguments.run)]
            print("\n".join(lines) or f"nothing waits to be pushed for {arguments.run}")
            return 0
        stated = {"license": arguments.license, "data_license": arguments.data_license, "message": arguments.message}
        where = {"private": arguments.private, "revision": arguments.revision, "create_pr": arguments.create_pr}
        result = push_to_hub(arguments.run, arguments.repository, dry_run=arguments.dry_run, **stated, **where)
    except PushKeptError as error:
        if not error.passing:
            raise
        print(f"hf-ssl-or: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if arguments.dry_run:
        print("\n".join(f"{size:>12,}  {path}" for path, size in result.files.items()))
    print(result.describe())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.hub.export import export

    print(export(arguments.encoder, arguments.to, arguments.output).describe())
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.hub.card import build_card, comparison_table, write_card

    if arguments.table:
        text = comparison_table(arguments.runs)
    elif len(arguments.runs) > 1:
        raise InputError(f"card: {len(arguments.runs)} runs: give one, or --table to compare them")
    else:
        stated = {"license": arguments.license, "data_license": arguments.data_license}
        if arguments.output is not None:
            print(f"wrote {', '.join(map(str, write_card(arguments.runs[0], arguments.output, **stated)))}")
            return 0
        text = str(build_card(arguments.runs[0], **stated))
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")
        print(f"wrote {arguments.output}")
    else:
        print(text)
    return 0


def _augmentation_graph(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.evaluation.augmentation_graph import AugmentationGraph, sample_spectra
    from hf_ssl_or.report.augmentation_graph import graph_table, plot_graph
    from hf_ssl_or.show import print_table

    graph = AugmentationGraph(
        same=arguments.same,
        same_class=arguments.same_class,
        same_pixels=arguments.same_pixels,
        neither=arguments.neither,
    )
    spectra = sample_spectra(graph, arguments.augmentations, repeats=arguments.repeats, seed=arguments.seed)
    drawn = plot_graph(graph, spectra, arguments.output)
    print_table(graph_table(graph, spectra))
    print(f"wrote {' and '.join(map(str, drawn.files))}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.listing import names_and_notes

    rows = names_and_notes(arguments.what, arguments.pattern)
    width = max((len(name) for name, _ in rows), default=0)
    for name, note in rows:
        print(f"{name:<{width}}  {note}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
