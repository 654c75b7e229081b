"""The command line: `expertail train`, `show`, `sweep`, `plan`, `evaluate`, `regions`, `features`, ..., `sync`.

Also `python -m orchestration`.

This file imports next to nothing, so that help appears at once and libraries load while Ray starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experts.data.names import HANDLER
from orchestration import __version__
from orchestration.config.messages import say, show

_EPILOG = """\
examples:
  expertail train method=ride dataset=cifar100_lt dataset.root=~/data/cifar    train, or resume where it stopped
  expertail train method=ride mix=mixup then=h2t dataset=cifar100_lt          a recipe from parts
  expertail train method=ce 'then=[joint,ncm,crt,lws]' dataset=cifar100_lt    four classifiers on one network
  expertail train then=ncm method.like=runs/ride-cifar100_lt-s0               a further stage on a saved run
  expertail show  method=ride then=h2t dataset=cifar100_lt                    the whole recipe, each value's origin
  expertail cp ride my.yaml                                                   a recipe of your own, method=my
  expertail plan  method=ride dataset=cifar100_lt cluster.workers=6           placement, sizes, cost; starts nothing
  expertail plan --probe method=ride dataset=digits_lt                        ... and the hours, measured on a few steps
  expertail evaluate runs/ride-digits_lt-s0                                   measure a saved run again
  expertail evaluate RUN --weights test-time --distribution backward-50       learn the experts' weights without labels
  expertail evaluate RUN --unknown ~/data/others                              ... on images of no known class, too
  expertail predict runs/ride-birds-s0 photos/ --csv said.csv                 class names for image files
  expertail export runs/ride-birds-s0 birds.onnx                              one file for other programs
  expertail sweep method.stages.h2t.flow.ratio=0,0.25,0.5 method=ride_h2t     one run per value, one table
  expertail sweep method=ce,ldam 'then=[joint,ncm,crt,lws]' dataset=digits_lt any loss with any classifier
  expertail regions runs/ride_h2t-digits_lt-s0 --classes 0,9                  decision regions before and after H2T
  expertail features RUN --classes 0,5,9 --projection tsne                    features before and after each stage
  expertail import-weights resnet50.pth weights/resnet50.safetensors          pretrained weights for big backbones
  expertail doctor                                                            is this machine ready?

KEY=VALUE is group=choice or a.b=value. The groups (what there is: expertail train --list):
  method=      the recipe: experts, losses, stages
  mix=         how its images are mixed, on any recipe
  then=        a further stage on any recipe, or several from the same one: 'then=[crt,lws]'
  dataset=     the images; with it follow
  protocol=      optimiser and learning rates as published
  pace=          epochs, batch sizes and backbone; pace=digits_lt is half a minute
  backbone=    another network
  cluster=     where it runs
A key set with a.b=value wins over all files: method.stages.train.epochs=20 (its drops come earlier in proportion).
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 refused or failed, 2 wrong usage, 75 nodes were taken away, 130 and 143 stopped by
        SIGINT and SIGTERM, 129, 138, 140 and 152 by SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU.
    """
    _print_any_text()
    _warn_only()
    _keep_docstrings()
    parser = _parser()
    given = sys.argv[1:] if argv is None else argv
    if given and "=" in given[0] and not given[0].startswith("-"):
        parser.error(f"{given[0]}: needed a command first, e.g. expertail train {' '.join(given)}")

    # argparse takes only the words before the first option as `overrides`; those behind it come back as unknown words.
    options, words = parser.parse_known_args(given)
    words = [word for word in words if word != "--"]
    takes_keys = hasattr(options, "overrides")
    if words and (not takes_keys or any(word.startswith("-") for word in words)):
        hint = f"; needed one of the options of `expertail {options.command} --help`" if options.command else ""
        if takes_keys:
            hint += ", or keys as a.b=value without dashes, e.g. dataset.root=/data"
        parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")
    if words:
        options.overrides += words

    if options.command is None:
        parser.print_help()
        return 2

    if getattr(options, "config_dir", None):  # by the environment, for whatever this process starts
        os.environ["EXPERTAIL_CONFIG_DIR"] = os.path.abspath(os.path.expanduser(options.config_dir))
    try:
        return int(options.carry_out(options) or 0)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BaseException as error:  # a stop is no Exception: nothing that guards a picture may swallow it
        if not isinstance(error, Exception) and not hasattr(error, "exit_code"):
            raise  # SystemExit and whatever else is no answer to give
        return _explain(error, options.traceback)


def _print_any_text() -> None:
    """Let both streams take names of files whose bytes are no text, whatever the encoding of the terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's or a notebook's may be another
            stream.reconfigure(errors=HANDLER)


def _warn_only() -> None:
    """Let libraries warn while they load: with PYTHONWARNINGS=error the first of them would end the command."""
    asked = {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "").split(","), "-W": sys.warnoptions}
    found = [way for way, options in asked.items() if any(o.partition(":")[0].strip() == "error" for o in options)]
    if found:
        os.environ.pop("PYTHONWARNINGS", None)  # for the processes that this one starts
        sys.warnoptions.clear()  # multiprocessing hands these on, of -W too
        warnings.resetwarnings()
        for usual in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", usual)
        say(f"{found[0]} = error is not applied: libraries warn while they load")


def _keep_docstrings() -> None:
    """Let the processes that this one starts have docstrings: some of Ray's end without, and minutes pass then."""
    if os.environ.get("PYTHONOPTIMIZE", "") not in ("", "0", "1"):
        say(f"PYTHONOPTIMIZE = {os.environ['PYTHONOPTIMIZE']} is 1 for Ray's processes, which need their docstrings")
        os.environ["PYTHONOPTIMIZE"] = "1"


def _explain(error: BaseException, full: bool) -> int:
    """Print an error as a message to act on; with its traceback if asked for, or if the fault is ours."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        say(str(error))
        return int(code)
    # By name, because importing WorkerLost would load Ray.
    expected = isinstance(error, ValueError | FloatingPointError | OSError) or type(error).__name__ == "WorkerLost"
    if full or not expected:
        traceback.print_exception(error)
    else:
        say(str(error))
    return 1


def _parser() -> argparse.ArgumentParser:
    look: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "Trains ensembles of experts for long-tailed image recognition on a Ray cluster."
    parser = argparse.ArgumentParser(prog="expertail", description=about, **look)
    parser.add_argument("--version", action="version", version=f"expertail {__version__}")
    parser.set_defaults(command=None, traceback=False)

    commands = parser.add_subparsers(metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.about, description=command.about, **look)
        sub.set_defaults(command=name, carry_out=command.carry_out)
        sub.add_argument("--traceback", action="store_true", help="show where an error was raised")
        command.add_options(sub)
    return parser


def _add_overrides(parser: argparse.ArgumentParser, text: str = "changes to the defaults") -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def _add_config_dir(parser: argparse.ArgumentParser) -> None:
    text = "your own recipes, parts and data sets beside ours (also EXPERTAIL_CONFIG_DIR)"
    parser.add_argument("--config-dir", metavar="DIR", help=text)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser)
    _add_config_dir(parser)


# One pair of functions per command: its options, and what it does. Each imports its own libraries, which take seconds.


def _train_options(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--list", action="store_true", help="list the choices of every group and exit")


def _ls(options: argparse.Namespace) -> int:
    from orchestration.commands.choices import choices_text

    show(choices_text())
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.list:
        return _ls(options)
    marks = {"start": _process_start(), "command": time.time()}
    with _early_ray(options.overrides):
        from orchestration.commands.train import train_and_report
        from orchestration.config.compose import compose

        composed = compose(options.overrides)
        marks["config"] = time.time()
        for note in composed.notes:
            say(note)
        return train_and_report(composed.config, marks, composed.files)


@contextlib.contextmanager
def _early_ray(words: list[str]) -> Iterator[None]:
    """Run our own Ray when nothing names a cluster, started while another thread loads torch.

    Half of the time from command to first step is spent waiting for Ray's processes and for libraries, seconds each.
    Ray starts in this thread, because its processes end with the thread that started them.
    """
    import ray

    named = os.environ.get("RAY_ADDRESS") or any(w.startswith(("cluster.address=", "cluster=")) for w in words)
    if named or ray.is_initialized():
        yield
        return
    loading = threading.Thread(target=importlib.import_module, args=("orchestration.commands.train",), daemon=True)
    loading.start()
    from orchestration.cluster.local_ray import start_local_ray

    start_local_ray()
    loading.join()
    try:
        yield
    finally:
        ray.shutdown()


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def _cp_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RECIPE", help="a method, or group=choice, e.g. ride, then=crt, pace=demo")
    parser.add_argument(
        "target", metavar="FILE", help="the new file, e.g. my.yaml; its name will be that of the recipe"
    )


def _cp(options: argparse.Namespace) -> int:
    from orchestration.commands.copy_recipe import copy_recipe

    show(copy_recipe(options.source, options.target))
    return 0


def _show_options(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--all", action="store_true", help="also the keys that no file and no word sets")


def _show(options: argparse.Namespace) -> int:
    from orchestration.commands.show import show_text

    show(show_text(options.overrides, options.all))
    return 0


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variation", metavar="KEY=V1,V2,...", help="e.g. method.stages.h2t.flow.ratio=0,0.1,0.25,0.5,1")
    _add_recipe(parser)


def _sweep(options: argparse.Namespace) -> int:
    from orchestration.commands.sweep import sweep

    return sweep(options.variation, options.overrides)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    text = "take a few steps on real workers and estimate the hours from them"
    parser.add_argument("--probe", action="store_true", help=text)


def _plan(options: argparse.Namespace) -> int:
    if not options.probe:
        from orchestration.commands.plan import plan_text

        show(plan_text(options.overrides))
        return 0
    begun = _process_start()
    with _early_ray(options.overrides):  # as `train` does, because the time until the first step is measured
        from orchestration.commands.plan import probe_text

        show(probe_text(options.overrides, begun))
    return 0


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride-digits_lt-s0")
    parser.add_argument(
        "--model", choices=("best", "last"), help="which of its models (default: both; with --distribution: best)"
    )
    parser.add_argument(
        "--weights",
        metavar="RULE",
        help="how experts are weighted on other test distributions: uniform, test-time (learnt without labels), "
        "known-prior, or numbers, e.g. 0.2,0.3,0.5 (best and last mean --model)",
    )
    parser.add_argument(
        "--distribution",
        metavar="D[,D...]",
        help="uniform, forward-<ratio>, backward-<ratio>, or published for all the published ones (default: uniform)",
    )
    parser.add_argument(
        "--split", choices=("test", "val"), default="test", help="the split to measure on (default: test)"
    )
    parser.add_argument("--stage", metavar="STAGE", help="which of several final stages, e.g. crt (default: all)")
    text = "images of no known class, a folder or a text file of paths: open-set F-measure, AUROC, accuracy"
    parser.add_argument("--unknown", metavar="PATH", help=text)
    text = "with --unknown: an image whose highest probability is below is rejected (default: 0.1, as published)"
    parser.add_argument("--threshold", type=float, metavar="P", help=text)
    _add_overrides(parser, "where the data is now, e.g. dataset.root=..., or test_time.lr=..., views.blur=...")


def _evaluate(options: argparse.Namespace) -> int:
    from orchestration.commands.evaluate import evaluate

    how = (options.weights, options.model, options.distribution, options.split, options.overrides, options.stage)
    show(evaluate(options.run, *how, options.unknown, options.threshold))
    return 0


def _predict_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, an exported model's folder, or an MLflow model, e.g. models:/NAME/1"
    parser.add_argument("source", metavar="RUN|MODEL", help=text)
    parser.add_argument("files", nargs="+", metavar="FILE|FOLDER", help="images of any format and size")
    parser.add_argument("--model", choices=("best", "last"), default="best", help="which of a run's (default: best)")
    parser.add_argument("--stage", metavar="STAGE", default="", help="which of several final stages, e.g. crt")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes named for each image (default: 3)")
    parser.add_argument("--csv", metavar="FILE", help="write CSV; - writes it to standard output")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file cannot be read, not only if all")


def _predict(options: argparse.Namespace) -> int:
    from orchestration.commands.predict import Options, predict

    how = Options(options.model, options.stage, options.top, options.csv)
    text, unread = predict(options.source, options.files, how)
    show(text)
    return 1 if unread and options.strict else 0


def _export_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, an exported model's folder, or an MLflow model, e.g. models:/NAME/1"
    parser.add_argument("source", metavar="RUN|MODEL", help=text)
    text = "file to write; .onnx or .pt2 says the form, else each form adds its ending"
    parser.add_argument("out", metavar="OUT", help=text)
    for form, text in (
        ("onnx", "for ONNX Runtime and others"),
        ("torch", "torch.export, for PyTorch without our code"),
    ):
        parser.add_argument(f"--{form}", dest="forms", action="append_const", const=form, help=text)
    parser.add_argument("--model", choices=("best", "last"), default="best", help="which of a run's (default: best)")
    parser.add_argument("--stage", metavar="STAGE", default="", help="which of several final stages, e.g. crt")


def _export(options: argparse.Namespace) -> int:
    from orchestration.commands.export import Options, export

    show(export(options.source, options.out, Options(options.model, options.stage, tuple(options.forms or ()))))
    return 0


def _regions_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride_h2t-digits_lt-s0")
    parser.add_argument(
        "--classes", metavar="A,B[,...]", help="ids or names (default: the most frequent class and the rarest)"
    )
    parser.add_argument(
        "--stage", metavar="STAGE", help="which of several final stages (default: the last that trains heads)"
    )
    _add_overrides(parser, "where the data is now, e.g. dataset.root=...")


def _regions(options: argparse.Namespace) -> int:
    from orchestration.results.regions import draw_regions
    from orchestration.storage.location import local_run

    with local_run(options.run) as run:
        show(draw_regions(run, options.classes, options.overrides, options.stage))
    return 0


def _features_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride-digits_lt-s0")
    parser.add_argument("--classes", metavar="A,B[,...]", help="ids or names (default: some of each group)")
    text = "principal components, or t-SNE of scikit-learn (default: pca)"
    parser.add_argument("--projection", choices=("pca", "tsne"), default="pca", help=text)
    parser.add_argument("--stage", metavar="STAGE", help="which stage (default: all that have steps)")
    _add_overrides(parser, "where the data is now, e.g. dataset.root=...")


def _features(options: argparse.Namespace) -> int:
    from orchestration.results.features import draw_chosen
    from orchestration.storage.location import local_run

    with local_run(options.run) as run:
        show(draw_chosen(run, options.classes, options.projection, options.overrides, options.stage))
    return 0


def _import_weights_options(parser: argparse.ArgumentParser) -> None:
    text = "state dict from torchvision, or from Caffe converted to PyTorch"
    parser.add_argument("source", metavar="SOURCE", help=text)
    text = "the .safetensors file to write, for method.backbone_weights"
    parser.add_argument("target", metavar="TARGET", help=text)


def _import_weights(options: argparse.Namespace) -> int:
    from orchestration.storage.pretrained import import_weights

    show(f"{import_weights(options.source, options.target)}\nwritten to {options.target}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from orchestration.commands.doctor import examine

    text, healthy = examine(options.overrides)
    show(text)
    return 0 if healthy else 1


def _sync_options(parser: argparse.ArgumentParser) -> None:
    text = "run folder or its URL, or the folder of a sweep for all its runs"
    parser.add_argument("run", metavar="RUN", help=text)
    parser.add_argument("--uri", help="tracking server (default: the run's own)")


def _sync(options: argparse.Namespace) -> int:
    from orchestration.commands.sync import sync_run

    problem = sync_run(options.run, options.uri)
    show(problem or "tracking: the server has everything of this run")
    return 1 if problem else 0


def _promote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder or its URL, e.g. runs/ride-digits_lt-s0")
    parser.add_argument("--alias", default="best", help="the alias to set (default: best)")
    parser.add_argument("--model", choices=("best", "last"), default="best", help="which of the run's (default: best)")
    parser.add_argument("--stage", metavar="STAGE", default="", help="which of several final stages, e.g. crt")
    parser.add_argument("--uri", help="tracking server (default: the run's own)")


def _promote(options: argparse.Namespace) -> int:
    from orchestration.commands.promote import promote

    show(promote(options.run, options.model, options.stage, options.alias, options.uri))
    return 0


class _Command(NamedTuple):
    """One command: a line about it, its options, and the function that carries it out and returns its exit code."""

    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    carry_out: Callable[[argparse.Namespace], int]


_COMMANDS = {
    "train": _Command("Train a run, or resume it where it stopped.", _train_options, _train),
    "ls": _Command("List methods, parts, data sets and settings, a line each.", _add_config_dir, _ls),
    "cp": _Command("Copy one of our recipes or parts, to change it.", _cp_options, _cp),
    "show": _Command("Print the resolved recipe, and where each of its values comes from.", _show_options, _show),
    "sweep": _Command(
        "Train one run for each value of a key and compare them; repeat the command to resume.", _sweep_options, _sweep
    ),
    "plan": _Command(
        "Show placement, sizes, steps and cost of a run; without --probe nothing is started.", _plan_options, _plan
    ),
    "evaluate": _Command("Measure a saved run again and print its table.", _evaluate_options, _evaluate),
    "predict": _Command("Say what a trained ensemble takes image files for.", _predict_options, _predict),
    "export": _Command(
        "Write a trained ensemble as one file for other programs: ONNX or torch.export.", _export_options, _export
    ),
    "regions": _Command(
        "Draw decision regions before and after a last stage that trains only heads.", _regions_options, _regions
    ),
    "features": _Command(
        "Draw features of test images on a plane, before and after each stage.", _features_options, _features
    ),
    "import-weights": _Command(
        "Convert a PyTorch file of a ResNet or ResNeXt to safetensors.", _import_weights_options, _import_weights
    ),
    "doctor": _Command(
        "Compare what a config needs with what this machine and its cluster have.", _add_recipe, _doctor
    ),
    "promote": _Command("Give the alias `best` in MLflow's registry to a run's model.", _promote_options, _promote),
    "sync": _Command("Upload to MLflow what is still missing of a run.", _sync_options, _sync),
}
