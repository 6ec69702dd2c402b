"""Stage 2 as a Ray Train job: workers sum the moments of their share of the rows, and an all-reduce makes them whole."""

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
from saets.distributed.cluster import Cluster, input_error
from saets.errors import InputError
from saets.held_out import HeldOutScores, is_held_out

BATCH_ROWS = 512


class FitResult(NamedTuple):
    """The fitted map and what is known of it."""

    approximator: EffectApproximator
    report: dict[str, Any]
    """Rows, penalty, and held-out figures of the fit to the training rows alone."""


def fit(tables: Iterable[pa.Table], settings: Fit, cluster: Cluster, *, seed: int, gpus: float = 0.0) -> FitResult:
    """Fit the rows of tables, which go to Ray one after the other.

    Their columns are `vector_id`, `vector`, `effect`, `standard_error` and `calibration`.

    A row is held out by a hash of the seed and its vector_id, so the split does not depend on order, shards or workers. The
    penalty of least held-out error is then used on all rows together.

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
            run_config=ray.train.RunConfig(storage_path=folder, name="fit"),
        )
        try:
            result: Any = trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise input_error(error) or error from error
    report, M, b = result.return_value
    return FitResult(EffectApproximator(torch.from_numpy(M), torch.from_numpy(b)), report)


def _train(config: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """One worker: moments of its shard, all-reduced; then every worker solves and scores its own held-out rows."""
    settings = Fit.model_validate_json(config["settings"])
    shard = ray.train.get_dataset_shard("train")
    device = ray.train.torch.get_device() if torch.cuda.is_available() and settings.workers else torch.device("cpu")
    sets = {held: Moments(config["d_model"], config["d_sae"], device) for held in (False, True)}
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    capped = torch.zeros(1, dtype=torch.float64, device=device)
    for batch in shard.iter_batches(batch_size=BATCH_ROWS, batch_format="numpy"):
        vectors, effects = (torch.from_numpy(np.stack(list(batch[name]))).to(device) for name in ("vector", "effect"))
        held_rows = torch.from_numpy(is_held_out(list(batch["vector_id"]), config["seed"], settings.held_out)).to(device)
        of_grid_end = np.array(batch["calibration"]) == "capped"
        capped += of_grid_end.sum()
        weights = torch.from_numpy(np.where(of_grid_end, settings.capped_weight, 1.0)).to(device)
        for held, moments in sets.items():
            moments.add(vectors[held_rows == held], effects[held_rows == held], weights[held_rows == held])
        errors = torch.from_numpy(np.array(batch["standard_error"], np.float64)).to(device)
        scored = held_rows & (weights > 0)
        kept.append((vectors[scored].float(), effects[scored].float(), errors[scored], weights[scored]))
    train, held_out = sets[False], sets[True]
    _sum_over_workers([*train.tensors(), *held_out.tensors(), capped])
    if held_out.rows.item() < 1 or train.rows.item() < 2:
        raise InputError(_too_few(train, held_out, int(capped.item()), settings))
    penalty, mse_by_penalty = choose_penalty(train, held_out, settings.penalties)
    approximator, scores = RidgePath(train).fit(penalty), HeldOutScores(train, held_out)
    for rows in kept:
        scores.add(approximator, *rows)
    _sum_over_workers(scores.tensors())
    final = RidgePath(train + held_out).fit(penalty)
    held_out_report = scores.report()
    report = {
        "solver": "ridge",
        "rows_train": int(train.rows.item()),
        "rows_held_out": int(held_out.rows.item()),
        "rows_capped": int(capped.item()),
        "capped_weight": settings.capped_weight,
        "penalty": penalty,
        "held_out_mse_by_penalty": mse_by_penalty,
        "workers": settings.workers,
        "held_out": held_out_report,
    }
    ray.train.report({"held_out_r2": held_out_report["r2"]})
    return report, final.M.cpu().numpy(), final.b.cpu().numpy()


def _sum_over_workers(tensors: Sequence[torch.Tensor]) -> None:
    """Add up over workers, in place; alone in the driver's process there is nothing to add."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def _too_few(train: Moments, held_out: Moments, capped: int, settings: Fit) -> str:
    left_out = f"; fit.capped_weight = 0 leaves out {capped} capped ones" if capped and not settings.capped_weight else ""
    return (
        f"{int(train.rows.item())} rows to fit and {int(held_out.rows.item())} held out, of which at least 2 and 1 are "
        f"needed{left_out}; measure more vectors or raise fit.held_out. The penalty makes up for fewer rows than the "
        f"{len(train.x)} dimensions of a vector, but it is chosen on held-out rows"
    )
