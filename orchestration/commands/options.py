"""Common options of commands, and what a command of the command line is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """One command: a line about it, its options, and the function that carries it out and returns its exit code."""

    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    carry_out: Callable[[argparse.Namespace], int]


def add_overrides(parser: argparse.ArgumentParser, text: str = "changes to the defaults") -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    text = "your own recipes, parts and data sets beside ours (also EXPERTAIL_CONFIG_DIR)"
    parser.add_argument("--config-dir", metavar="DIR", help=text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    add_config_dir(parser)
