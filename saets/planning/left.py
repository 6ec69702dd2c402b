"""What a run folder still lacks of its experiment. Vectors are known by source and number, since their directions are weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from saets.checks import check_goals
from saets.errors import InputError
from saets.experiment.config import DecoderRows, Experiment, MixedRows, NamedSource, RandomVectors, TargetedVectors, VectorFile
from saets.experiment.goal import Goal
from saets.experiment.loading import load_experiment
from saets.methods import formulas as methods
from saets.planning.sizes import sae_size
from saets.records import Generation
from saets.run_folder.store import Table
from saets.stages.evaluate import begun_texts
from saets.stages.fit import is_fitted
from saets.stages.pull import stands_in
from saets.stages.session import Session
from saets.stages.vectors import Pair, kept_vectors

AMOUNTS = {"start", "stop", "rows", "count", "features"}
"""Settings of a source that say which of its vectors are measured, and change none of them."""


@dataclass(frozen=True)
class Left:
    """What is still to be done, and what is done."""

    goals: tuple[Goal, ...]
    published: bool
    """Published files stand in for measuring and fitting."""
    fetched: bool
    """And are in the run folder."""
    vectors: int
    """To measure."""
    vectors_known: int
    """Of the same sources, measured before or shipped."""
    blocks: int
    """Of the baseline, to measure."""
    rows: int
    """That a fit reads: measured, to be measured, and shipped but for those that are sums."""
    fits: bool
    """Whether there is something to fit."""
    pairs: tuple[Pair, ...]
    """Goals and methods whose vectors are to be built."""
    texts: Counter[tuple[str, str]]
    """To write, by goal and prompt."""
    texts_known: int
    ungraded: tuple[Generation, ...]
    """Texts that are there and have no grades."""
    unmeasured: int
    """Texts, there or not, without the figures that need no judge."""
    unread: int
    """Of these, those that no local judge measures when it grades them."""


def what_is_left(session: Session, d_model: int) -> Left:
    """What `saets run` would do in this run folder, in its present state.

    Raises:
        InputError: whatever can be found wrong with goals, sources and published or shipped files without reading weights.
    """
    experiment, run = session.experiment, session.run
    goals = tuple(check_goals(experiment))
    published = stands_in(session)
    fetched = published and run.approximator.is_file()
    vectors, known, rows, blocks = (0, 0, 0, 0) if published else _effects(session, d_model)
    fits = not published and (vectors > 0 or not is_fitted(session))
    current = fetched if published else not fits and not vectors
    kept = {pair: vector for pair, vector in kept_vectors(session).items() if current or not _fitted(pair)}
    pairs = tuple((goal.id, method) for goal in goals for method in experiment.steering.methods if (goal.id, method) not in kept)
    have, ungraded = begun_texts(session, kept)
    texts = _all_texts(experiment, goals)
    total = texts.total()
    texts.subtract((text.goal, text.prompt) for text in have)
    bare = {text.generation_id for text in have} - run.measures.ids()
    to_come = total - len(have)
    local = experiment.judge.kind == "local"
    unread = len(bare - {text.generation_id for text in ungraded}) if local else len(bare) + to_come
    return Left(
        goals,
        published,
        fetched,
        vectors,
        known,
        blocks,
        rows,
        fits,
        pairs,
        +texts,
        len(have),
        tuple(ungraded),
        unmeasured=len(bare) + to_come,
        unread=unread,
    )


def _fitted(pair: Pair) -> bool:
    """Whether the vector is made from an approximator."""
    return methods.needs(pair[1], "approximator")


def _all_texts(experiment: Experiment, goals: Iterable[Goal]) -> Counter[tuple[str, str]]:
    """How many completions each goal and prompt have: those of `stages.evaluate.generation_items`, without naming each."""
    settings, found = experiment.evaluation, Counter[tuple[str, str]]()
    points = len(experiment.steering.methods) * sum(scale > 0 for scale in settings.scales) + (0 in settings.scales)
    for goal in goals:
        for prompt in settings.prompts:
            found[goal.id, prompt] += points * settings.samples
    return found


def _effects(session: Session, d_model: int) -> tuple[int, int, int, int]:
    """Vectors to measure, vectors of the sources known, rows that a fit reads, baseline blocks to measure."""
    experiment, run, shipped = session.experiment, session.run, session.shipped()
    settled, summed, kept = set[tuple[str, int]](), set[str](), set[str]()
    if (run.path / "experiment.toml").is_file():
        before = {source.label(): _kind(source) for source in load_experiment(run.path).effects.sources}
        same = {source.label() for source in experiment.effects.sources if before.get(source.label()) == _kind(source)}
        for table in (run.effects, run.waiting, run.failures):
            found, ids = _numbered(table)
            settled |= {one for one in found if one[0] in same}
            kept |= set() if table is run.failures else ids
    if shipped is not None:
        for table in (shipped.effects, shipped.summed):
            found, ids = _numbered(table)
            settled |= found
            summed |= ids if table is shipped.summed else set()
            kept |= ids
    sources = experiment.effects.sources
    wanted = {(source.label(), number) for source in sources for number in _numbers(source, experiment, d_model)}
    blocks = len(run.baseline.ids()) or (len(shipped.baseline.ids()) if shipped else 0)
    left = len(wanted - settled)
    missing = max(0, experiment.effects.baseline_blocks - blocks) if left else 0
    return left, len(wanted) - left, left + len(kept - summed), missing


def _numbered(table: Table) -> tuple[set[tuple[str, int]], set[str]]:
    """Source and number of the rows of a table, and their ids."""
    frame = table.read(["vector_id", "source", "index"])
    if frame is None:
        return set(), set()
    return set(frame.select("source", "index").drop_nulls().iter_rows()), set(frame["vector_id"])


def _kind(source: NamedSource) -> dict[str, Any]:
    """What a number of this source means."""
    return source.model_dump(exclude=AMOUNTS)


def _numbers(source: NamedSource, experiment: Experiment, d_model: int) -> Iterable[int]:
    """The numbers of a source's vectors, as `effects.sources.vector_items` gives them."""
    if isinstance(source, DecoderRows):
        width = sae_size(source.sae or experiment.sae, d_model).d_sae
        rows = source.rows if source.rows is not None else range(source.start, width if source.stop is None else source.stop)
        if not rows or min(rows) < 0 or max(rows) >= width:
            got = f"row {max(rows)}" if rows else f"no rows ({source.start} to {source.stop})"
            raise InputError(f"effects.sources asks for {got}; the SAE has rows 0 to {width - 1}")
        return rows
    if isinstance(source, RandomVectors | MixedRows):
        return range(source.count)
    if isinstance(source, TargetedVectors):
        return source.features
    assert isinstance(source, VectorFile)
    return range(_vectors_in(source.path))


def _vectors_in(path: str) -> int:
    """Vectors of a safetensors file, by its header."""
    if not Path(path).is_file():
        raise InputError(f"effects.sources names {path}, which is no file; expected a safetensors file of vectors")
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error
    return sum(1 if len(shape) == 1 else shape[0] for shape in shapes)
