"""Makes what the `smollm2` preset ships, in parts that are each made once and can be stopped.

    python scripts/build_assets.py [PART ...] [--work build/assets] [--set section.key=value] ... [--skip SOURCE] ... [--list]

Parts, each made with those that it needs: `writing` (text that the model writes), `passages` (text from Debian packages),
`residuals` (of both, at several layers), `compare` (kinds, layers and widths of SAE on few tokens), `sae` (the shipped one),
`cards` (what its features fire on), `effects` (what vectors do to them) and `ship` (into the package). Without a name: all of
these but `compare`. Studies by the fit to effects: `layers`, `targets` (of calibration), `rollouts` (how many, how long). What
a changed setting decides is made anew, and nothing else.

All but `passages` and `ship` use a GPU where there is one. Carry the work folder to a machine with one and back, with `--weights
FOLDER` where the package with the weights is not installed: no part but `ship` needs Ray or TransformerLens, none
but `compare` and `sae` SAELens, and `writing` and `residuals` only torch and transformers. What `passages` needs of Debian's
packages is named by `--list`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets.parts import Build, Part
from assets.settings import Settings

from saets.errors import InputError


class Later:
    """The functions of a module, which is imported when one is called: some need more packages than others."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *given: getattr(importlib.import_module(self._module), name)(*given)


writing, passages, residuals, training = (Later(f"assets.{name}") for name in ("writing", "passages", "residuals", "training"))
cards, measuring, studies, shipping = (Later(f"assets.{name}") for name in ("cards", "measuring", "studies", "shipping"))

PARTS = {
    "passages": Part(passages.make, ("subject", "passages"), need=passages.need, also=passages.sources, check=passages.check),
    "writing": Part(writing.make, ("subject", "writing"), need=writing.need, also=writing.begun_with),
    "residuals": Part(
        residuals.make, ("subject", "residuals"), ("writing", "passages"), need=residuals.need, check=residuals.check
    ),
    "compare": Part(
        training.compare, ("subject", "training", "compare"), ("residuals",), need=training.need_to_compare, check=training.check
    ),
    "sae": Part(training.make, ("subject", "training"), ("residuals",), need=training.need, check=training.check),
    "cards": Part(cards.make, ("cards",), ("writing", "sae"), need=cards.need),
    "effects": Part(measuring.make, ("effects",), ("sae",), need=measuring.need, also=measuring.settings_and_live_rows),
    "layers": Part(studies.layers, ("layers",), ("compare",), need=studies.need, also=measuring.preset_settings),
    "targets": Part(studies.targets, ("targets",), ("sae",), need=studies.need, also=measuring.preset_settings),
    "rollouts": Part(studies.rollouts, ("rollouts",), ("sae",), need=studies.need, also=measuring.preset_settings),
    "ship": Part(shipping.make, (), ("writing", "passages", "sae", "cards", "effects"), check=shipping.check, each_time=True),
}

STUDIES = ("compare", "layers", "targets", "rollouts")
"""Parts that inform a choice and that nothing shipped is made of."""


def main() -> None:
    """Make what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    add_options(parser)
    parser.add_argument("--list", action="store_true", help="say what is made, what is not, and which packages are needed")
    given = parser.parse_args()
    try:
        build = build_of(given)
        if given.list:
            _list(build)
            return
        build.make(given.parts or [name for name in PARTS if name not in STUDIES])
    except InputError as error:
        sys.exit(f"build_assets: {error}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that say which build it is."""
    parser.add_argument("--work", type=Path, default=Path("build/assets"), help="folder of all parts")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a setting")
    parser.add_argument("--skip", action="append", default=[], metavar="SOURCE", help="leave out a source of passages")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="the model, where its package is not installed")


def build_of(given: argparse.Namespace) -> Build:
    """The build that the options name.

    Raises:
        InputError: an unknown setting or source, or no such folder of weights.
    """
    settings = Settings().replaced(given.set)
    left_out = tuple(sorted({*settings.passages.skip, *given.skip}))
    settings = dataclasses.replace(settings, passages=dataclasses.replace(settings.passages, skip=left_out))
    if given.weights and not (given.weights / "config.json").is_file():
        raise InputError(f"--weights {given.weights}: expected a folder with config.json, as save_pretrained writes it")
    build = Build(given.work, settings, PARTS, given.weights)
    passages.wanted(build)
    return build


def _list(build: Build) -> None:
    for name in PARTS:
        state = "made" if build.is_made(name) else "begun" if build.folder(name).exists() else "not made"
        print(f"{name:10} {state:9} {build.folder(name)}")
    packages = [package for source in passages.wanted(build).values() for package in source.packages]
    print(f"passages need: apt-get install {' '.join(packages)}")


if __name__ == "__main__":
    main()
