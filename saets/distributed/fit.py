"""Stage 2 as a Ray Train job: each worker takes a share of the rows, and all solve together, by moments or by Adam."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from saets.approximator import EffectApproximator, Moments, RidgePath, choose_penalty
from saets.config import Fit
from saets.distributed.adam import TrainingRows, descend
from saets.distributed.cluster import Cluster, input_error
from saets.errors import InputError
from saets.held_out import HeldOutScores, is_held_out

BATCH_ROWS = 512


class FitResult(NamedTuple):
    """The fitted map and what is known of it."""

    approximator: EffectApproximator
    report: dict[str, Any]
    """Rows, what the solver did, and held-out figures of the fit to the training rows alone."""


def fit(tables: Iterable[pa.Table], settings: Fit, cluster: Cluster, *, seed: int, gpus: float = 0.0) -> FitResult:
    """Fit the rows of tables, which go to Ray one after the other.

    Their columns are `vector_id`, `vector`, `effect`, `standard_error` and `calibration`.

    A row is held out by a hash of the seed and its vector_id, so the split does not depend on order, shards or workers. Ridge
    uses the penalty of least held-out error on all rows together; Adam fits the training rows. A worker that dies is replaced,
    up to `max_failures` times: ridge begins again, Adam goes on after its last epoch.

    Raises:
        InputError: too few rows, or numbers that are not finite.
    """
    cluster.connect()
    refs: list[Any] = []
    widths: dict[str, int] = {}
    for table in tables:
        widths = {size: table.schema.field(name).type.shape[0] for size, name in (("d_model", "vector"), ("d_sae", "effect"))}
        refs.append(ray.put(table))
    dataset = ray.data.from_arrow_refs(refs)
    with tempfile.TemporaryDirectory(prefix="saets-fit-") as folder:
        train: Any = _train  # Ray's type knows no loop that returns something
        trainer = TorchTrainer(
            train,
            train_loop_config={"settings": settings.model_dump_json(), "seed": seed, **widths},
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 0.5, **({"GPU": gpus} if gpus else {})} if settings.workers else None,
            ),
            datasets={"train": dataset},
            dataset_config=EveryRow(),
            run_config=ray.train.RunConfig(
                storage_path=folder,
                name="fit",
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            ),
        )
        try:
            result: Any = trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise input_error(error) or error from error
    report, M, b = result.return_value
    return FitResult(EffectApproximator(torch.from_numpy(M), torch.from_numpy(b)), report)


class EveryRow(ray.train.DataConfig):
    """Shares the rows out and leaves none over; Ray's own way drops what does not divide evenly."""

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """One iterator a worker and dataset."""
        shards = {name: dataset.streaming_split(world_size, equal=False) for name, dataset in datasets.items()}
        return [{name: splits[rank] for name, splits in shards.items()} for rank in range(world_size)]


class Share:
    """What one worker keeps of its rows: sums of the training rows and of those held out, and what its solver needs."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.settings, self.seed, self.device = Fit.model_validate_json(config["settings"]), config["seed"], device
        self.d_model, self.d_sae = config["d_model"], config["d_sae"]
        self.rows, self.weight, self.capped = (torch.zeros(n, dtype=torch.float64, device=device) for n in (2, 2, 1))
        self.effects = torch.zeros(2, self.d_sae, dtype=torch.float64, device=device)
        by_ridge = self.settings.solver == "ridge"
        self.moments = [Moments(self.d_model, self.d_sae, device) for _ in range(2)] if by_ridge else []
        self.training: list[TrainingRows] = []
        self.held_out: list[tuple[torch.Tensor, ...]] = []

    def add(self, batch: dict[str, Any]) -> None:
        """Take rows."""
        vectors, effects = (torch.from_numpy(np.stack(list(batch[name]))).to(self.device) for name in ("vector", "effect"))
        capped = np.array(batch["calibration"]) == "capped"
        weights = torch.from_numpy(np.where(capped, self.settings.capped_weight, 1.0)).to(self.device)
        errors = torch.from_numpy(np.array(batch["standard_error"], np.float64)).to(self.device)
        held_out = torch.from_numpy(is_held_out(list(batch["vector_id"]), self.seed, self.settings.held_out)).to(self.device)
        self.capped += capped.sum()
        for i, part in enumerate((~held_out, held_out)):
            chosen = part & (weights > 0)
            x, y, w = vectors[chosen], effects[chosen], weights[chosen]
            self.rows[i] += len(x)
            self.weight[i] += w.sum()
            self.effects[i] += w @ y.double()
            if self.moments:
                self.moments[i].add(x, y, w)
            elif not i:
                self.training.append(TrainingRows(list(np.array(batch["vector_id"])[chosen.cpu().numpy()]), x, y, w))
            if i:
                self.held_out.append((x.float(), y.float(), errors[chosen], w))

    def sum_over_workers(self) -> None:
        """Make the sums those of all workers.

        Raises:
            InputError: too few rows.
        """
        _sum_over_workers([self.rows, self.weight, self.capped, self.effects, *(t for m in self.moments for t in m.tensors())])
        train, held_out = (int(rows) for rows in self.rows.tolist())
        if train < 2 or held_out < 1:
            raise InputError(self._too_few(train, held_out))

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

    def score(self, approximator: EffectApproximator) -> dict[str, Any]:
        """The held-out report of a fit to the training rows, by all workers together."""
        scores = HeldOutScores(*(self.effects / self.weight[:, None]))
        for rows in self.held_out:
            scores.add(approximator, *rows)
        _sum_over_workers(scores.tensors())
        return scores.report()


class Solution(NamedTuple):
    """What a solver makes of the rows."""

    to_score: EffectApproximator
    """Fitted to the training rows alone."""
    final: EffectApproximator
    report: dict[str, Any]


def _train(config: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """One worker: takes its share of the rows, solves together with the others, and scores its own held-out rows."""
    in_driver = not Fit.model_validate_json(config["settings"]).workers
    share = Share(config, ray.train.torch.get_device() if torch.cuda.is_available() and not in_driver else torch.device("cpu"))
    for batch in ray.train.get_dataset_shard("train").iter_batches(batch_size=BATCH_ROWS, batch_format="numpy"):
        share.add(batch)
    share.sum_over_workers()
    settings = share.settings
    solution = _ridge(share) if settings.solver == "ridge" else _adam(share)
    report = {
        "solver": settings.solver,
        "rows_train": int(share.rows[0].item()),
        "rows_held_out": int(share.rows[1].item()),
        "rows_capped": int(share.capped.item()),
        "capped_weight": settings.capped_weight,
        **solution.report,
        "workers": settings.workers,
        "held_out": share.score(solution.to_score),
    }
    if settings.solver == "ridge":
        ray.train.report({"held_out_r2": report["held_out"]["r2"]})
    return report, solution.final.M.cpu().numpy(), solution.final.b.cpu().numpy()


def _ridge(share: Share) -> Solution:
    """The exact solution from moments; the penalty of least held-out error is used on all rows together."""
    train, held_out = share.moments
    path = RidgePath(train)
    penalty, errors = choose_penalty(path, held_out, share.settings.penalties)
    to_score = path.fit(penalty)
    train += held_out
    report = {"penalty": penalty, "held_out_mse_by_penalty": errors}
    return Solution(to_score, RidgePath(train).fit(penalty), report)


def _adam(share: Share) -> Solution:
    """The paper's way; the held-out rows are never fitted, as there."""
    settings = share.settings
    found = descend(share.training, settings, share.seed, share.d_model, share.d_sae, share.device)
    of_adam = {name: getattr(settings, name) for name in ("learning_rate", "batch_size", "epochs")}
    report = {**of_adam, "mse_by_epoch": found.mse_by_epoch, "resumed_at_epoch": found.resumed_at_epoch}
    return Solution(found.approximator, found.approximator, report)


def _sum_over_workers(tensors: Sequence[torch.Tensor]) -> None:
    """Add up over workers, in place; alone in the driver's process there is nothing to add."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
