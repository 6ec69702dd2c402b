"""`saets plan`: what a run will take, before anything is spent."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from saets.commands.common import Commands, add_command, console, experiment_of

if TYPE_CHECKING:
    from saets.planning.plan import Plan

TITLES = {
    "effects": "measuring effects",
    "fit": "fitting",
    "vectors": "building vectors",
    "texts": "writing texts",
    "grading": "grading",
    "figures": "measuring texts",
    "results": "results and plots",
}


def add(commands: Commands) -> None:
    """Put the command into the parser."""
    plan = add_command(commands, "plan", _plan, "say what a run will take, before anything is spent")
    plan.add_argument("--measure", action="store_true", help="plan for `saets run --measure`")
    plan.add_argument("--nodes", type=int, metavar="N", help="plan for so many machines; by default this one")
    plan.add_argument("--gpus-per-node", type=int, metavar="G", help="with so many GPUs each; by default one")
    plan.add_argument("--gpu", metavar="KIND", help="of this kind, e.g. h100; a word that is none lists all")
    plan.add_argument("--json", action="store_true", help="print every figure as one JSON object")


def _plan(options: argparse.Namespace) -> None:
    from saets.planning.plan import make_plan
    from saets.stages.session import Session

    experiment, out = experiment_of(options)
    session = Session.looking(experiment, out, measure=options.measure)
    plan = make_plan(session, nodes=options.nodes, gpus_per_node=options.gpus_per_node, gpu=options.gpu)
    if options.json:
        console.print(json.dumps(plan.to_json()), markup=False)
        return
    show_plan(plan)


def show_plan(plan: Plan) -> None:
    """Print a plan to read."""
    model, sae = plan.model, plan.sae
    console.print(
        f"{plan.experiment.name}: {short(model.weights)} weights in {model.n_blocks} blocks, d_model {model.d_model:,}, an SAE "
        f"of {sae.d_sae:,} features; {model.origin}",
        markup=False,
    )
    for line in (*_machine(plan), "") if plan.seconds else ():
        console.print(line, markup=False)
    if not plan.seconds:
        console.print("nothing is left to do", markup=False)
        return
    console.print(_work(plan))
    console.print(f"\nin all {duration(plan.total_seconds())}{_certainty(plan)}", markup=False)
    for line in (*_judge(plan), *_bytes(plan), *(f"note: {note}" for note in plan.notes)):
        console.print(line, markup=False)


def _machine(plan: Plan) -> list[str]:
    layout, there = plan.layout, plan.layout.hardware
    kind = there.machine
    devices = f"{there.devices} x {kind.name}" if kind.is_gpu else f"{there.devices} CPU cores"
    where = f"{there.nodes} node{'s' if there.nodes > 1 else ''} with {devices}{'' if there.given else ', this machine'}"
    memory = layout.memory
    held = f"{size(memory.weights)} weights, {size(memory.sae)} SAE, {size(memory.rows)} for {layout.rows:,} rows together"
    of = f" of {size(memory.device)}" if memory.device else ""
    dtype = str(layout.dtype).removeprefix("torch.")
    lines = [
        f"on {where}: {layout.actors} actor{'s' if layout.actors > 1 else ''}, {layout.actors_per_device:g} a "
        f"{'GPU' if kind.is_gpu else 'core'}, in {dtype}",
        f"an actor's memory: {size(memory.total())}{of}: {held}",
    ]
    if layout.settings:
        lines.append(f"settings for it: {' '.join(f'--set {setting}' for setting in layout.settings)}")
    return lines


def _work(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "work", "tokens", "x blocks", "FLOP", "time"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("stage", "work") else "right")
    for stage, seconds in plan.seconds.items():
        parts = [part for part in plan.parts if part.stage == stage]
        title, time = TITLES[stage], duration(seconds)
        for part in parts:
            figures = (short(part.tokens), short(part.token_blocks), short(part.flops))
            table.add_row(title, f"{part.items:,} {escape(part.what)}", *figures, time)
            title = time = ""
        if not parts:
            table.add_row(title, escape(_other_work(plan, stage)), "", "", "", time)
    return table


def _other_work(plan: Plan, stage: str) -> str:
    return {
        "fit": f"{plan.left.rows:,} rows, {plan.experiment.fit.solver}",
        "grading": f"{plan.judge.calls:,} calls",
    }.get(stage, "")


def _judge(plan: Plan) -> list[str]:
    from saets.judge.cost import dollars

    judge = plan.judge
    if not judge.calls:
        return []
    usd = "no price is known of this model at this server" if judge.usd is None else f"about {dollars(judge.usd)}"
    tokens = f"{judge.tokens.read:,} tokens read and {judge.tokens.written:,} written"
    return [f"judge: {judge.calls:,} calls of {plan.experiment.judge.model}, {tokens}, {usd}"]


def _bytes(plan: Plan) -> list[str]:
    found = (("disk", plan.disk), ("network", plan.network))
    return [
        f"{name}: {size(sum(one.size for one in each))} ({', '.join(f'{one.what} {size(one.size)}' for one in each)})"
        for name, each in found
        if each
    ]


def _certainty(plan: Plan) -> str:
    machine = plan.layout.hardware.machine
    if machine.is_gpu:
        return f". An estimate, good to a factor of two or three: {machine.origin}"
    return f". An estimate: {machine.origin}"


def size(count: int | float) -> str:
    """Bytes to read.

    >>> size(1.25e9), size(900)
    ('1.25 GB', '1 kB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{max(1, round(count / 1e3))} kB"


def short(count: int | float) -> str:
    """A large number to read.

    >>> short(44_800_000), short(950), short(6.5e18)
    ('44.8 M', '950', '6.5 E')
    """
    for unit, name in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def duration(seconds: int | float) -> str:
    """A time to read.

    >>> duration(4), duration(600), duration(9000), duration(400_000)
    ('4 s', '10 min', '2.5 h', '4.6 days')
    """
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{max(1.0, seconds):.0f} s"
