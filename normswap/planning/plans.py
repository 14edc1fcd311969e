"""A plan: the ordered edits for one conversion, as data. It prints, round-trips through JSON and holds no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from normswap.errors import DestinationError, PlanError
from normswap.planning.edits import AnyEdit, ModuleEdit, SetConfig, TensorEdit

#: where means may be subtracted at run time
Explicit = Literal["never", "shared", "always"]
Claim = Literal["exact", "calibrated", "untrained"]


class Placement(BaseModel):
    """A placement, and the layers that get it: `0-3,7`, or None for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layers: str | None = None

    def words(self) -> str:
        return f"--placement {self.name}" + (f" --layers {self.layers}" if self.layers else "")


class Request(BaseModel):
    """What was asked for, in the words of the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: str | None = None
    fold: bool = False
    placements: tuple[Placement, ...] = ()
    tied: Literal["keep", "untie"] = "keep"
    partial: bool = False
    explicit: Explicit = "shared"

    def words(self) -> str:
        """The request as options of the command line."""
        options = [f"--norm {self.norm}" if self.norm else "", "--fold" if self.fold else ""]
        options += [placement.words() for placement in self.placements]
        options += ["--tied untie" if self.tied == "untie" else "", "--partial" if self.partial else ""]
        options.append("" if self.explicit == "shared" else f"--explicit {self.explicit}")
        return " ".join(filter(None, options))


class Refusal(BaseModel):
    """A site that stays as it is, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    reason: str


class Plan(BaseModel):
    """The ordered edits that meet a request on one model.

    Attributes:
        architecture: class name of the model the plan was made for; applying it to another is refused.
        model_type: the source configuration's `model_type`.
        claim: what the result promises.
        reasons: why the claim holds, one sentence each.
        converted: paths of the sites the plan changes.
        refused: sites that were asked for and stay (only with `partial`).
        base_output_unchanged: whether the headless model computes the same as before too.
        edits: in order; for one tensor, edits act one after another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: str
    model_type: str
    request: Request
    claim: Claim
    reasons: tuple[str, ...]
    converted: tuple[str, ...]
    refused: tuple[Refusal, ...] = ()
    base_output_unchanged: bool = True
    edits: tuple[AnyEdit, ...]

    def tensor_edits(self) -> dict[str, list[TensorEdit]]:
        """Edits by tensor, in order."""
        found: dict[str, list[TensorEdit]] = {}
        for edit in self.edits:
            if isinstance(edit, TensorEdit):
                found.setdefault(edit.tensor, []).append(edit)
        return found

    def module_edits(self) -> list[ModuleEdit]:
        return [edit for edit in self.edits if isinstance(edit, ModuleEdit)]

    def config_edits(self) -> list[SetConfig]:
        return [edit for edit in self.edits if isinstance(edit, SetConfig)]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Raises DestinationError where that is not possible."""
        try:
            Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise DestinationError(
                f"the plan cannot be saved as {path}: {error.strerror}. Name another file."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan. Raises PlanError naming every field that does not fit."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:8])
            raise PlanError(f"{path} is not a plan written by `normswap plan -o`: {found}") from error
