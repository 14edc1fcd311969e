"""A plan: the ordered edits for one conversion, as data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, FailFast, PrivateAttr, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from normswap.checkpoint.documents import brief, check_narrow, read_json
from normswap.checkpoint.saving import save_tensors
from normswap.errors import DestinationError, PlanError
from normswap.norms.kinds import OFFERED
from normswap.planning.edits import (
    FITTED,
    AddNorm,
    AddShift,
    AnyEdit,
    CarryAffine,
    ModuleEdit,
    Read,
    Refit,
    Rewrite,
    SetConfig,
    SwapNorm,
    TensorEdit,
)
from normswap.planning.orthogonal import Rotation
from normswap.planning.request import Request

T = TypeVar("T")
#: of these there may be as many as a model has tensors; the first that does not fit is told
Many = Annotated[tuple[T, ...], FailFast()]
Claim = Literal["exact", "calibrated", "untrained"]


class Refusal(BaseModel):
    """A site that stays as it is, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    reason: str


class MovedBlock(BaseModel):
    """What a move did to one block (several where they are parallel), and what that cost.

    Attributes:
        name: the stream and the block's number in it.
        layer: the number of its layer.
        placement: before and after.
        scale: the constant that stands for the scale of every token that the block reads; 1 until calibrated.
        spread: the coefficient of variation of that scale over tokens.
        error: root mean square of the relative error of the normalised stream after the block, all blocks moved so far.
        unfitted: the same before the block's writers were refitted.
        kl: KL to the original in nats per token if only the block's layer is moved, before anything is refitted; where
            the model gives no logits, the relative error of its output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layer: int | None
    before: str
    after: str
    scale: float = 1.0
    spread: float | None = None
    error: float | None = None
    unfitted: float | None = None
    kl: float | None = None


class FittedNorm(BaseModel):
    """How well a norm that was fitted stands for the one that it replaced, on the data that it was fitted to.

    Attributes:
        site: its path.
        kind: what it is now.
        error: root mean square of its output's error, relative to the deviation of what the old norm gave.
        flat: part of its inputs at which it is nearly flat, None: it is flat nowhere.
        apart: whether some tokens have a scale of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    kind: str
    error: float
    flat: float | None = None
    apart: bool = False


class RotatedStream(BaseModel):
    """A stream that is carried as `R x`: its name, R, and the paths of all norms that act on it.

    Attributes:
        outputs: names of inner values of it that the model gives out besides its result, which are `R x` from now on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rotation: Rotation
    sites: tuple[str, ...]
    outputs: tuple[str, ...] = ()


class Plan(BaseModel):
    """The ordered edits that meet a request on one model. It prints, and round-trips through JSON.

    Tensors that calibration fitted are no part of it: they are saved beside it, in a file of the same name that ends
    in `.safetensors`, so that the plan is carried out without data.

    Attributes:
        architecture: class name of the model the plan was made for; applying it to another is refused.
        model_type: the source configuration's `model_type`.
        claim: what the result promises.
        reasons: why the claim holds, one sentence each.
        converted: paths of the sites the plan changes.
        refused: sites that were asked for and stay (only with `partial`).
        base_output_unchanged: whether the headless model computes the same as before too.
        edits: in order; for one tensor, edits act one after another.
        moved: the blocks whose norms move.
        fitted_norms: the norms that calibration fitted.
        rotated: the streams that are carried in another basis.
        calibrated_on: the text and how many tokens of it, None: on nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    architecture: str
    model_type: str
    request: Request
    claim: Claim
    reasons: Many[str]
    converted: Many[str]
    refused: Many[Refusal] = ()
    base_output_unchanged: bool = True
    edits: Many[AnyEdit]
    moved: Many[MovedBlock] = ()
    fitted_norms: Many[FittedNorm] = ()
    rotated: Many[RotatedStream] = ()
    calibrated_on: str | None = None
    _fitted: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    @field_validator("request")
    @classmethod
    def _of_known_kinds(cls, request: Request) -> Request:
        if odd := [choice.kind for choice in request.norms if choice.kind not in OFFERED]:
            raise ValueError(f"expected kinds of norm among {', '.join(OFFERED)}, found {ascii(odd[0]):.100}")
        return request

    def with_fitted(self, tensors: Mapping[str, torch.Tensor]) -> Plan:
        """The same plan with tensors fitted by calibration, by name.

        Those that edits of the plan ask for are for them; any other is of a parameter, and replaces what it is after.
        """
        asked = self.asks_for()
        edits = (*self.edits, *(Refit(tensor=name) for name in tensors if name not in asked))
        return self.model_copy(update={"edits": edits}).keeping(tensors)

    def keeping(self, tensors: Mapping[str, torch.Tensor]) -> Plan:
        """The same plan with tensors that its edits read by name."""
        plan = self.model_copy()
        plan._fitted = {**self._fitted, **{name: tensor.detach().cpu() for name, tensor in tensors.items()}}
        return plan

    def restated(self, edits: Iterable[AnyEdit], tensors: Mapping[str, torch.Tensor]) -> Plan:
        """The same plan with other edits, and of its fitted tensors and `tensors` those that these ask for."""
        plan = self.model_copy(update={"edits": tuple(edits)}).keeping(tensors)
        asked = plan.asks_for()
        plan._fitted = {name: tensor for name, tensor in plan._fitted.items() if name in asked}
        return plan

    def asks_for(self) -> set[str]:
        """Names of the fitted tensors that edits need."""
        return {name for edit in self.edits if isinstance(edit, TensorEdit) for name in edit.fitted()}

    def lacks(self) -> list[str]:
        """Those of them that are not there, so that the plan cannot be carried out yet."""
        return sorted(self.asks_for() - self._fitted.keys())

    def check_complete(self) -> None:
        """Raises PlanError where the plan lacks what data would tell."""
        if lacking := self.lacks():
            raise PlanError(
                f"the plan lacks {len(lacking)} fitted tensors, {lacking[0]} among them: make it with data "
                f"(--calibrate, or `calibrate=` for a live model), or load it with Plan.load from where it was saved."
            )

    def fitted_likes(self) -> dict[str, torch.Tensor]:
        """Shapes and dtypes of the fitted tensors, by name, as tensors without values."""
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self._fitted.items()}

    def reading(
        self,
        read: Callable[[str], torch.Tensor],
        parts: Callable[[str], Iterable[torch.Tensor]] | None = None,
    ) -> Read:
        """`read`, and `parts` where tensors can be had in parts, with the fitted tensors."""

        def either(name: str) -> torch.Tensor:
            if not name.startswith(FITTED):
                return read(name)
            name = name.removeprefix(FITTED)
            if name not in self._fitted:
                self.check_complete()
            return self._fitted[name].double()

        return Read(either, parts)

    def digest(self) -> str:
        """SHA-256 of the plan and its fitted tensors."""
        found = hashlib.sha256(self.model_dump_json().encode())
        for name, tensor in sorted(self._fitted.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def tensor_edits(self) -> dict[str, list[TensorEdit]]:
        """Edits by tensor, in order."""
        found: dict[str, list[TensorEdit]] = {}
        for edit in self.edits:
            if isinstance(edit, TensorEdit):
                found.setdefault(edit.tensor, []).append(edit)
        return found

    def module_edits(self) -> list[ModuleEdit]:
        return [edit for edit in self.edits if isinstance(edit, ModuleEdit)]

    def moved_norms(self) -> set[str]:
        """Paths of the norms that stand in another place afterwards: those that leave one, and those that enter."""
        found = {edit.module for edit in self.edits if isinstance(edit, AddNorm)}
        # what a norm becomes other than the kind asked for, it becomes because it moves
        kinds = [OFFERED[name] for c in self.request.norms for name in (c.kind, OFFERED[c.kind].exact) if name]
        asked = {form for kind in kinds for replaced in kind.routes for form in kind.forms(replaced)}
        found |= {edit.module for edit in self.edits if isinstance(edit, SwapNorm) and edit.kind not in asked}
        # what writes to a norm that is folded into it now gives what the norm gave
        carrying = {edit.behind for edit in self.edits if isinstance(edit, CarryAffine)}
        found -= {edit.norm.module for edit in self.edits if isinstance(edit, AddShift)} - carrying
        rewrites = [edit for edit in self.edits if isinstance(edit, Rewrite)]
        return found | {f"{edit.module}.{change.name}" for edit in rewrites for change in edit.changes}

    def turned_back(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Per norm on a rotated stream, what turns rows `(.., width)` of its input or output to the original's basis.

        Streams whose fitted matrix is not at hand are left out.
        """

        def read(name: str) -> torch.Tensor:
            return self._fitted[name].double()

        return {
            path: lambda x, rotation=stream.rotation: rotation.turn(x, -1, read, back=True)
            for stream in self.rotated
            if stream.rotation.fitted is None or stream.rotation.fitted in self._fitted
            for path in stream.sites
        }

    def config_edits(self) -> list[SetConfig]:
        return [edit for edit in self.edits if isinstance(edit, SetConfig)]

    def save(self, path: str | Path) -> list[Path]:
        """Write the plan as JSON, fitted tensors beside it. Returns the files.

        Raises DestinationError where that is not possible.
        """
        if self._fitted and _beside(path) == Path(path):
            raise DestinationError(f"the plan cannot be saved as {path}, where its tensors go: name it *.json.")
        try:
            if self._fitted:
                save_tensors(self._fitted, _beside(path))
            Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise DestinationError(f"the plan cannot be saved as {path}: {why}. Name another file.") from error
        return [Path(path), _beside(path)] if self._fitted else [Path(path)]

    @classmethod
    def of(cls, raw: Any) -> Plan:
        """The plan that a JSON document says. Raises ValueError where it is none."""
        if not isinstance(raw, dict) or len(raw) > 64:
            raise ValueError("expected an object with the fields of a plan")
        check_narrow(item for value in raw.values() for item in (value if isinstance(value, list) else [value]))
        return cls.model_validate(raw)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan. Raises PlanError naming every field that does not fit."""
        try:
            plan = cls.of(read_json(Path(path)))
            wanted = plan.asks_for()
            if wanted:
                plan._fitted = load_file(_beside(path))
            if wanted - plan._fitted.keys():
                raise PlanError(f"{_beside(path)} lacks {min(wanted - plan._fitted.keys())}, which {path} needs.")
            return plan
        except SafetensorError as error:
            raise PlanError(f"cannot read {_beside(path)}, the tensors that belong to {path}: {error}") from error
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:8])
            raise PlanError(f"{path} is not a plan written by `normswap plan -o`: {brief(found)}") from error
        except ValueError as error:
            raise PlanError(f"{path} is not a plan written by `normswap plan -o`: {brief(error)}") from error


def _beside(path: str | Path) -> Path:
    """The file of the tensors that belong to a plan."""
    return Path(path).with_suffix(".safetensors")
