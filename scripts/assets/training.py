"""Parts `compare` and `sae`: sparse autoencoders trained by SAELens on the residuals, on the CPU or a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from assets import quality, residuals
from assets.parts import Build, Need, Progress, whole
from assets.settings import Settings, Training
from saets.errors import InputError, unknown
from saets.shapes import Float

KINDS = ("topk", "batch_topk", "jumprelu")

WARM_UP, DECAY = 0.02, 0.25
"""Parts of all steps over which the learning rate rises and, at the end, falls to a tenth."""

CHECKPOINTS = 8
DEAD_TOKENS = 150_000
"""A latent that has not fired on so many tokens counts as dead, and the auxiliary loss pulls it back."""

SCALING_BATCHES = 20
"""Batches from which the mean norm of a residual is estimated."""

JUMPRELU = {"jumprelu_init_threshold": 0.25, "jumprelu_bandwidth": 0.2, "jumprelu_ste_to_input": True}
"""Adam moves a threshold by about lr a step at most, so it has to begin near where it ends: from SAELens' 0.01 it gets nowhere
in some thousand steps, and every latent stays on."""


def need(settings: Settings) -> Need:
    """The SAE with Adam's state, a file of residuals, and checkpoints."""
    training = settings.training
    weights = 4 * 2 * 576 * training.d_sae
    return Need(disk=3.0 * weights * CHECKPOINTS, memory=5.0 * weights + 60.0 * training.batch * training.d_sae + 2e9)


def need_to_compare(settings: Settings) -> Need:
    """That of the widest."""
    return need(replace(settings, training=replace(settings.training, d_sae=2 * settings.training.d_sae)))


def check(build: Build) -> None:
    """Raise `InputError` for an unknown kind, a layer that no residuals are taken at, or where SAELens is missing."""
    training, layers = build.settings.training, build.settings.residuals.layers
    if training.kind not in KINDS:
        raise unknown("kind of SAE", training.kind, KINDS)
    if training.layer not in layers:
        raise InputError(f"training.layer is {training.layer}, and residuals.layers {list(layers)}; make it one of them")
    if importlib.util.find_spec("sae_lens") is None:
        raise InputError("SAEs are trained by SAELens, which is not installed: pip install -c constraints.txt sae-lens")


def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """The shipped SAE, as SAELens reads it, and its quality."""
    return trained(build, build.settings.training, folder)


def compare(build: Build, folder: Path) -> Mapping[str, Any]:
    """Every kind at the shipped layer, and the shipped kind at the other layers and twice the width, on fewer tokens."""
    basis = replace(build.settings.training, tokens=build.settings.compare.tokens)
    variants = [replace(basis, kind=kind) for kind in KINDS]
    variants += [replace(basis, layer=layer) for layer in build.settings.residuals.layers if layer != basis.layer]
    variants.append(replace(basis, d_sae=2 * basis.d_sae))
    found = {}
    for training in variants:
        name = _name(training)
        report = folder / name / "quality.json"
        if not report.exists():
            report.parent.mkdir(exist_ok=True)
            facts = trained(build, training, report.parent)
            whole(report, lambda path, facts=facts: path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8"))
        found[name] = json.loads(report.read_text(encoding="utf-8"))
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    return {"variants": found}


def compared(build: Build, layer: int) -> Path:
    """Folder of the compared SAE of the shipped kind and width at a layer."""
    return build.folder("compare") / _name(replace(build.settings.training, layer=layer))


def _name(training: Training) -> str:
    return f"{training.kind}-layer{training.layer}-{training.d_sae}"


def trained(build: Build, training: Training, folder: Path) -> dict[str, Any]:
    """Train one SAE into `folder`/sae, in float16, going on from the last checkpoint there; what it is worth on held-out text.

    Where there are fewer residuals than tokens to train on they come again, which `passes` tells.

    Raises:
        InputError: no residuals but those held out.
    """
    from sae_lens import SAE

    files = residuals.files(build, training.layer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (folder / "sae").exists():
        _train(build, training, folder, files[1:], device)
    apart, _ = residuals.held_out(build, training.layer)
    held_out = torch.from_numpy(np.load(apart)[: training.held_out]).float()
    with _quietly():
        loaded: Any = SAE.load_from_disk(str(folder / "sae"), device=device).float()
    facts = quality.of(build, loaded, training.layer, held_out)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    tokens = _steps(training) * training.batch
    passes = tokens / sum(len(np.load(file, mmap_mode="r")) for file in files[1:])
    return {"layer": training.layer, "tokens": tokens, "passes": round(passes, 2), **facts}


def _steps(training: Training) -> int:
    """As many whole batches as hold the tokens asked for."""
    return math.ceil(training.tokens / training.batch)


def _train(build: Build, training: Training, folder: Path, files: Sequence[Path], device: str) -> None:
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    steps = _steps(training)
    torch.manual_seed(build.settings.subject.seed)
    mean = _mean(files)
    making = _training_sae(training, len(mean), device, steps)
    making.cfg.metadata.hook_name = f"blocks.{training.layer}.hook_resid_post"
    making.cfg.metadata.model_name = build.settings.subject.model
    batches = Batches(files, training.batch, build.settings.subject.seed, mean, Progress(f"sae {training.kind}, steps", steps))
    trainer: Any = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * training.batch,
            train_batch_size_samples=training.batch,
            device=device,
            lr=training.lr,
            lr_end=training.lr / 10,
            lr_warm_up_steps=round(WARM_UP * steps),
            lr_decay_steps=round(DECAY * steps),
            dead_feature_window=max(1, DEAD_TOKENS // training.batch),
            n_checkpoints=CHECKPOINTS,
            checkpoint_path=str(folder / "checkpoints"),
            n_batches_for_norm_estimate=SCALING_BATCHES,
            autocast=True,
        ),
        sae=making,
        data_provider=batches,
    )
    with _quietly():
        if checkpoint := _latest(folder / "checkpoints"):
            making.load_weights_from_checkpoint(checkpoint)
            trainer.load_trainer_state(checkpoint)
            batches.skip(trainer.n_training_samples // training.batch + SCALING_BATCHES)
        sae = _uncentred(trainer.fit(), mean)
        whole(folder / "sae", lambda path: _save(sae, path))


def _mean(files: Sequence[Path]) -> Float[Tensor, " d_model"]:
    """The mean residual of one file, which is taken away before training: no latent is spent on it."""
    if not files:
        raise InputError("one file of residuals, which is held out, and none to train on; give more tokens")
    return torch.from_numpy(np.load(files[0])).float().mean(0)


def _uncentred(sae: Any, mean: Float[Tensor, " d_model"]) -> Any:
    """The SAE of centred residuals as one of residuals, exactly."""
    with torch.no_grad():
        sae.b_dec += mean.to(sae.device)
        if not sae.cfg.apply_b_dec_to_input:
            sae.b_enc -= mean.to(sae.device) @ sae.W_enc
    return sae


class Batches(Iterator[Tensor]):
    """Residuals less their mean, float32 [batch, d_model], a file after another, each mixed; after the last the first again."""

    def __init__(self, files: Sequence[Path], batch: int, seed: int, mean: Float[Tensor, " d_model"], progress: Progress) -> None:
        self._files, self._batch, self._seed, self._mean, self._progress = files, batch, seed, mean, progress
        self._given = 0
        self._left = self._all()

    def _all(self) -> Iterator[Tensor]:
        for turn in itertools.count():
            for i, file in enumerate(self._files):
                data = torch.from_numpy(np.load(file))
                generator = torch.Generator().manual_seed(2**20 * self._seed + 1000 * turn + i)
                for part in torch.randperm(len(data), generator=generator).split(self._batch):
                    if len(part) == self._batch:
                        yield data[part].float() - self._mean

    def __next__(self) -> Tensor:
        self._given += 1
        self._progress.at(self._given)
        return next(self._left)

    def skip(self, batches: int) -> None:
        """Leave out what an earlier run was given."""
        for _ in range(batches):
            next(self._left)
        self._given += batches


def _training_sae(training: Training, d_in: int, device: str, steps: int) -> Any:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    sizes: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": training.d_sae,
        "device": device,
        "normalize_activations": "expected_average_only_in",
    }
    if training.kind == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(k=training.k, **sizes))
    if training.kind == "batch_topk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=training.k, **sizes))
    if training.kind == "jumprelu":
        sparse: dict[str, Any] = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(training.k)}
        return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(l0_warm_up_steps=steps // 5, **JUMPRELU, **sparse, **sizes))
    raise AssertionError(f"{training.kind} was checked")


def _save(sae: Any, folder: Path) -> None:
    sae.save_inference_model(str(folder))
    weights = {name: tensor.half() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "sparsity.safetensors").unlink(missing_ok=True)


def _latest(folder: Path) -> Path | None:
    """The last checkpoint that is whole; SAELens writes the trainer's state and then its scaling last."""
    whole_ones = [path.parent for path in folder.glob("*/activation_scaler.json")]
    return max(whole_ones, key=lambda path: int(path.name.rpartition("_")[2]), default=None)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without SAELens' own progress bar."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
