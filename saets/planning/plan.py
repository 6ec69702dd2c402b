"""A run's plan: what is left of it, how much work that is, what it takes on which machine. Nothing is run, loaded or written."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from saets.checks import check_place
from saets.effects.worker import rollouts_per_vector
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import Goal
from saets.judge.choice import check_judge
from saets.judge.client import open_client
from saets.judge.cost import Estimate, Tokens
from saets.judge.openai import OpenAIJudge
from saets.planning.layout import Layout, hardware, lay_out
from saets.planning.left import Left, what_is_left
from saets.planning.machines import rate, start_seconds
from saets.planning.sizes import ModelSize, PromptSizes, SaeSize, model_size, sae_size
from saets.planning.storage import Bytes, disk, network
from saets.planning.workload import Part, Sizes, reference_cost, workload
from saets.records import Generation, GenerationItem
from saets.stages.evaluate import expected_text
from saets.stages.session import Session

STAGES = ("effects", "fit", "vectors", "texts", "grading", "figures", "results")
"""In the order in which a run takes them; texts and grading go on at once."""


class Plan(NamedTuple):
    """What a run takes."""

    experiment: Experiment
    left: Left
    model: ModelSize
    sae: SaeSize
    layout: Layout
    parts: tuple[Part, ...]
    seconds: dict[str, float]
    """By stage."""
    judge: Estimate
    """Calls of a server."""
    disk: tuple[Bytes, ...]
    network: tuple[Bytes, ...]
    notes: tuple[str, ...]

    def total_seconds(self) -> float:
        """Of the whole run: texts are graded by a server while others are written."""
        waits = self.experiment.judge.kind == "openai"
        overlap = min(self.seconds.get("texts", 0.0), self.seconds.get("grading", 0.0)) if waits else 0.0
        return sum(self.seconds.values()) - overlap

    def to_json(self) -> dict[str, Any]:
        """Every figure, as JSON has them."""
        left, layout, there = self.left, self.layout, self.layout.hardware
        return {
            "experiment": self.experiment.name,
            "model": {name: value for name, value in self.model._asdict().items() if name != "config"},
            "sae": self.sae._asdict(),
            "left": {
                "vectors": left.vectors,
                "vectors_known": left.vectors_known,
                "baseline_blocks": left.blocks,
                "rollouts": (left.vectors + left.blocks) * rollouts_per_vector(self.experiment.effects),
                "rows_to_fit": left.rows if left.fits else 0,
                "vectors_to_build": len(left.pairs),
                "texts": left.texts.total(),
                "texts_known": left.texts_known,
                "ungraded": len(left.ungraded),
                "published": left.published,
            },
            "work": [
                {**part._asdict(), "job": part.job._asdict(), "device_seconds": _device_seconds(part, layout, self.model.d_model)}
                for part in self.parts
            ],
            "machine": {
                "kind": there.machine.kind,
                "name": there.machine.name,
                "nodes": there.nodes,
                "devices_per_node": there.devices,
                "measured": there.machine.measured,
                "origin": there.machine.origin,
            },
            "actors": layout.actors,
            "actors_per_device": layout.actors_per_device,
            "rows": layout.rows,
            "dtype": str(layout.dtype).removeprefix("torch."),
            "memory": {**layout.memory._asdict(), "total": layout.memory.total()},
            "settings": list(layout.settings),
            "seconds": self.seconds,
            "total_seconds": self.total_seconds(),
            "judge": {"calls": self.judge.calls, **self.judge.tokens._asdict(), "usd": self.judge.usd},
            "disk": {one.what: one.size for one in self.disk},
            "network": {one.what: one.size for one in self.network},
            "notes": list(self.notes),
        }


def make_plan(session: Session, *, nodes: int | None = None, gpus_per_node: int | None = None, gpu: str | None = None) -> Plan:
    """The plan of what is left of a run, on hardware named or on this machine.

    Raises:
        InputError: unknown hardware, sizes that cannot be found, a folder with other effect settings; see `what_is_left`.
    """
    experiment = session.experiment
    there = hardware(experiment, nodes, gpus_per_node, gpu)
    model = model_size(experiment.model)
    check_place(experiment.hook_name, model.n_blocks)
    sae = sae_size(experiment.sae, model.d_model)
    left = what_is_left(session, model.d_model)
    layout = lay_out(experiment, there, model, sae)
    prompts = PromptSizes(experiment.model)
    sizes = Sizes(model, sae, prompts, layout.dtype)
    parts = tuple(workload(experiment, left, sizes, layout.rows))
    judge = judge_estimate(experiment, left)
    return Plan(
        experiment,
        left,
        model,
        sae,
        layout,
        parts,
        _seconds(experiment, left, sizes, layout, parts, judge),
        judge,
        disk(experiment, left, sizes),
        network(experiment, left, sizes, there.nodes),
        (*layout.notes, *_notes(experiment, left, prompts)),
    )


def judge_estimate(experiment: Experiment, left: Left) -> Estimate:
    """Calls to the judge's server, by the judge's own estimate.

    Texts that are there count as they are, without those whose replies are kept; of those still to be written, one a goal and
    prompt, times their number.
    """
    if experiment.judge.kind == "local":
        return Estimate(0, Tokens(0, 0), 0.0)
    judge = OpenAIJudge(experiment.judge, client=open_client(experiment.judge, asks=False))
    goals = {goal.id: goal for goal in left.goals}
    found = judge.estimate((goals[text.goal], text) for text in left.ungraded)
    for (goal, prompt), number in left.texts.items():
        one = judge.estimate([(goals[goal], _expected(experiment, goals[goal], prompt))])
        found = found.plus(one.times(float(number)))
    return found


def _expected(experiment: Experiment, goal: Goal, prompt: str) -> Generation:
    return expected_text(GenerationItem("", goal.id, "", "", 0.0, prompt, 0, 0), experiment)


def _seconds(
    experiment: Experiment, left: Left, sizes: Sizes, layout: Layout, parts: Sequence[Part], judge: Estimate
) -> dict[str, float]:
    """By stage, those with nothing to do left out. Actors start twice: to measure, and for all that comes after the fit."""
    found: dict[str, float] = {}
    for part in parts:
        found[part.stage] = found.get(part.stage, 0.0) + _part_seconds(part, layout, sizes.model.d_model)
    if "effects" in found:
        found["effects"] += start_seconds("ray") + _actor_start(layout)
    if left.fits:
        found["fit"] = _fit_seconds(experiment, left, sizes, layout)
    later = [part.stage for part in parts if part.stage not in ("effects", "fit")]
    if later:
        found[later[0]] += _actor_start(layout) + (0.0 if "effects" in found else start_seconds("ray"))
    if "grading" in found:
        own = layout.hardware.machine.seconds("decode", sizes.model.d_model, reference_cost(experiment, sizes), _dtype(layout))
        found["grading"] += own / layout.threads
    if judge.calls:
        found["grading"] = _asking_seconds(experiment, judge)
    if found:
        found["results"] = start_seconds("results")
    return {stage: found[stage] for stage in STAGES if stage in found}


def _part_seconds(part: Part, layout: Layout, d_model: int) -> float:
    """Rounds of all actors, each as long as one piece takes."""
    one = layout.hardware.machine.seconds(part.work, d_model, part.job, _dtype(layout)) / layout.threads
    return math.ceil(part.jobs / layout.actors) * one


def _device_seconds(part: Part, layout: Layout, d_model: int) -> float:
    return part.jobs * layout.hardware.machine.seconds(part.work, d_model, part.job, _dtype(layout)) / layout.threads


def _actor_start(layout: Layout) -> float:
    """Processes start side by side, but share the cores of a small machine; then each reads its weights."""
    there = layout.hardware
    together = 1.0 if there.machine.is_gpu else max(1.0, layout.actors / (there.nodes * there.devices))
    return start_seconds("actor") * together + (layout.memory.weights + layout.memory.sae) / rate("read")


def _fit_seconds(experiment: Experiment, left: Left, sizes: Sizes, layout: Layout) -> float:
    """Sums over the rows, eigenvectors, solutions; or a descent. Workers use GPUs; without any, the driver's cores do it."""
    d, n, rows, fit = sizes.sae.d_model, sizes.sae.d_sae, left.rows, experiment.fit
    exact = 2.0 * rows * d * (d + n) + 25.0 * d**3 + 4.0 * d * d * n
    operations = exact if fit.solver == "ridge" else 6.0 * fit.epochs * rows * d * n
    machine, reading = layout.hardware.machine, rows * n * getattr(torch, experiment.effects.dtype).itemsize / rate("read")
    if machine.is_gpu and fit.workers:
        computing = operations / (machine.flops["float32"] * machine.share("pass", d)) / fit.workers
        return start_seconds("train") + reading + computing
    start = start_seconds("train") if fit.workers else 0.0
    return start + reading + operations / (rate("fit") * min(os.cpu_count() or 1, fit.workers or math.inf))


def _asking_seconds(experiment: Experiment, judge: Estimate) -> float:
    """As many calls at once as the settings say, and no more a minute than they allow."""
    settings = experiment.judge
    found = [judge.calls * rate("call") / settings.concurrency]
    if settings.requests_per_minute:
        found.append(60.0 * judge.calls / settings.requests_per_minute)
    if settings.tokens_per_minute:
        found.append(60.0 * sum(judge.tokens) / settings.tokens_per_minute)
    return max(found)


def _dtype(layout: Layout) -> str:
    return str(layout.dtype).removeprefix("torch.")


def _notes(experiment: Experiment, left: Left, prompts: PromptSizes) -> list[str]:
    found = []
    if left.published and experiment.published is not None:
        where = "is in the run folder" if left.fetched else "stands in for measuring and fitting"
        found.append(
            f"the approximator published at {experiment.published.repo} {where}; --measure plans to measure "
            f"{len(experiment.effects.sources)} source(s) of vectors instead"
        )
    if left.vectors_known:
        found.append(f"{left.vectors_known:,} vectors of the sources are measured already, here or in effects that are shipped")
    if not prompts.counted:
        found.append("the tokenizer cannot be read here: tokens of prompts are estimated from their length")
    if left.texts.total() or left.ungraded:
        try:
            check_judge(experiment.judge)
        except InputError as error:
            found.append(f"the judge cannot be used as things are: {error}")
    return found
