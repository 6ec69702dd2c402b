"""`saets explorer`: a page of what vectors do to features, made of whatever a run holds."""

from __future__ import annotations

import argparse

from saets.commands.common import Commands, add_command, console, errors, experiment_of, page_path, show_path
from saets.terminal.display import shown_progress

PAGE = "explorer.html"


def add(commands: Commands) -> None:
    """Put the command into the parser."""
    explorer = add_command(commands, "explorer", _explorer, "write a page that shows what vectors do to features", page=PAGE)
    explorer.add_argument(
        "--labels",
        metavar="FILE",
        help=".csv or .parquet with columns feature and label, .json by feature id, or Neuronpedia's explanations (.json, "
        ".jsonl.gz, or a folder of batches)",
    )
    explorer.add_argument("--top", type=int, metavar="N", help="entries kept of each list; by default 20, or as many as fit")


def _explorer(options: argparse.Namespace) -> None:
    from saets.explorer.contents import check_labels, gather
    from saets.explorer.page import page, planned_top, texts_of
    from saets.explorer.sources import Sources
    from saets.features.labels import read_labels
    from saets.run_folder.store import RunFolder

    labels = read_labels(options.labels) if options.labels else {}
    experiment, folder = experiment_of(options)
    sources = Sources.of(experiment, RunFolder(folder))
    check_labels(labels, sources.d_sae)
    texts = texts_of(sources, labels)
    top = planned_top(sources, texts, options.top)
    with shown_progress(errors, options.progress) as progress:
        contents = gather(sources, top, progress)
    content = page(sources, contents, texts)
    where = page_path(options, folder, PAGE)
    where.write_bytes(content)
    console.print(
        f"{sources.d_sae:,} features, {len(contents.vectors):,} vectors; of every list the {contents.top} entries largest in "
        f"size; {len(content) / 1e6:.1f} MB",
        markup=False,
    )
    for name, reason in sources.missing.items():
        console.print(f"not in it: {name}; {reason}", markup=False)
    show_path("explorer", where)
