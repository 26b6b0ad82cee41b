"""The command line: verbs, not fields. Every setting lives in a recipe and is overridden as `section.key=value`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hf_ssl_or.errors import InputError, NonFiniteLossError, unknown

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
  hf-ssl-or preview recipes/quickstart.yaml views.count=8 --output views.png
  hf-ssl-or list methods
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all verbs."""
    parser = _Parser(
        prog="hf-ssl-or",
        description="Pretrain image encoders from unlabelled images without dimensional collapse.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

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

    evaluate = _verb(
        verbs,
        "evaluate",
        "judge an encoder by kNN and linear probes",
        "hf-ssl-or evaluate runs/quickstart --protocols knn",
    )
    evaluate.add_argument("encoder", help="a run's folder, an encoder's folder or a Hub id")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value", help="data.* and evaluation.* settings")
    evaluate.add_argument("--dataset", help="images to judge on (default: those of the run)")
    evaluate.add_argument("--protocols", help="comma-separated names, see hf-ssl-or list protocols")
    evaluate.add_argument("--output", type=Path, help="where to write the results as JSON")

    preview = _verb(
        verbs, "preview", "draw a PNG of augmented views", "hf-ssl-or preview recipes/quickstart.yaml views.count=8"
    )
    preview.add_argument("recipe")
    preview.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the recipe")
    preview.add_argument("--images", type=int, default=8, help="number of images, one per row (default: 8)")
    preview.add_argument("--output", type=Path, default=Path("preview.png"))

    listing = _verb(verbs, "list", "list methods, encoders, protocols or recipes", "hf-ssl-or list encoders 'vit_*'")
    listing.add_argument("what", choices=["methods", "encoders", "protocols", "recipes"])
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern (default: all)")
    return parser


def _verb(verbs: argparse._SubParsersAction, name: str, what: str, example: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"example: {example}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 2 (bad input), 3 (loss not finite) or 75 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        return _dispatch(arguments)
    except (InputError, NonFiniteLossError, OSError) as error:
        if show_traceback:
            traceback.print_exc()
        process = os.environ.get("RANK", "0")
        where = "" if process == "0" else f"[process {process}] "
        print(f"hf-ssl-or: {where}error: {_one_line(error)}", file=sys.stderr)
        return EXIT_NON_FINITE if isinstance(error, NonFiniteLossError) else EXIT_BAD_INPUT


def _one_line(error: Exception) -> str:
    """Says what is wrong; of an error of the operating system (a full disk, say) the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _dispatch(argv: list[str]) -> int:
    parser = build_parser()
    verbs = ("train", "evaluate", "preview", "list")
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        raise unknown("verb", argv[0], verbs)
    arguments, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-")]  # overrides that come after an option
    if len(late) < len(rest) or (late and "overrides" not in arguments):
        parser.error(
            f"unrecognized arguments: {' '.join(text for text in rest if text not in late) or ' '.join(late)}"
        )
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    if arguments.verb is None:
        parser.print_help()
        return 0
    return {"train": _train, "evaluate": _evaluate, "preview": _preview, "list": _list}[arguments.verb](arguments)


# The heavy imports (torch, transformers) stay inside the verbs, so that --help and a mistyped verb answer at once.


def _train(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.run import pretrain, recipe_and_folder
    from hf_ssl_or.show import print_results
    from hf_ssl_or.training.interruption import TrainingInterrupted

    recipe, folder = recipe_and_folder(
        arguments.recipe, arguments.overrides, output=arguments.output, resume=arguments.resume
    )
    try:
        results = pretrain(recipe, folder, resume=arguments.resume)
    except TrainingInterrupted as interruption:
        print(f"hf-ssl-or: {interruption}; continue with: hf-ssl-or train {folder} --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    if results is not None:
        print_results(results, folder)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.run import evaluate
    from hf_ssl_or.show import print_evaluation

    results = evaluate(
        arguments.encoder,
        arguments.overrides,
        dataset=arguments.dataset,
        protocols=arguments.protocols.split(",") if arguments.protocols else None,
        output=arguments.output,
    )
    print_evaluation(results)
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    from hf_ssl_or.preview import draw_preview
    from hf_ssl_or.recipe import load_recipe

    draw_preview(load_recipe(arguments.recipe, arguments.overrides), arguments.output, images=arguments.images)
    print(f"wrote {arguments.output}")
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
