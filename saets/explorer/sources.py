"""What there is to show of a run: measured effects, an approximator, the SAE's decoder, cards; and why something is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
from torch import Tensor
from torch.nn.functional import normalize

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import effect_settings
from saets.features.known_effects import KnownEffects
from saets.features.labels import packaged_cards
from saets.records import unit, vector_id
from saets.run_folder.fitted import Fitted, fitted
from saets.run_folder.measured import MeasuredRows
from saets.run_folder.shipped import shipped_effects
from saets.run_folder.store import RunFolder, differing_keys
from saets.sae import load_sae
from saets.shapes import Float
from saets.vector.vector import SteeringVector

HERE, PUBLISHED, SHIPPED, SUMMED, PREDICTED = "measured here", "published", "shipped", "shipped as sums", "not measured"
"""Where a vector's effects come from."""


@dataclass(frozen=True)
class Sources:
    """What there is; None where something is not, and `missing` says why."""

    experiment: Experiment
    run: RunFolder
    rows: MeasuredRows | None
    """Vectors whose effects on all features are known."""
    folders: Mapping[str, str]
    """Where these come from, by the folder of their shards."""
    links: pl.DataFrame | None
    """Of shipped vectors that are kept as sums, the strongest causes and effects of each feature."""
    summed: pl.DataFrame | None
    """What is known of those vectors besides."""
    fit: Fitted | None
    decoder: Float[Tensor, "d_sae d_model"] | None
    """The SAE's W_dec."""
    cards: pl.DataFrame | None
    """Density, contexts and top tokens of each feature."""
    vectors: Mapping[tuple[str, str], SteeringVector]
    """The run's vectors, by goal and method."""
    d_sae: int
    missing: Mapping[str, str]
    """Reasons, by the name of what is not there."""

    @classmethod
    def of(cls, experiment: Experiment, run: RunFolder) -> Sources:
        """Whatever belongs to the experiment; nothing is written, and no language model is read.

        Raises:
            InputError: neither effects nor an approximator (names the stages), or parts that do not belong together.
        """
        run.path.check()
        missing: dict[str, str] = {}
        _check_settings(experiment, run)
        shipped = _shipped(experiment, run, missing)
        tables = {HERE: run.effects, PUBLISHED: run.published_effects, **({SHIPPED: shipped.effects} if shipped else {})}
        there = {where: table for where, table in tables.items() if table.shards()}
        rows = MeasuredRows.of(list(there.values())) if there else None
        try:
            fit = fitted(run, experiment)
        except InputError as error:
            fit = None
            missing["predictions"] = str(error)
        if rows is None:
            missing["measured effects"] = f"no effects at {run.path}; `saets effects` measures them"
            if fit is None:
                raise InputError(
                    f"nothing to explore at {run.path}: no measured effects and no approximator; run `saets effects` and "
                    "`saets fit` first, or `saets pull` where the experiment names published files"
                )
        shapes = {(rows.d_model, rows.d_sae)} if rows else set()
        shapes |= {(fit.approximator.M.shape[0], fit.approximator.M.shape[1])} if fit else set()
        decoder = _decoder(experiment, min(shapes)[0], missing)
        shapes |= {(decoder.shape[1], decoder.shape[0])} if decoder is not None else set()
        if len(shapes) > 1:
            found = ", ".join(f"d_model {d_model} and {d_sae} features" for d_model, d_sae in sorted(shapes))
            raise InputError(f"effects, approximator and SAE do not belong together: {found}; fit again, or name their own SAE")
        links = KnownEffects.of(experiment, run).links if shipped and decoder is not None else None
        path = packaged_cards(experiment.sae)
        if path is None:
            missing["cards"] = "this SAE comes without contexts, densities and top tokens"
        return cls(
            experiment,
            run,
            rows,
            {str(table.folder): where for where, table in there.items()},
            links,
            shipped.summed.read() if shipped and links is not None else None,
            fit,
            decoder,
            pl.read_parquet(path).sort("feature") if path else None,
            _run_vectors(run, min(shapes)[0]),
            min(shapes)[1],
            {name: _without_paths(reason, run) for name, reason in missing.items()},
        )

    def own_ids(self) -> dict[str, int]:
        """Features by the vector_id of their decoder row."""
        rows = [] if self.decoder is None else list(self.decoder.numpy())
        return {vector_id(unit(row)): feature for feature, row in enumerate(rows) if row.any()}

    def targets(self, features: slice) -> Float[Tensor, "features d_model"]:
        """SAE-TS for each of these features alone, of any length; NaN where no measured vector changes the feature."""
        assert self.fit is not None
        M, b = self.fit.approximator.M, self.fit.approximator.b
        towards = M[:, features].T
        made = normalize(towards, dim=-1) - self.experiment.steering.bias_weight * normalize(M @ b, dim=0)
        return made.masked_fill(~towards.any(1, keepdim=True), float("nan"))


def _without_paths(reason: str, run: RunFolder) -> str:
    """The reason as a page may say it that travels: of paths the last part."""
    return re.sub(r"(?<!\S)/\S*/", "", reason.replace(str(run.path), "the run folder"))


def _check_settings(experiment: Experiment, run: RunFolder) -> None:
    measured = run.manifest().get("effects", {}).get("settings")
    different = differing_keys(measured, effect_settings(experiment)) if measured is not None else []
    if different:
        raise InputError(f"{run.path} holds effects by other settings ({'; '.join(different)}); set them back to explore it")


def _shipped(experiment: Experiment, run: RunFolder, missing: dict[str, str]) -> RunFolder | None:
    try:
        return shipped_effects(experiment, run.manifest().get("effects", {}).get("worker"))
    except InputError as error:
        missing["shipped effects"] = str(error)
        return None


def _decoder(experiment: Experiment, d_model: int, missing: dict[str, str]) -> Tensor | None:
    """W_dec in float32; of the SAE no more is kept."""
    try:
        weights: Tensor = load_sae(experiment.sae, d_model).W_dec
    except InputError as error:
        missing["decoder"] = str(error)
        return None
    return weights.float().clone()


def _run_vectors(run: RunFolder, d_model: int) -> dict[tuple[str, str], SteeringVector]:
    folder = run.path / "vectors"
    found = {}
    for name in folder.entries():
        goal, _, method = name.removesuffix(".safetensors").rpartition("--")
        if name.endswith(".safetensors") and goal:
            vector = SteeringVector.load(folder / name)
            if vector.direction.numel() == d_model:
                found[goal, method] = vector
    return found
