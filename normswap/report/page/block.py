"""The residual steps of a layer as a drawing: the stream runs down on the left, each branch beside it, norms in slots.

    x' = N_out( a x + b N_branch( F( N_in(x) ) ) )

An empty slot is dashed, so that all places where a norm can stand are seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from normswap.report.findings.model import Layers, SlotNorm, Step
from normswap.report.kinds import kind_name
from normswap.report.page.svg import Canvas, shortened

_WIDTH, _STREAM, _BRANCH = 236, 54, 164
_BOX, _GAP, _TOP = 132, 12, 22
_NAME = 23


def layer_drawing(layers: Layers, others: Layers | None) -> Markup:
    """One layer. What is not in the same slot of `others`, the same layer of the other model, is marked as changed."""
    counterparts: Sequence[Step | None] = others.steps if others is not None else ()
    heights = [_height(step) for step in layers.steps]
    shown = ", ".join(f"{step.name}: {step.placement}" for step in layers.steps)
    canvas = Canvas(_WIDTH, _TOP + sum(heights) + 24, f"{layers.shown}: {shown}")
    y: float = _TOP
    canvas.text(_STREAM, 12, "x", "flow-name", "middle")
    canvas.line(_STREAM, 16, _STREAM, _TOP, "stream")
    for number, step in enumerate(layers.steps):
        other = counterparts[number] if number < len(counterparts) else None
        y = _draw(canvas, y, step, other, compared=others is not None)
    canvas.line(_STREAM, y, _STREAM, y + 8, "stream")
    canvas.path([(_STREAM - 4, y + 6), (_STREAM + 4, y + 6), (_STREAM, y + 13)], "arrow", closed=True)
    canvas.text(_STREAM, y + 24, "x'", "flow-name", "middle")
    return canvas.render()


def _slots(step: Step) -> tuple[int, int, int]:
    """Heights of N_in, F and N_branch."""
    inside = 12 * len({norm.kind for norm in step.inside})
    return _slot_height(step.n_in), 30 + inside, _slot_height(step.n_branch)


def _slot_height(norms: Sequence[SlotNorm]) -> int:
    return 20 if not norms else 20 + 12 * min(len(norms), 3)


def _height(step: Step) -> float:
    return 10 + sum(_slots(step)) + 3 * _GAP + 26 + _slot_height(step.n_out) + _GAP


def _draw(canvas: Canvas, top: float, step: Step, other: Step | None, compared: bool) -> float:
    """One step; returns where the next begins."""
    heights = _slots(step)
    sum_at = top + 10 + sum(heights) + 3 * _GAP + 8
    left = _BRANCH - _BOX / 2
    # the branch: out of the stream, through its slots, back into the sum
    canvas.path([(_STREAM, top + 4), (_BRANCH, top + 4), (_BRANCH, sum_at), (_STREAM, sum_at)], "wire")
    canvas.line(_STREAM, top, _STREAM, sum_at, "stream")
    y = top + 10
    for height, slot in zip(heights, ("n_in", "", "n_branch"), strict=True):
        if slot:
            _slot(canvas, left, y, _BOX, height, slot, step, other, compared)
        else:
            _function(canvas, left, y, height, step, other, compared)
        y += height + _GAP
    _factor(canvas, (top + sum_at) / 2, step, other, compared)
    if step.branch != 1:
        canvas.text((_STREAM + left) / 2 + 6, sum_at - 5, f"\u00d7 {step.branch:.4g}", "factor", "middle")
    canvas.circle(_STREAM, sum_at, 9, "sum")
    canvas.text(_STREAM, sum_at + 4.5, "+", "plus", "middle")
    height = _slot_height(step.n_out)
    y = sum_at + 9 + _GAP
    canvas.line(_STREAM, sum_at + 9, _STREAM, y + height + 5, "stream")
    _slot(canvas, 2, y, 2 * (_STREAM - 2), height, "n_out", step, other, compared)
    return y + height + 5


#: slot -> its name in the formula
_TITLES = {"n_in": "N_in", "n_branch": "N_branch", "n_out": "N_out"}


def _slot(canvas: Canvas, x, y, width, height, slot: str, step: Step, other: Step | None, compared: bool) -> None:
    norms: tuple[SlotNorm, ...] = getattr(step, slot)
    before = _forms(getattr(other, slot)) if other is not None else []
    changed = " changed" if compared and _forms(norms) != before else ""
    middle = x + width / 2
    if not norms:
        canvas.rect(x, y, width, height, f"empty{changed}", 6)
        canvas.text(middle, y + height / 2 + 3.5, f"{_TITLES[slot]}: none", "slot-name", "middle")
        return
    plain = "bare " if all(norm.weightless for norm in norms) else ""
    kinds = " + ".join(dict.fromkeys(f"{plain}{kind_name(norm.kind)}" for norm in norms))
    names = ", ".join(norm.name for norm in norms)
    canvas.rect(x, y, width, height, f"norm{changed}", 6, f"{_TITLES[slot]}: {kinds}, {names}")
    kinds = kinds if len(norms) == 1 else f"{len(norms)} \u00d7 {kinds}" if "+" not in kinds else kinds
    canvas.text(middle, y + 14, shortened(kinds, int(width / 7)), "kind", "middle")
    for line, norm in enumerate(norms[:3]):
        words = norm.name if line < 2 or len(norms) == 3 else f"and {len(norms) - 2} more"
        canvas.text(middle, y + 26 + 12 * line, shortened(words, int(width / 5.6)), "path", "middle")


def _forms(norms: Sequence[SlotNorm]) -> list[tuple[str, bool, float]]:
    return [(norm.kind, norm.weightless, norm.eps) for norm in norms]


def _function(canvas: Canvas, left, y, height, step: Step, other: Step | None, compared: bool) -> None:
    same = not compared or (other is not None and _forms(step.inside) == _forms(other.inside))
    canvas.rect(left, y, _BOX, height, "function" if same else "function changed", 6, f"F: {step.name}")
    canvas.text(_BRANCH, y + 19, shortened(step.name, 20), "kind", "middle")
    for line, kind in enumerate(dict.fromkeys(norm.kind for norm in step.inside)):
        count = sum(norm.kind == kind for norm in step.inside)
        words = f"within: {count} {kind_name(kind)}"
        canvas.text(_BRANCH, y + 31 + 12 * line, shortened(words, _NAME), "path", "middle")


def _factor(canvas: Canvas, y: float, step: Step, other: Step | None, compared: bool) -> None:
    """What the skip is multiplied by, where that is not 1."""
    if step.skip == 1 and not step.scaled:
        return
    same = other is not None and (other.skip, other.scaled) == (step.skip, step.scaled)
    canvas.rect(_STREAM - 24, y - 10, 48, 20, "norm" if same or not compared else "norm changed", 10)
    words = "\u00d7 a" if step.scaled and step.skip == 1 else f"\u00d7 {step.skip:.3g}"
    canvas.text(_STREAM, y + 4, words, "factor", "middle")
