"""The commands around training: the options of each, and what it does with them.

Each imports its own libraries, which take seconds.
"""

from __future__ import annotations

import argparse
import time

from orchestration.commands.options import Command, add_config_dir, add_recipe
from orchestration.config.messages import say, show


def _train_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--list", action="store_true", help="list the choices of every group and exit")


def _ls(options: argparse.Namespace) -> int:
    from orchestration.commands.choices import choices_text

    show(choices_text())
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.list:
        return _ls(options)
    marks = {"start": _process_start(), "command": time.time()}
    from orchestration.cluster.early_ray import early_ray

    with early_ray(options.overrides):
        from orchestration.commands.train import train_and_report
        from orchestration.config.compose import compose

        composed = compose(options.overrides)
        marks["config"] = time.time()
        for note in composed.notes:
            say(note)
        return train_and_report(composed.config, marks, composed.files)


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def _cp_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RECIPE", help="a method, or group=choice, e.g. ride, then=crt, pace=demo")
    parser.add_argument(
        "target", metavar="FILE", help="the new file, e.g. my.yaml; its name will be that of the recipe"
    )
    add_config_dir(parser)


def _cp(options: argparse.Namespace) -> int:
    from orchestration.commands.copy_recipe import copy_recipe

    show(copy_recipe(options.source, options.target))
    return 0


def _show_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--all", action="store_true", help="also the keys that no file and no word sets")


def _show(options: argparse.Namespace) -> int:
    from orchestration.commands.show import show_text

    show(show_text(options.overrides, options.all))
    return 0


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    text = "keys with several values, e.g. method=ce,ldam seed=0,1,2, and those for all runs"
    parser.add_argument("overrides", nargs="+", metavar="KEY=V1,V2,...", help=text)
    add_config_dir(parser)
    _add_plan(parser)


def _sweep(options: argparse.Namespace) -> int:
    from orchestration.commands.sweep import refuse_one_run

    refuse_one_run(options.overrides)
    return _carry_out_study(options)


def _study_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _add_plan(parser)
    parser.add_argument("--list", action="store_true", help="list the studies that there are and exit")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="print runs, places, hours and storage; start nothing")


def _study(options: argparse.Namespace) -> int:
    if options.list:
        from orchestration.studies.study_config import studies_text

        show(studies_text())
        return 0
    return _carry_out_study(options)


def _carry_out_study(options: argparse.Namespace) -> int:
    if options.plan:
        from orchestration.commands.study import plan_study

        show(plan_study(options.overrides))
        return 0
    from orchestration.studies.study_config import read_study

    read_study(options.overrides)  # a file that cannot be read is told of before Ray starts
    from orchestration.cluster.early_ray import early_ray

    with early_ray(options.overrides, "orchestration.commands.study"):
        from orchestration.commands.study import study

        return study(options.overrides)


def _status_options(parser: argparse.ArgumentParser) -> None:
    text = "the folder of a study, of runs or of one run (default: runs)"
    parser.add_argument("place", metavar="DIR|STUDY", nargs="?", default="runs", help=text)


def _status(options: argparse.Namespace) -> int:
    from orchestration.commands.status import status

    show(status(options.place))
    return 0


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    text = "take a few steps on real workers and estimate the hours from them"
    parser.add_argument("--probe", action="store_true", help=text)


def _plan(options: argparse.Namespace) -> int:
    if not options.probe:
        from orchestration.commands.plan import plan_text

        show(plan_text(options.overrides))
        return 0
    from orchestration.cluster.early_ray import early_ray

    begun = _process_start()
    with early_ray(options.overrides):  # as `train` does, because the time until the first step is measured
        from orchestration.commands.plan import probe_text

        show(probe_text(options.overrides, begun))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from orchestration.commands.doctor import examine

    text, healthy = examine(options.overrides)
    show(text)
    return 0 if healthy else 1


TRAINING: dict[str, Command] = {
    "train": Command("Train a run, or resume it where it stopped.", _train_options, _train),
    "ls": Command("List methods, parts, data sets and settings, a line each.", add_config_dir, _ls),
    "cp": Command("Copy one of our recipes or parts, to change it.", _cp_options, _cp),
    "show": Command("Print the resolved recipe, and where each of its values comes from.", _show_options, _show),
    "plan": Command(
        "Show placement, sizes, steps and cost of a run; without --probe nothing is started.", _plan_options, _plan
    ),
    "sweep": Command(
        "Train a run for each value of a key, or of several; a study without a file.", _sweep_options, _sweep
    ),
    "study": Command(
        "Train many runs side by side and compare them; repeat the command to resume.", _study_options, _study
    ),
    "status": Command(
        "Say how far the runs of a study or folder are, without touching them.", _status_options, _status
    ),
    "doctor": Command("Compare what a config needs with what this machine and its cluster have.", add_recipe, _doctor),
}
