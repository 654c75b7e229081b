"""The command line: `expertail train`, `show`, `sweep`, `plan`, `evaluate`, `regions`, `features`, ..., `sync`.

Also `python -m orchestration`.

This file imports next to nothing, so that help appears at once and libraries load while Ray starts. The
commands, each with its options: orchestration/commands/training_commands.py and result_commands.py.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
import warnings
from typing import Any

from experts.data.names import HANDLER
from orchestration import __version__
from orchestration.commands.result_commands import RESULTS
from orchestration.commands.training_commands import TRAINING
from orchestration.config.messages import say
from orchestration.config.secrets import redact

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
  expertail sweep dataset.imbalance_ratio=20,50,100 method=ce,ride seed=0,1,2 a run per value of any keys, with spread
  expertail sweep method=ce,ldam 'then=[joint,ncm,crt,lws]' dataset=digits_lt any loss with any classifier
  expertail study method=ce,ride seed=0,1,2 dataset=digits_lt                 many runs side by side, compared
  expertail study study=tour --plan                                           ... of a file; what it would take
  expertail status runs/tour                                                  how far each of its runs is
  expertail report runs/tour                                                  which is best, at which cost, how surely
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
    except SystemExit as end:
        if end.code != signal.SIGTERM:  # which is what Ray exits with, until a run watches for signals
            raise
        say("stopped by SIGTERM; the same command goes on")
        return 128 + signal.SIGTERM
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
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
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
    for name, command in {**TRAINING, **RESULTS}.items():
        sub = commands.add_parser(name, help=command.about, description=command.about, **look)
        sub.set_defaults(command=name, carry_out=command.carry_out)
        sub.add_argument("--traceback", action="store_true", help="show where an error was raised")
        command.add_options(sub)
    return parser
