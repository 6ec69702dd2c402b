"""`saets steer`: unsteered and steered text side by side, for the prompts given, or else for those typed or piped in."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from saets.commands.common import Commands, add_command, console, errors, opened_run
from saets.commands.looking import add_vector_choice, chosen_vector, say_where_added
from saets.errors import InputError, unknown
from saets.tokens import PromptFormat

if TYPE_CHECKING:
    from saets.explore import Run
    from saets.vector.vector import SteeringVector

HELP = """\
a line is a prompt, an empty one the empty prompt; a line that starts with / changes how the next ones are continued:
/scale 40 80    L2 lengths to add        /samples 3    texts each
/seed 1         other noise              /tokens 30    new tokens of each text
/format chat    or plain                 /quit         or Ctrl-D"""

INVITATION = "prompt> "


def add(commands: Commands) -> None:
    """Put the command into the parser."""
    steer = add_vector_choice(add_command(commands, "steer", _steer, "show unsteered and steered text side by side"))
    steer.add_argument(
        "--scale",
        type=float,
        action="append",
        default=[],
        help="L2 length to add; may be given several times. By default that of the file, those that it recommends, or "
        "else the one that the experiment's calibration finds",
    )
    steer.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="may be given several times; without one, prompts are typed, or read from a pipe",
    )
    steer.add_argument("--prompt-format", choices=("plain", "chat"), help="by default that of the experiment's evaluation")
    steer.add_argument("--samples", type=int, default=3)
    steer.add_argument("--new-tokens", type=int, help="by default as many as in the experiment's evaluation")
    steer.add_argument("--seed", type=int, default=0)
    steer.add_argument("--force", action="store_true", help="take a vector of another model or hook")


def _steer(options: argparse.Namespace) -> None:
    if options.prompt_format:
        options.overrides.append(f"evaluation.prompt_format={options.prompt_format}")
    run = opened_run(options)
    settings = run.experiment.evaluation
    new_tokens = settings.new_tokens if options.new_tokens is None else options.new_tokens
    how = How(tuple(options.scale), options.samples, options.seed, new_tokens, settings.prompt_format)
    vector = chosen_vector(run, options)
    say_where_added(run, vector)
    if not how.scales:
        how = replace(how, scales=_own_scales(run, vector, options.force))
    talk = Talk(run, vector, how, force=options.force)
    for prompt in options.prompt:
        talk.take(prompt)
    if not options.prompt:
        _converse(talk)


@dataclass(frozen=True)
class How:
    """How prompts are continued."""

    scales: tuple[float, ...]
    samples: int
    seed: int
    new_tokens: int
    prompt_format: PromptFormat

    def __post_init__(self) -> None:
        if not all(math.isfinite(scale) for scale in self.scales):
            raise InputError(f"scales {', '.join(f'{scale:g}' for scale in self.scales)}: expected finite numbers")
        for name in ("samples", "new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")


class Talk:
    """One vector on a warm model, and how it is used until further notice."""

    def __init__(self, run: Run, vector: SteeringVector, how: How, *, force: bool) -> None:
        self._run, self._vector, self._force = run, vector, force
        self.how = how

    def take(self, prompt: str) -> None:
        """Continue a prompt, and show it."""
        how = self.how
        texts = self._run.compare(
            prompt,
            self._vector,
            (0.0, *how.scales),
            samples=how.samples,
            new_tokens=how.new_tokens,
            seed=how.seed,
            prompt_format=how.prompt_format,
            force=self._force,
        )
        before = prompt if how.prompt_format == "plain" else ""
        title = None if how.prompt_format == "plain" else escape(prompt)
        table = Table("unsteered", *(f"scale {scale:.3g}" for scale in how.scales), show_lines=True, title=title)
        for row in zip(*texts, strict=True):
            table.add_row(*(escape(before + text) for text in row))
        console.print(table)

    def obey(self, line: str) -> None:
        """Do what a line that starts with / asks for.

        Raises:
            InputError: another word, or values that cannot be.
            EOFError: /quit.
        """
        word, *values = line[1:].split() or [""]
        if word == "help":
            console.print(HELP, markup=False)
            return
        if word == "quit":
            raise EOFError
        if word not in CHANGES:
            raise unknown("command", f"/{word}", [f"/{known}" for known in (*CHANGES, "help", "quit")])
        setting, read, example = CHANGES[word]
        try:
            value = read(values)
        except (ValueError, IndexError) as error:
            raise InputError(f"{line}: expected it as in /{word} {example}") from error
        changed: dict[str, Any] = {setting: value}
        self.how = replace(self.how, **changed)


def _scales(values: Sequence[str]) -> tuple[float, ...]:
    if not values:
        raise ValueError("no scale")
    return tuple(float(value) for value in values)


def _format(values: Sequence[str]) -> str:
    return ("plain", "chat")[("plain", "chat").index(values[0])]


def _whole(values: Sequence[str]) -> int:
    return int(values[0])


CHANGES: dict[str, tuple[str, Callable[[Sequence[str]], object], str]] = {
    "scale": ("scales", _scales, "40 80"),
    "samples": ("samples", _whole, "3"),
    "seed": ("seed", _whole, "1"),
    "tokens": ("new_tokens", _whole, "30"),
    "format": ("prompt_format", _format, "chat"),
}
"""What a line may change by its first word: the setting of `How`, how its value is read, and an example."""


def _own_scales(run: Run, vector: SteeringVector, force: bool) -> tuple[float, ...]:
    """The scale of the vector's file, those that it recommends, or else the one that calibration gives; said on stderr."""
    if "scale" in vector.provenance:
        errors.print(f"scale {vector.provenance['scale']:.3g}, as the file has it", markup=False)
        return (float(vector.provenance["scale"]),)
    found = vector.provenance.get("scales") or {}
    recommended = tuple(float(found[end]) for end in ("low", "high") if found.get(end) is not None)
    if recommended:
        return recommended
    from saets.checks import check_vector

    check_vector(run.experiment, vector, force=force)
    calibration = run.calibrate(vector)
    if calibration.outcome == "not_finite":
        raise InputError(f"the model's loss is not finite at scale {calibration.failed_at:g}; give --scale")
    capped = ", the end of effects.scale_grid, which does not reach the target" if calibration.outcome == "capped" else ""
    errors.print(f"scale {calibration.scale:.3g} by the experiment's calibration{capped}", markup=False)
    return (calibration.scale,)


def _converse(talk: Talk) -> None:
    """Take lines until there are no more; what is wrong with one is said, and the next is read."""
    typed = sys.stdin.isatty()
    if typed:
        console.print(HELP, markup=False)
    for line in _lines(typed):
        try:
            if line.startswith("/"):
                talk.obey(line)
            else:
                talk.take(line)
        except InputError as error:
            if not typed:
                raise
            errors.print(f"saets: {error}", markup=False)
        except KeyboardInterrupt:
            if not typed:
                raise
            errors.print("stopped", markup=False)
        except EOFError:
            return


def _lines(typed: bool) -> Iterator[str]:
    """Lines of stdin, in a terminal after an invitation and with what its line editor can do."""
    if not typed:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - input() then has history and cursor keys

    while True:
        try:
            yield input(INVITATION)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
