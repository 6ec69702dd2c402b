"""Stage 2 as a Ray Train job: each worker takes a share of the rows, and all solve together, by moments or by Adam.

Rows are read from their shards once. Those held out wait on disk until the fit is scored; others no worker keeps, except Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from saets.distributed import shards
from saets.distributed.adam import TrainingRows, descend
from saets.distributed.cluster import Cluster, input_error
from saets.distributed.together import agreeing, of_all_workers, sum_over_workers
from saets.errors import InputError
from saets.experiment.config import Fit
from saets.files.storage import Location
from saets.fit.approximator import EffectApproximator, Moments, RidgePath, choose_penalty, finite_rows, ridge
from saets.fit.held_out import HeldOutScores, is_held_out
from saets.fit.spool import Spool
from saets.run_folder.measured import MeasuredRows

BATCH_ROWS = 2048
"""Rows a worker takes at once, unless their effects would be larger than `BATCH_BYTES`."""

BATCH_BYTES = 64 * 2**20
"""2,048 rows of 16,384 features, or 256 of 131,072, in float16."""

SCORED_AT_ONCE = 1 / 8
"""Of a batch, since scoring makes several copies in float32."""

JOB = "job"
"""Name of the folder in `state`."""

NAMED = 3
"""Bad rows that an error names."""


class FitResult(NamedTuple):
    """The fitted map and what is known of it."""

    approximator: EffectApproximator
    report: dict[str, Any]
    """Rows, what the solver did, and held-out figures of the fit to the training rows alone."""


class Outcome(NamedTuple):
    """What the first worker comes to."""

    M: np.ndarray
    b: np.ndarray
    feature_r2: np.ndarray
    report: dict[str, Any]


Loop = Callable[[dict[str, Any]], Outcome | str | None]
"""What a worker does: the first one's outcome, or the message of an `InputError`, which no other try would mend."""


def fit(
    rows: MeasuredRows,
    settings: Fit,
    cluster: Cluster,
    state: Location,
    *,
    seed: int,
    gpus: float = 0.0,
    summed: Moments | None = None,
    loop: Loop | None = None,
) -> FitResult:
    """Fit the rows, which each worker streams from their shards; memory does not grow with their number, except Adam's.

    `summed` are the moments of more rows, on the CPU, all of them to fit and none held out; the first worker adds them.

    A row is held out by a hash of the seed and its vector_id, so the split does not depend on order, shards or workers. Ridge
    uses the penalty of least held-out error on all rows together; Adam fits the training rows. A worker that dies is replaced,
    up to `max_failures` times: ridge begins again, Adam goes on after its last epoch. Workers other than the driver's own
    process keep Adam's checkpoints in the folder `state`, which is empty afterwards.

    Raises:
        InputError: moments that Adam cannot use or of another shape, too few rows, numbers that are not finite, a shard that
            cannot be read, or a `state` that the node of a worker with checkpoints to keep does not see. All end the job at once.
    """
    if summed is not None:
        _check_summed(summed, rows, settings)
    cluster.connect()
    state.delete_folder()  # what a driver left that was killed; Ray Train would go on from there
    filesystem, path = state.for_pyarrow
    sizes = {"rows": len(rows), "d_model": rows.d_model, "d_sae": rows.d_sae}
    work: Any = loop or train  # Ray's type knows no loop that returns something
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "settings": settings.model_dump_json(),
            "seed": seed,
            "state": state,
            "summed": None if summed is None else ray.put([tensor.numpy() for tensor in summed.tensors()]),
            **sizes,
        },
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 0.5, **({"GPU": gpus} if gpus else {})} if settings.workers else None,
        ),
        datasets={"rows": shards.dataset(rows, settings.workers)},
        dataset_config=EveryRow(),
        run_config=ray.train.RunConfig(
            storage_path=path,
            storage_filesystem=filesystem,
            name=JOB,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        result: Any = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise input_error(error) or error from error
    finally:
        state.delete_folder()
    outcome: Outcome | str = result.return_value
    if isinstance(outcome, str):
        raise InputError(outcome)
    M, b, feature_r2 = (torch.tensor(array) for array in (outcome.M, outcome.b, outcome.feature_r2))  # Ray's memory is read-only
    return FitResult(EffectApproximator(M, b, feature_r2=feature_r2), outcome.report)


def _check_summed(summed: Moments, rows: MeasuredRows, settings: Fit) -> None:
    """Raise `InputError` where sums cannot stand for the rows that they are made of."""
    reason = None
    if settings.solver == "adam":
        reason = "fit.solver = 'adam' needs every row, and some that come with the experiment are sums"
    elif settings.capped_weight != 1:
        reason = f"fit.capped_weight is {settings.capped_weight:g}, and in the sums that come with the experiment it is 1"
    elif summed.xy.shape != (rows.d_model, rows.d_sae):
        come, measured = tuple(summed.xy.shape), (rows.d_model, rows.d_sae)
        reason = f"the sums that come with the experiment are of d_model and d_sae {come}, the measured effects of {measured}"
    if reason:
        raise InputError(f"{reason}; change that, or give --measure to fit only effects measured in this run")


class EveryRow(ray.train.DataConfig):
    """Shares the rows out and leaves none over; Ray's own way drops what does not divide evenly."""

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """One iterator a worker and dataset."""
        shards = {name: dataset.streaming_split(world_size, equal=False) for name, dataset in datasets.items()}
        return [{name: splits[rank] for name, splits in shards.items()} for rank in range(world_size)]


class Share:
    """What one worker keeps of its rows: sums of those to fit, or with Adam the rows; those held out, on disk."""

    def __init__(self, config: dict[str, Any], device: torch.device, held_out: Spool) -> None:
        self.settings, self.seed, self.device = Fit.model_validate_json(config["settings"]), config["seed"], device
        self.d_model, self.d_sae = config["d_model"], config["d_sae"]
        self.rows, self.weight, self.capped = (torch.zeros(n, dtype=torch.float64, device=device) for n in (2, 2, 1))
        self.effects = torch.zeros(2, self.d_sae, dtype=torch.float64, device=device)
        by_ridge = self.settings.solver == "ridge"
        self.moments = [Moments(self.d_model, self.d_sae, device) for _ in range(2)] if by_ridge else []
        self.training: list[TrainingRows] = []
        self.bad: list[str] = []
        self._held_out = held_out
        self._batch_rows = max(min(BATCH_ROWS, BATCH_BYTES // (2 * self.d_sae)), 1)

    def include(self, summed: Sequence[np.ndarray]) -> None:
        """Take rows to fit that are given as `Moments.tensors`."""
        for sums, more in zip(self.moments[0].tensors(), summed, strict=True):
            sums += torch.tensor(more, device=self.device)
        self.rows[0] += self.moments[0].rows[0]
        self.weight[0] += self.moments[0].n[0]

    def read(self) -> None:
        """Take this worker's rows from the Dataset.

        Raises:
            InputError: a shard that cannot be read, or no room on disk for the rows held out.
        """
        rows = ray.train.get_dataset_shard("rows")
        try:
            for batch in rows.iter_batches(batch_size=self._batch_rows, batch_format="numpy"):
                self._take(batch)
        except ray.exceptions.RayError as error:
            raise input_error(error) or error from error

    def _take(self, batch: dict[str, Any]) -> None:
        """Where rows hold NaN or infinity they are noted, and others no more than counted: the job ends after the last."""
        ids, capped = np.array(batch["vector_id"]), np.array(batch["calibration"]) == "capped"
        weights = np.where(capped, self.settings.capped_weight, 1.0)
        held_out = is_held_out(list(ids), self.seed, self.settings.held_out)
        self.capped += int(capped.sum())
        for i, part in enumerate((~held_out, held_out)):
            chosen = part & (weights > 0)
            columns = (batch["vector"], batch["effect"], batch["standard_error"], weights)
            rows = _Rows(*(column[chosen] for column in columns))
            self.rows[i] += len(rows.weights)
            self.weight[i] += rows.weights.sum()
            self.bad += list(ids[chosen][~rows.finite])
            if self.bad:
                continue
            if i:
                self._held_out.add(*rows)
                continue
            x, y, _, w = rows.on(self.device)
            self._sum(i, x, y, w)
            if not self.moments:
                self.training.append(TrainingRows(list(ids[chosen]), x, y, w))

    def _sum(self, i: int, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> None:
        if self.moments:
            self.moments[i].add(x, y, w)
        else:
            self.effects[i] += w.float() @ y.float()

    def complete(self) -> None:
        """Add up the rows held out, and make all sums those of all workers.

        Raises:
            InputError: NaN or infinity in the rows, or too few; in all workers alike.
        """
        bad = sorted(of_all_workers(self.bad))
        sum_over_workers([self.rows, self.weight, self.capped])
        train, held_out = (int(rows) for rows in self.rows.tolist())
        if bad:
            named = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
            raise InputError(
                f"{len(bad)} of {train + held_out} measured effects hold NaN or infinity ({named}); measure those vectors again, "
                "into a new --out folder"
            )
        if train < 2 or held_out < 1:
            raise InputError(self._too_few(train, held_out))
        for x, y, _, w in self._rows_held_out(self._batch_rows):
            self._sum(1, x, y, w)
        sum_over_workers([self.effects, *(t for m in self.moments for t in m.tensors())])

    def _too_few(self, train: int, held_out: int) -> str:
        capped = int(self.capped.item())
        left_out = (
            f"; fit.capped_weight = 0 leaves out {capped} capped ones" if capped and not self.settings.capped_weight else ""
        )
        return (
            f"{train} rows to fit and {held_out} held out, of which at least 2 and 1 are needed{left_out}; measure more vectors "
            f"or raise fit.held_out. The ridge penalty makes up for fewer rows than the {self.d_model} dimensions of a vector, "
            "but it is chosen on held-out rows"
        )

    def _rows_held_out(self, at_once: int) -> Iterator[list[torch.Tensor]]:
        for columns in self._held_out.batches(at_once):
            yield _Rows(*columns).on(self.device)

    def score(self, approximator: EffectApproximator) -> HeldOutScores:
        """How a fit to the training rows predicts those held out, by all workers together."""
        sums = torch.stack([moments.y for moments in self.moments]) if self.moments else self.effects
        scores = HeldOutScores(*(sums / self.weight[:, None]))
        for x, y, errors, w in self._rows_held_out(max(int(SCORED_AT_ONCE * self._batch_rows), 1)):
            scores.add(approximator, x.float(), y.float(), errors, w)
        sum_over_workers(scores.tensors())
        return scores


class _Rows(NamedTuple):
    """Columns of some rows."""

    vectors: np.ndarray
    effects: np.ndarray
    """[rows, d_sae], as they are stored."""
    errors: np.ndarray
    weights: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Which rows hold neither NaN nor infinity."""
        return finite_rows(torch.from_numpy(self.vectors), torch.from_numpy(self.effects)).numpy()

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """The columns as tensors on a device."""
        return [torch.from_numpy(column).to(device) for column in self]


class Solution(NamedTuple):
    """What a solver makes of the rows."""

    final: EffectApproximator
    scores: HeldOutScores
    """Of the fit to the training rows alone."""
    report: dict[str, Any]
    """Of the solver."""


def train(config: dict[str, Any]) -> Outcome | str | None:
    """One worker: goes through its share of the rows, and solves and scores together with the others."""
    settings, rank = Fit.model_validate_json(config["settings"]), ray.train.get_context().get_world_rank()
    on_gpu = torch.cuda.is_available() and settings.workers
    device = ray.train.torch.get_device() if on_gpu else torch.device("cpu")
    some = 1.0 if config["summed"] is not None else settings.held_out  # with sums, rows that come beside them are held out
    with Spool(int(some * config["rows"])) as held_out:
        share = Share(config, device, held_out)
        if config["summed"] is not None and not rank:
            share.include(ray.get(config["summed"]))
        try:
            with agreeing():
                if settings.solver == "adam" and settings.workers:
                    _check_storage(config["state"])
                share.read()
            share.complete()
            solution = _ridge(share) if settings.solver == "ridge" else _adam(share)
        except InputError as error:
            return str(error)
    report = {
        "solver": settings.solver,
        "rows_train": int(share.rows[0].item()),
        "rows_held_out": int(share.rows[1].item()),
        "rows_capped": int(share.capped.item()),
        "capped_weight": settings.capped_weight,
        "workers": settings.workers,
        **solution.report,
        "held_out": solution.scores.report(),
    }
    if settings.solver == "ridge":
        ray.train.report({"held_out_r2": report["held_out"]["r2"]})
    if rank:
        return None
    M, b, feature_r2 = solution.final.M, solution.final.b, solution.scores.feature_r2().float()
    return Outcome(M.cpu().numpy(), b.cpu().numpy(), feature_r2.cpu().numpy(), report)


def _check_storage(state: Location) -> None:
    """Raise `InputError` where this node does not see what the driver's node wrote."""
    if not (state / JOB).is_folder():
        raise InputError(
            f"a worker's node does not see {state}, where Adam's checkpoints are kept; give --out a folder that all nodes share "
            "or a URI such as s3://bucket/folder, or take fit.solver = ridge, which keeps none, or fit.workers = 0"
        )


def _ridge(share: Share) -> Solution:
    """The exact solution from moments; the penalty of least held-out error is used on all rows together."""
    train, held_out = share.moments
    penalty, errors = choose_penalty(RidgePath(train), held_out, share.settings.penalties)
    scores = share.score(ridge(train, penalty))
    train += held_out
    return Solution(ridge(train, penalty), scores, {"penalty": penalty, "held_out_mse_by_penalty": errors})


def _adam(share: Share) -> Solution:
    """The paper's way; the held-out rows are never fitted, as there."""
    settings = share.settings
    found = descend(share.training, settings, share.seed, share.d_model, share.d_sae, share.device)
    of_adam = {name: getattr(settings, name) for name in ("learning_rate", "batch_size", "epochs")}
    report = {**of_adam, "mse_by_epoch": found.mse_by_epoch, "resumed_at_epoch": found.resumed_at_epoch}
    return Solution(found.approximator, share.score(found.approximator), report)
