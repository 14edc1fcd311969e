"""What a person reads of a plan: the claim and its reasons, the edits with layers folded, and what changes on disk."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normswap.apply.layout import WriteSummary
from normswap.paths import blurred, folded
from normswap.planning.edits import (
    AddShift,
    AnyEdit,
    CarryAffine,
    Centre,
    Change,
    Copy,
    Fill,
    FoldBias,
    FoldGain,
    Frozen,
    GrowBias,
    ModuleEdit,
    Refit,
    Restore,
    Rewrite,
    Rotate,
    Running,
    Scale,
    SetConfig,
    SetScale,
    SwapNorm,
    TensorEdit,
    Unscale,
    Untie,
)
from normswap.planning.plans import Plan
from normswap.report.claims import MEANINGS, STYLES
from normswap.report.moved import moved_table


def plan_view(plan: Plan, disk: WriteSummary | None) -> RenderableType:
    """Everything in a plan, for a terminal. `disk` is None where there are no weights."""
    head = f"{plan.architecture}: {plan.request.words()} at {len(plan.converted)} sites"
    claim = Text(f"claim: {plan.claim}. {MEANINGS[plan.claim]}", style=STYLES[plan.claim])
    parts: list[RenderableType] = [Text(head, style="bold"), claim]
    parts += [_indented(reason) for reason in plan.reasons]
    if plan.refused:
        parts.append(Text(f"{len(plan.refused)} sites stay as they are:", style="yellow"))
        reasons = {refusal.site: refusal.reason for refusal in plan.refused}
        for shown, paths in folded([(path, blurred(why)) for path, why in reasons.items()]):
            parts.append(_indented(f"{shown}: {reasons[paths[0]]}", style="yellow"))
    if not plan.base_output_unchanged:
        parts.append(_indented("The model without its head gives its output before the last norm's gain and bias."))
    if plan.moved:
        parts.append(moved_table(plan))
    parts.append(_edit_table(plan))
    parts.append(Text("no weights found: nothing is known of the files", style="dim") if disk is None else _disk(disk))
    return Group(*parts)


def _indented(text: str, style: str = "") -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, 2))


def _edit_table(plan: Plan) -> Table:
    table = Table(title="edits", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("edit")
    table.add_column("of", overflow="fold")
    table.add_column("with", overflow="fold")
    table.add_column("count", justify="right")
    rows: dict[str, dict[str, AnyEdit]] = {}
    for edit in plan.edits:
        # several edits of one kind may act on one tensor; each counts
        rows.setdefault(edit.edit, {})[
            _target(edit) + " " * sum(_target(edit) == t.strip() for t in rows[edit.edit])
        ] = edit
    for kind, edits in rows.items():
        # layers are one row even where a number of theirs differs: constants do, by calibration
        for shown, paths in folded([(path, _details(edit, "")) for path, edit in edits.items()]):
            numbers = _range([_number(edits[path]) for path in paths])
            table.add_row(kind, shown.strip(), _details(edits[paths[0]], numbers), str(len(paths)))
    return table


def _number(edit: AnyEdit) -> float | None:
    """What an edit multiplies by or fills with, where it is one number."""
    match edit:
        case Fill() | SetScale():
            return edit.value
        case Scale() | Copy() | Running():
            return edit.factor
    return None


def _range(numbers: list[float | None]) -> str:
    known = [n for n in numbers if n is not None]
    ends = list(dict.fromkeys(f"{n:.4g}" for n in (min(known, default=0.0), max(known, default=0.0))))
    return " to ".join(ends)


def _target(edit: AnyEdit) -> str:
    if isinstance(edit, TensorEdit):
        return edit.tensor
    return edit.module if isinstance(edit, ModuleEdit) else edit.key


def _in_runs(runs: int) -> str:
    return f", in {runs} runs" if runs > 1 else ""


def _details(edit: AnyEdit, number: str) -> str:
    """What an edit is done with; tensors of the same layer are named from there. `number` stands for its own."""
    match edit:
        case Centre():
            return f"axis {edit.axis}" + (f", in {edit.groups} groups" if edit.groups > 1 else "")
        case Untie():
            return f"{edit.source} as it is"
        case FoldGain(weight=Frozen() as norm):
            return f"{_statistics(norm, edit.tensor)}, axis {edit.axis}" + _in_runs(edit.runs)
        case FoldGain():
            return f"{_within(edit.weight, edit.tensor)} ({edit.form}), axis {edit.axis}" + _in_runs(edit.runs)
        case FoldBias():
            bias = edit.bias
            of = _statistics(bias, edit.tensor) if isinstance(bias, Frozen) else _within(bias, edit.tensor)
            return f"{of}, by {_within(edit.reader, edit.tensor)}, axis {edit.axis}" + _in_runs(edit.runs)
        case AddShift() | CarryAffine():
            return _statistics(edit.norm, edit.tensor)
        case Fill():
            return number
        case Scale():
            return f"times {number}" + (", as 1 + w" if edit.form == "1 + w" else "")
        case Copy():
            return f"{_within(edit.source, edit.tensor)}, times {number}"
        case Unscale():
            bias = f"plus {_within(edit.bias, edit.tensor)}, " if edit.bias else ""
            return f"{bias}divided by the running gain D times {number}, axis {edit.axis}"
        case Running():
            return f"the running gain D of the norms before it, times {number}"
        case Rotate():
            return f"by R, {edit.rotation.words()}, axis {edit.axis}"
        case Restore():
            return f"what the rest of its input tells of the mean taken out, axis {edit.axis}"
        case Refit():
            return "values fitted in calibration, kept beside the plan"
        case SwapNorm():
            return (
                f"{edit.kind}, gain {edit.gain or 'none'}, {'bias' if edit.bias else 'no bias'}, eps {edit.eps:g}, "
                f"casting {edit.casting}"
            )
        case SetScale():
            return f"{edit.name} = {number}"
        case Rewrite():
            return f"{edit.method}: " + ", ".join(_change(change) for change in edit.changes)
        case GrowBias():
            return f"size {edit.size}"
        case SetConfig():
            return f"= {edit.value}"
    return ""


def _statistics(norm: Frozen, tensor: str) -> str:
    """A batch norm, by the module that holds its statistics."""
    return f"statistics of {_within(norm.module, tensor)}"


def _change(change: Change) -> str:
    """A change of source as a pattern: what stood there, what stands there now."""
    match change.kind:
        case "unwrap":
            return f"self.{change.name}(x) -> x"
        case "wrap":
            return f"x -> self.{change.name}(x)"
        case "scale":
            return f"x -> self.{change.name} * x"
        case "enter":
            return f"{change.argument} -> self.{change.name}({change.argument}) on entry"
    return f"{change.kind} {change.name or ''}".strip()


def _within(name: str, other: str) -> str:
    """`name` from within its layer, where `other` is of the same."""
    parts, others = name.split("."), other.split(".")
    layer = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1) + 1
    return ".".join(parts[layer:]) if parts[:layer] == others[:layer] else name


def _disk(disk: WriteSummary) -> RenderableType:
    facts = disk_facts(disk)
    changes = ", ".join(f"{n} {what}" for what, n in facts["tensors"].items())
    text = (
        f"on disk: {changes}; {_size(facts['bytes_before'])} -> {_size(facts['bytes_after'])}; "
        f"{facts['parameters_added']:,} parameters added, {facts['parameters_removed']:,} removed"
    )
    if disk.untied:
        text += f"; untied: {', '.join(disk.untied)}"
    return Text(text)


def tensors_view(disk: WriteSummary) -> Table:
    """Every tensor of the files, and what happened to it."""
    table = Table(title="tensors", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "tensor", "shape", "dtype", "file"):
        table.add_column(name, overflow="fold")
    table.add_column("size", justify="right")
    for entry in disk.tensors.values():
        dtype = str(entry.dtype).removeprefix("torch.")
        size = _size(entry.bytes_before if entry.what == "removed" else entry.bytes_after)
        table.add_row(entry.what, entry.key, "x".join(map(str, entry.shape)), dtype, entry.shard, size)
    return table


def disk_facts(disk: WriteSummary) -> dict[str, Any]:
    """What changes in the files, as plain data. Bytes and parameters; tensors by what happens to them.

    `bytes_rewritten`: of the tensors that are other ones afterwards; all others are copied byte for byte.
    """
    counts: dict[str, int] = {}
    for tensor in disk.tensors.values():
        counts[tensor.what] = counts.get(tensor.what, 0) + 1
    return {
        "tensors": counts,
        "bytes_before": disk.bytes_before,
        "bytes_after": disk.bytes_after,
        "bytes_rewritten": sum(t.bytes_after for t in disk.tensors.values() if t.what not in ("copied", "removed")),
        "parameters_added": disk.parameters_added,
        "parameters_removed": disk.parameters_removed,
        "untied": list(disk.untied),
    }


def _size(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError
