"""The command line: words to one stage. Logging and `.env` are set up here and nowhere else."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from saets.commands import compare, exchange, explorer, features, forecast, plan, report, stages, steer
from saets.commands.common import Command, errors
from saets.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where doctor found something, 2 for bad input, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not options.verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its own level when it is imported
        for name in ("transformers", "sae_lens"):
            logging.getLogger(name).setLevel(logging.ERROR)
    _read_env()
    command: Command = options.command
    try:
        return command(options) or 0
    except InputError as error:
        errors.print(f"saets: {' '.join(str(error).split())}", markup=False)
        return 2
    except KeyboardInterrupt:
        errors.print("saets: stopped; run the same command again to go on from here", markup=False)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    words = argparse.ArgumentParser(prog="saets", description="Steer language models by targeting the features of an SAE.")
    words.add_argument("--verbose", action="store_true", help="show what Ray and the libraries say")
    commands = words.add_subparsers(required=True, metavar="COMMAND")
    for module in (stages, report, explorer, plan, compare, features, steer, forecast, exchange):
        module.add(commands)
    return words


def _read_env() -> None:
    """Take keys from a `.env` file in or above the working folder, then from one in the home folder: a Ray job works in a copy
    of the folder that it was submitted from. What the environment has already wins."""
    from dotenv import find_dotenv, load_dotenv

    for file in (find_dotenv(usecwd=True), Path.home() / ".env"):
        if file:
            load_dotenv(file)


if __name__ == "__main__":
    sys.exit(main())
