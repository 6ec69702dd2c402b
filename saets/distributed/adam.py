"""The fit as the paper makes it: Adam on mini-batches, the same batches for any number of Ray Train workers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from torch import Tensor, nn

from saets.distributed.together import of_all_workers, sum_over_workers, workers
from saets.experiment.config import Fit
from saets.fit.approximator import EffectApproximator

STATE = "state.pt"
"""File of a checkpoint: the map, Adam's moments and the loss of each epoch so far."""


class TrainingRows(NamedTuple):
    """Some of a worker's rows."""

    vector_ids: list[str]
    vectors: Tensor
    """[rows, d_model], of any length."""
    effects: Tensor
    """[rows, d_sae], as they are stored."""
    weights: Tensor


class Descent(NamedTuple):
    """Where Adam ended."""

    approximator: EffectApproximator
    mse_by_epoch: list[float]
    """Mean squared error over the training rows, each at the step that read it."""
    resumed_at_epoch: int
    """Epochs that a worker group before this one had done; 0 where none was lost."""


def descend(rows: Sequence[TrainingRows], settings: Fit, seed: int, d_model: int, d_sae: int, device: torch.device) -> Descent:
    """Minimise the weighted squared error of x M + b over all workers' rows, from M = 0 and b = 0, by DDP.

    The paper's settings (section 4): learning rate 2e-4, batches of 64, 15 epochs, a cosine schedule over epochs. All rows are
    sorted by vector_id and shuffled by seed and epoch, and each worker takes the rows of a batch that it holds, so batches do not
    depend on workers or shards. After each epoch the state is reported as a checkpoint, from which Ray Train goes on where a
    worker died; a fit in the driver's own process has nothing to go on from and writes none.
    """
    ids = [vector_id for part in rows for vector_id in part.vector_ids]
    if not rows:  # other workers hold them all
        rows = [TrainingRows([], *(torch.zeros(shape, device=device) for shape in ((0, d_model), (0, d_sae), 0)))]
    vectors = nn.functional.normalize(torch.cat([part.vectors for part in rows]).float(), dim=-1)
    effects, weights = torch.cat([part.effects for part in rows]), torch.cat([part.weights for part in rows])
    everyone = sorted(of_all_workers(list(zip(ids, weights.tolist(), strict=True))))
    all_weights = torch.tensor([weight for _, weight in everyone], dtype=torch.float64)
    places = {vector_id: place for place, (vector_id, _) in enumerate(everyone)}
    mine = torch.tensor([places[vector_id] for vector_id in ids], dtype=torch.long)

    linear = nn.Linear(d_model, d_sae, device=device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    model = ray.train.torch.prepare_model(linear) if settings.workers else linear
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    losses = _resume(linear, optimiser, device)
    resumed_at = len(losses)
    for epoch in range(resumed_at, settings.epochs):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
        batch_of = _batches(len(everyone), settings.batch_size, seed, epoch)
        totals = torch.zeros(int(batch_of.max()) + 1, dtype=torch.float64).index_add_(0, batch_of, all_weights)
        own = batch_of[mine]
        parts = own.argsort(stable=True).to(device).split(torch.bincount(own, minlength=len(totals)).tolist())
        squares = torch.zeros(1, dtype=torch.float64, device=device)
        for part, total in zip(parts, totals.tolist(), strict=True):
            errors = (model(vectors[part]) - effects[part].float()).square().sum(1)
            error = errors @ weights[part].float()
            optimiser.zero_grad()
            (error * (workers() / (total * d_sae))).backward()  # DDP takes the mean over workers
            optimiser.step()
            squares += error.detach()
        sum_over_workers([squares])
        losses.append(squares.item() / (all_weights.sum().item() * d_sae))
        _report(linear, optimiser, losses, in_driver=not settings.workers)
    approximator = EffectApproximator(linear.weight.detach().T.contiguous(), linear.bias.detach())
    return Descent(approximator, losses, resumed_at)


def _batches(rows: int, size: int, seed: int, epoch: int) -> Tensor:
    """The batch of each row in this epoch."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2**20 * seed + epoch))
    return order.argsort() // size


def _resume(model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> list[float]:
    """Take up the latest checkpoint where there is one; the loss of each epoch done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return list(state["losses"])


def _report(model: nn.Module, optimiser: torch.optim.Optimizer, losses: list[float], *, in_driver: bool) -> None:
    metrics = {"epoch": len(losses), "mse": losses[-1]}
    if in_driver or ray.train.get_context().get_world_rank():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses}
        torch.save(state, Path(folder) / STATE)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
