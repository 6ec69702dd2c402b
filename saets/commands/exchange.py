"""Commands that exchange vectors with other tools: export, import."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from saets.commands.common import Commands, add_command, console, errors, opened_run
from saets.commands.looking import add_vector_choice, chosen_vector
from saets.experiment.method_id import parse_method
from saets.files.storage import locate, shareable


def add(commands: Commands) -> None:
    """Put these commands into the parser."""
    export = add_vector_choice(add_command(commands, "export", _export, "write a vector for another tool"))
    export.add_argument("--to", choices=("gguf", "safetensors"), required=True, help="llama.cpp's control vector, or one tensor")
    export.add_argument(
        "--scale", type=float, help="length of the tensor that is written; by default the file's own scale, or else 1"
    )
    export.add_argument("--file", metavar="PATH", help="where to; by default the vector's name in the working folder")
    export.add_argument("--force", action="store_true", help="although model or hook are others, or positions are lost")
    read = add_command(commands, "import", _import, "make a vector file of another tool's file: .gguf, .safetensors, .pt")
    read.add_argument("source", metavar="FILE", help="path or URI")
    place = read.add_mutually_exclusive_group()
    place.add_argument("--layer", type=int, help="the block after which the vector is added, counted from 0")
    place.add_argument("--hook-name", help="where it is added; also which vector of a GGUF file is meant")
    read.add_argument("--key", help="which tensor, where the file holds several")
    read.add_argument("--row", type=int, help="which row of a tensor [rows, d_model]")
    read.add_argument("--file", metavar="PATH", required=True, help="the vector file to write")
    read.add_argument("--force", action="store_true", help="although model or hook are others")


def _export(options: argparse.Namespace) -> None:
    from saets.checks import check_vector
    from saets.model import model_type
    from saets.vector.formats import export_vector
    from saets.vector.vector import ScaledVector

    run = opened_run(options)
    vector = chosen_vector(run, options)
    check_vector(run.experiment, vector, force=options.force)
    scale = options.scale if options.scale is not None else float(vector.provenance.get("scale", 1.0))
    path = options.file or f"{_name(options)}{'.gguf' if options.to == 'gguf' else '.plain.safetensors'}"
    scaled = ScaledVector(vector, 1.0) * scale
    export_vector(scaled, options.to, path, model_hint=model_type(run.experiment.model), force=options.force)
    console.print(f"{path}: {vector.hook_name}, length {scaled.scale:g}", markup=False)
    if not vector.positions.everywhere:
        errors.print(f"the file does not say that only {vector.positions} is to be steered", markup=False)
    if options.to == "gguf":
        how = f"--control-vector-scaled {path}:SCALE" if scaled.scale == 1 else f"--control-vector {path}"
        console.print(f"llama.cpp adds it at every position with {how}", markup=False)
    high = vector.provenance.get("scales", {}).get("high")
    if high and scaled.scale == 1:
        console.print(f"calibration recommends scales up to {high:.3g}", markup=False)


def _name(options: argparse.Namespace) -> str:
    """What the exported file is called: after the vector's file, or goal and method, or the features."""
    if options.vector:
        return Path(locate(options.vector).name).stem
    return f"{options.goal}--{parse_method(options.method).file_stem}" if options.goal else "features"


def _import(options: argparse.Namespace) -> None:
    from saets.checks import check_model_kind, check_vector
    from saets.vector.formats import Choice, check_new, import_vector, post

    check_new(options.file)
    experiment = opened_run(options).experiment
    hook_name = options.hook_name if options.layer is None else post(options.layer)
    scaled = import_vector(options.source, Choice(hook_name, options.key, options.row))
    check_vector(experiment, scaled.vector, force=options.force)
    if not options.force:
        check_model_kind(experiment, scaled.vector.provenance.get("imported", {}).get("model_hint", ""))
    provenance = {**scaled.vector.provenance, "model": shareable(experiment.model.name)}
    vector = replace(scaled.vector, provenance=provenance)
    replace(scaled, vector=vector).save(options.file)
    console.print(f"{options.file}: {vector.hook_name}, {vector.positions}, length {scaled.scale:g}", markup=False)
