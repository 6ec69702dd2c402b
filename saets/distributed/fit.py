"""Stage 2 as a Ray Train job: workers sum the moments of their share of the rows, and an all-reduce makes them whole."""

from __future__ import annotations

import hashlib
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

BATCH_ROWS = 512


class FitResult(NamedTuple):
    """The fitted map and what is known of it."""

    approximator: EffectApproximator
    report: dict[str, Any]
    """Rows, penalty, and held-out figures of the fit to the training rows alone."""


def fit(tables: Iterable[pa.Table], settings: Fit, cluster: Cluster, *, seed: int, gpus: float = 0.0) -> FitResult:
    """Fit the rows of tables with columns `vector_id`, `vector` and `effect`, which go to Ray one after the other.

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


def is_held_out(vector_ids: Sequence[str], seed: int, share: float) -> np.ndarray:
    """Which rows are held out: a pure function of seed and vector_id, True for about `share` of them."""

    def draw(vector_id: str) -> float:
        digest = hashlib.blake2b(f"{seed}:{vector_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64

    return np.array([draw(vector_id) < share for vector_id in vector_ids], dtype=bool)


def _train(config: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """One worker: moments of its shard, all-reduced; then every worker solves and scores its own held-out rows."""
    settings = Fit.model_validate_json(config["settings"])
    shard = ray.train.get_dataset_shard("train")
    device = ray.train.torch.get_device() if torch.cuda.is_available() and settings.workers else torch.device("cpu")
    sets = {held: Moments(config["d_model"], config["d_sae"], device) for held in (False, True)}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in shard.iter_batches(batch_size=BATCH_ROWS, batch_format="numpy"):
        vectors, effects = (torch.from_numpy(np.stack(list(batch[name]))).to(device) for name in ("vector", "effect"))
        held_rows = torch.from_numpy(is_held_out(list(batch["vector_id"]), config["seed"], settings.held_out)).to(device)
        for held, moments in sets.items():
            moments.add(vectors[held_rows == held], effects[held_rows == held])
        kept.append((vectors[held_rows].float(), effects[held_rows].float()))
    train, held_out = sets[False], sets[True]
    for moments in (train, held_out):
        _sum_over_workers(moments.tensors())
    if held_out.n.item() < 1 or train.n.item() < 2:
        raise InputError(
            f"{int(train.n.item())} rows to fit and {int(held_out.n.item())} held out; measure more vectors or raise fit.held_out"
        )
    penalty, errors = choose_penalty(train, held_out, settings.penalties)
    scores = _score(RidgePath(train).fit(penalty), kept, train.y / train.n, device)
    _sum_over_workers([scores])
    final = RidgePath(train + held_out).fit(penalty)
    held_out_report = _report(scores, held_out, train)
    report = {
        "solver": "ridge",
        "rows_train": int(train.n.item()),
        "rows_held_out": int(held_out.n.item()),
        "penalty": penalty,
        "held_out_mse_by_penalty": errors,
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


def _score(
    approximator: EffectApproximator,
    kept: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mean_effect: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Over this worker's held-out rows: squared error, sum of cosines, and sum of cosines of the mean effect."""
    scores = torch.zeros(3, dtype=torch.float64, device=device)
    for vectors, effects in kept:
        predicted = approximator.predict(vectors)
        scores[0] += (predicted - effects).double().square().sum()
        scores[1] += torch.nn.functional.cosine_similarity(predicted, effects, dim=-1).double().sum()
        scores[2] += torch.nn.functional.cosine_similarity(mean_effect.float()[None], effects, dim=-1).double().sum()
    return scores


def _report(scores: torch.Tensor, held_out: Moments, train: Moments) -> dict[str, float]:
    """Held-out figures beside those of two trivial predictors; R2 is against the training rows' mean effect."""
    entries = held_out.n.item() * held_out.y.numel()
    around_mean = held_out.centred(train.x / train.n, train.y / train.n)[2].item()
    return {
        "mse": scores[0].item() / entries,
        "r2": 1 - scores[0].item() / around_mean,
        "cosine": scores[1].item() / held_out.n.item(),
        "mse_mean_effect": around_mean / entries,
        "cosine_mean_effect": scores[2].item() / held_out.n.item(),
        "mse_zero": held_out.yy.item() / entries,
    }
