"""A recipe: one file that says which model is converted, how it is trained, on what, and where the result goes.

The YAML and the Python form are one object; what a file leaves out is filled in, printed and saved with the output.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from normswap.errors import RecipeError, RefusedError
from normswap.kernels.backends import BACKENDS
from normswap.planning.choice import kind_of
from normswap.planning.request import Request, Words
from normswap.planning.rewrites.steps import row_of
from normswap.tune.shipped import find
from normswap.tune.training_arguments import unknown
from normswap.tune.yaml import dump, read, set_key
from normswap.tune.yaml_errors import explain


class Strict(BaseModel):
    """A part of a recipe: no key is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Strict):
    """The checkpoint to convert and train.

    Attributes:
        path: a folder, or a Hub id.
        revision: of a Hub id.
        dtype: of the weights in training; `training.bf16` computes in bfloat16 on weights in float32.
        attn_implementation: as of `from_pretrained`; None: what transformers chooses.
        config: keys of its configuration that are others in training, such as dropouts; the result has the source's.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    config: dict[str, Any] = {}


class Data(Strict):
    """Text, packed to blocks, a part of it held out.

    Attributes:
        source: `shipped` (Shakespeare, public domain), a file or pattern of `*.txt`, `*.jsonl`, `*.json`, `*.parquet`
            or `*.csv`, a folder of such, or a Hub id.
        name: of the configuration of a Hub id.
        split: of it.
        column: that has the text.
        label: that has the class, for the objective `classification`.
        block: tokens in a block.
        pack: join all texts and cut them to blocks; without it each row is one, cut off at `block`.
        held_out: the last part of the rows or blocks, which is never trained on.
        held_out_source: take it from there instead, a file or pattern.
        held_out_blocks: evaluate on so many at most.
        calibration_tokens: how many tokens of the training part conversions are calibrated on.
    """

    source: str = "shipped"
    name: str | None = None
    split: str = "train"
    column: str = "text"
    label: str | None = None
    block: int = Field(128, ge=8)
    pack: bool = True
    held_out: float = Field(0.1, gt=0, lt=1)
    held_out_source: str | None = None
    held_out_blocks: int = Field(256, ge=1)
    calibration_tokens: int = Field(8192, ge=64)


class Weighted(Strict):
    weight: float = Field(1.0, gt=0)


class LanguageModelling(Weighted):
    """Cross-entropy of the next token."""

    kind: Literal["lm"] = "lm"


class MaskedLanguageModelling(Weighted):
    """Cross-entropy of masked tokens, a `probability` of all."""

    kind: Literal["mlm"]
    probability: float = Field(0.15, gt=0, lt=1)


class Classification(Weighted):
    """Cross-entropy of the class in the column `data.label`."""

    kind: Literal["classification"]


class Distillation(Weighted):
    """KL of the logits from the unconverted model's, both at `temperature` (times its square; Hinton et al., 2015)."""

    kind: Literal["distill"]
    temperature: float = Field(1.0, gt=0)


class HiddenStates(Weighted):
    """One minus the cosine of each block's hidden states to the unconverted model's."""

    kind: Literal["hidden"]


class Embeddings(Weighted):
    """One minus the cosine of each text's embedding, the mean over its tokens, to the unconverted model's."""

    kind: Literal["embedding"]


Objective = Annotated[
    LanguageModelling | MaskedLanguageModelling | Classification | Distillation | HiddenStates | Embeddings,
    Field(discriminator="kind"),
]


class Taper(Strict):
    """From the exact form of each converted site to its target form, while training.

    Attributes:
        shape: of the way from one to the other.
        order: all sites `together`, one after another `forward` or `backward` in the order in which they run, or
            patterns of paths: the sites of the first one, then those of the second, and so on.
        over: the part of the stage that it takes; the rest is trained in the target form.
    """

    shape: Literal["cosine", "linear"] = "cosine"
    order: Literal["together", "forward", "backward"] | tuple[str, ...] = "together"
    over: float = Field(0.8, gt=0, le=1)


class Stage(Strict):
    """A part of the training.

    Attributes:
        name: for logs; each once.
        train: `all`; `norms`, the parameters of norms; `skips`, the scales of skips (while there is scaffolding that
            has them); `moved`, the blocks whose norms move; or patterns of parameter names.
        tokens, steps: its length, one of both.
        learning_rate: at its highest; None: that of `training`.
        warmup: the part of the stage in which the rate rises from 0.
        schedule: how it goes on from there, to 0 at the stage's end, or not.
        taper: of one stage at most.
    """

    name: str = ""
    train: str | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    tokens: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    learning_rate: float | None = Field(None, gt=0)
    warmup: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    taper: Taper | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError(
                f"expected a length, either `tokens` or `steps`; found {'neither' if self.steps is None else 'both'}"
            )
        return self


class Guards(Strict):
    """When a run is stopped: how many nats its held-out loss may stand above the best so far; None: any.

    Attributes:
        loss: of the mean.
        tail: of the 99.9th percentile over tokens.
    """

    loss: float | None = Field(1.0, gt=0)
    tail: float | None = Field(5.0, gt=0)


class Kernels(Strict):
    """Fused kernels under the norms while they train (`normswap.use_kernels`); the result has none.

    Attributes:
        backend: `auto`, the fastest for each norm; a name, or several in order of preference.
        fuse_residual: have norms make the residual sums beside them.
    """

    backend: str | Annotated[tuple[str, ...], Field(min_length=1)] = "auto"
    fuse_residual: bool = False

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if name not in ("auto", *BACKENDS) or (name == "auto" and not isinstance(value, str)):
                raise ValueError(f"expected auto, or of {', '.join(BACKENDS)}")
        return value


class Lora(Strict):
    """Train low-rank adapters in the place of linear maps (PEFT); they are merged at the end. Norms train as they are.

    Attributes:
        r, alpha, dropout: as in `peft.LoraConfig`.
        target_modules: `all-linear`, or names of modules.
    """

    r: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


def _path_alone(value: Any) -> Any:
    """A path in the place of a model."""
    return {"path": value} if isinstance(value, str) else value


def _backend_alone(value: Any) -> Any:
    """A name in the place of kernels."""
    return {"backend": value} if isinstance(value, str | list | tuple) else value


def _objectives(value: Any) -> Any:
    """One objective in the place of a list of one; a bare word for its kind."""
    several = value if isinstance(value, list | tuple) else [value]
    return [{"kind": part} if isinstance(part, str) else part for part in several]


def _conversions(value: Any) -> Any:
    """One conversion in the place of a list of one; numbers in YAML that are layers."""
    several = [value] if isinstance(value, dict) else value
    if not isinstance(several, list | tuple):
        raise ValueError("expected options of `normswap convert`, such as {norm: dyt}, or a list of such")
    single = [isinstance(words, dict) and type(words.get("layers")) is int for words in several]
    return [w | {"layers": str(w["layers"])} if one else w for w, one in zip(several, single, strict=True)]


# What may stand in a file, beside what it is read as.
Short = Literal["lm", "mlm", "classification", "distill", "hidden", "embedding"]
Fused = Annotated[Kernels, BeforeValidator(_backend_alone, json_schema_input_type=Kernels | str | tuple[str, ...])]
Models = Annotated[Model, BeforeValidator(_path_alone, json_schema_input_type=Model | str)]
Conversions = Annotated[
    tuple[Words, ...], BeforeValidator(_conversions, json_schema_input_type=Words | tuple[Words, ...])
]
Objectives = Annotated[
    tuple[Objective, ...],
    BeforeValidator(_objectives, json_schema_input_type=Short | Objective | tuple[Short | Objective, ...]),
    Field(min_length=1),
]


class Recipe(Strict):
    """All of a run.

    Attributes:
        model: or its path alone.
        surgery: conversions, in the words of `normswap convert` (`planning.request.Words`), done as one; none: plain
            fine-tuning.
        kernels, data, objective, stages, guards, lora: see there; of kernels the backend alone will
            do. Objectives are added, by their weights.
        training: passed to `transformers.TrainingArguments` under their own names.
        control: fine-tune the unconverted model as well, with the same data and budget, to compare with.
        output: the folder to make.
        dtype: of the result's tensors; None: as the source stores them.
        verify: how much source and result are compared on the text that ships with normswap, as for `convert`.
    """

    model: Models
    surgery: Conversions = ()
    kernels: Fused | None = None
    data: Data = Data()
    objective: Objectives = (LanguageModelling(),)
    stages: tuple[Stage, ...] = Field(min_length=1)
    training: dict[str, Any] = {}
    guards: Guards = Guards()
    lora: Lora | None = None
    control: bool = False
    output: str
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    verify: Literal["full", "fast"] = "full"

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if problems := unknown(value):
            raise ValueError("\n".join(problems))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = []
        kinds = {objective.kind for objective in self.objective}
        if len(kinds & {"lm", "mlm", "classification"}) > 1:
            problems.append("`objective`: lm, mlm and classification read other inputs each; expected one of them")
        if len(kinds) < len(self.objective):
            problems.append("`objective`: each kind once")
        if "classification" in kinds and self.data.label is None:
            problems.append("`data.label`: the objective classification needs the column that has the class")
        if kinds & {"classification", "embedding"} and self.data.pack:
            problems.append("`data.pack`: each row is one text for this objective; expected false")
        names = [stage.name or f"stage {number}" for number, stage in enumerate(self.stages)]
        if len(set(names)) < len(names):
            problems.append(f"`stages`: each name once; found {', '.join(names)}")
        tapered = [stage for stage in self.stages if stage.taper is not None]
        if len(tapered) > 1:
            problems.append("`stages`: one of them may have a taper; give its sites an order instead")
        if tapered and not self.surgery:
            problems.append("`stages`: there is nothing to taper without a surgery")
        if self.lora is not None and tapered:
            problems.append("`lora`: not with a taper, which trains what it takes away")
        rates = [stage for stage in self.stages if stage.learning_rate is None]
        if rates and "learning_rate" not in self.training:
            problems.append("`stages`: expected a learning_rate in each, or one in `training`")
        problems += self._unknown_words()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _unknown_words(self) -> list[str]:
        """What of the surgery no model could be given."""
        try:
            request = self.request()
        except RefusedError as error:
            return [f"`surgery`: {error}"]
        checks = [partial(kind_of, choice) for choice in request.norms]
        for placement in request.placements:
            checks += [partial(row_of, placement.name), placement.check_layers]
        found = []
        for check in checks:
            try:
                check()
            except RefusedError as error:
                found.append(f"`surgery`: {error}")
        return found

    def request(self) -> Request:
        """The conversions of `surgery` as one. Raises RefusedError where they do not go together."""
        return Request.merged([Request.of(**words) for words in self.surgery])

    def without_folders(self, model: str) -> Recipe:
        """The same with the last names of local paths alone, for what may be shared; `model`: what that is called."""
        data = {name: _last(getattr(self.data, name)) for name in ("source", "held_out_source")}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"path": model}),
                "data": self.data.model_copy(update=data),
                "output": Path(self.output).name,
            }
        )

    @property
    def taper(self) -> Taper | None:
        return next((stage.taper for stage in self.stages if stage.taper is not None), None)

    def to_yaml(self) -> str:
        """All of it, what was left out included."""
        return dump(self.model_dump(mode="json"))

    @classmethod
    def of(cls, source: str | Path | dict[str, Any], overrides: tuple[str, ...] = ()) -> Recipe:
        """A recipe from a file, from one that ships with normswap (by its name), or from a mapping.

        Args:
            overrides: `key.sub=value`, of which the value is YAML; items of lists by number.

        Raises:
            RecipeError: with all that is wrong with it.
        """
        raw = copy.deepcopy(source) if isinstance(source, dict) else read(find(source))
        for override in overrides:
            set_key(raw, override)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            name = "the recipe" if isinstance(source, dict) else str(source)
            raise RecipeError(f"{name}:\n{explain(error, cls)}") from error


def _last(source: str | None) -> str | None:
    """The last name of a local path, a Hub id as it is."""
    local = source is not None and (Path(source).expanduser().exists() or source.startswith((".", "/", "~")))
    return Path(source).name if local else source
