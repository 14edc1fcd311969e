"""Two models side by side on the same inputs: their outputs, and what reaches and leaves each of their norms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import nn

from normswap.errors import VerificationError
from normswap.verification.basis import OtherBasis
from normswap.verification.metrics import Record, TokenComparison, TokenMetrics, compare_logits
from normswap.verification.outputs import (
    Inputs,
    OutputComparison,
    OutputMetrics,
    Outputs,
    check_alike,
    main_output,
    outputs_of,
)
from normswap.verification.sites import Seen, SiteComparison, SiteMetrics, SiteSpec, alike, watched
from normswap.verification.streams import SiteStream, received, side_by_side
from normswap.verification.turns import Turns

Progress = Callable[[int, int], None]

#: The largest relative error of a row that rounding explains, by the coarsest dtype among weights and arithmetic.
#: An exact conversion of a trained 6-layer model measures 2e-15, 8e-7 and (bfloat16) 2e-2; deeper ones round more.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Relative change of logits that a token they cannot see may cause, by another order of sums (expert routing).
_UNCHANGED = 1e-4
_SAME = OtherBasis()


class Comparison(Record):
    """Model B against model A.

    Attributes:
        output_name: which output was compared token by token; `logits` where there are any.
        output: its metrics.
        others: every other floating output, caches excepted.
        sites: metrics of each norm's input and output, in execution order.
        unmatched: norms that ran in one model only, or not alike in both.
        not_run: norms of both that these inputs did not reach.
        moved: norms that stand in another place in one of the two: no site is the same in both, so none is compared.
        streams: what each norm receives in either model, those included that are not compared.
        dtype: what both models computed in.
        tolerance: the relative error above which something counts as different.
        first_divergence: path of the first site that differs in some row; `output` if none does and the output does,
            `output` and its name for another one; else None.
    """

    output_name: str
    output: TokenMetrics
    sites: tuple[SiteMetrics, ...]
    unmatched: tuple[str, ...]
    not_run: tuple[str, ...]
    dtype: str
    tolerance: float
    first_divergence: str | None
    others: tuple[OutputMetrics, ...] = ()
    moved: tuple[str, ...] = ()
    streams: tuple[SiteStream, ...] = ()

    @property
    def worst_error(self) -> float:
        """The largest relative error anywhere: of an output, or at a site that says something."""
        errors = [
            error for site in self.sites if site.says_something for error in (site.error_max, site.output_error_max)
        ]
        errors += [other.error_max for other in self.others]
        return max(errors, default=0.0) if self.output.error is None else max([*errors, self.output.error.max])


@torch.no_grad()
def compare_models(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Sequence[torch.Tensor | Inputs],
    sites_a: Sequence[SiteSpec] = (),
    sites_b: Sequence[SiteSpec] = (),
    *,
    moved: Collection[str] = (),
    basis: OtherBasis = _SAME,
    lift: bool = True,
    tolerance: float | None = None,
    decode: Callable[[list[int]], str] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on every batch and measure how far B is from A.

    The models run in turns, from norm to norm. Memory holds one batch's outputs, and what one norm got and gave; of
    earlier batches, a few numbers per token.

    Args:
        model_a, model_b: in eval mode, of one dtype.
        batches: `input_ids` of shape `(batch, length)`, or keyword arguments of `forward`.
        sites_a, sites_b: each model's norms as `(path, NormSpec)`. Sites at one path are compared; what
            stands in B where A has a norm, and behaves as none, is compared as if it were that norm.
        moved: paths that are not compared, as the norm there stands in another place in one of the two.
        basis: what B carries in another basis than A.
        lift: in float64 models, make inner float32 casts float64 too (see `LiftFloat32`).
        tolerance: relative error that still counts as the same; by default that of the dtype in `TOLERANCES`.
        decode: ids -> text, to show the worst tokens.
        progress: called with (batches done, batches).

    Raises:
        ObserveError: a model fails on a batch.
        VerificationError: the models cannot be compared: training mode, different dtypes or output shapes, no finite
            output.
    """
    dtype = _common_dtype(model_a, model_b)
    lifted = lift and dtype == torch.float64
    outputs, others, sites = None, OutputComparison(), SiteComparison(basis.sites)
    left_out = tuple(dict.fromkeys(path for path, _ in (*sites_a, *sites_b) if path in moved))
    # B's are looked at where A has a norm and B what is none, too
    streams = (
        received(model_a, sites_a),
        received(model_b, [*sites_b, *(s for s in sites_a if s[0] not in dict(sites_b))]),
    )
    sites_a, sites_b = ([(path, spec) for path, spec in own if path not in moved] for own in (sites_a, sites_b))
    sites_a, sites_b = alike(sites_a, sites_b)
    turns = Turns(tuple({p.device for model in (model_a, model_b) for p in model.parameters() if p.is_cuda}))

    def told(of: Literal["a", "b"]) -> Callable[[str, Seen], None]:
        def take(path: str, seen: Seen) -> None:
            if turns.current == "ab".index(of):  # A and B may be one and the same model
                sites.add(of, path, seen)
                turns.give()

        return take

    def run(model: nn.Module, inputs: Inputs, own: Sequence[SiteSpec], expected, of: Literal["a", "b"]) -> Outputs:
        with watched(model, own, expected, told(of)):
            return outputs_of(model, inputs, lifted, of.upper())

    with streams[0] as streams_a, streams[1] as streams_b:
        for done, batch in enumerate(batches):
            inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
            all_a, all_b = turns.run(
                lambda: run(model_a, inputs, sites_a, (), "a"),  # noqa: B023 (both have run when this returns)
                lambda: run(model_b, inputs, sites_b, sites_a, "b"),  # noqa: B023
            )
            sites.end_batch()
            check_alike(all_a, all_b)
            name = main_output(all_a)
            a, b = torch.atleast_2d(all_a[name]), torch.atleast_2d(all_b[name])
            others.add(all_a, all_b, {name, *basis.outputs})
            ids = _ids_of_rows(inputs, a)
            if outputs is None:
                outputs = TokenComparison(distributions=name == "logits", decode=decode)
                streams_a.paused = True  # what it runs to find out is of no batch
                causal = ids is not None and name == "logits" and _is_causal(model_a, inputs, a, lifted)
                streams_a.paused = False
            outputs.add(a, b.to(a.device), _next_ids(ids).to(a.device) if causal else None, ids)
            if progress:
                progress(done + 1, len(batches))
    if outputs is None:
        raise VerificationError("there is nothing to compare on: expected at least one batch, found none.")
    metrics, measured = outputs.metrics(), sites.metrics()
    if metrics.rows == 0 and metrics.mismatched == 0:
        raise VerificationError(
            f"no row of the output ({name}) is finite in either model, so nothing can be said. "
            f"Run in a wider dtype, or on other inputs."
        )
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    rest = others.metrics()
    unmatched = sites.unmatched()
    reached = {site.site for site in measured} | set(unmatched)
    return Comparison(
        output_name=name,
        output=metrics,
        sites=measured,
        unmatched=unmatched,
        not_run=tuple(path for path, _ in sites_a if path not in reached),
        dtype=str(dtype).removeprefix("torch."),
        tolerance=tolerance,
        first_divergence=_first_divergence(measured, metrics, rest, tolerance),
        others=rest,
        moved=left_out,
        streams=side_by_side(streams_a, streams_b),
    )


def _first_divergence(
    sites: Sequence[SiteMetrics], output: TokenMetrics, others: Sequence[OutputMetrics], tolerance: float
) -> str | None:
    for site in sites:
        if site.mismatched or (site.says_something and max(site.error_max, site.output_error_max) > tolerance):
            return site.site
    if output.mismatched or (output.error is not None and output.error.max > tolerance):
        return "output"
    differing = (other.name for other in others if other.mismatched or other.error_max > tolerance)
    return next((f"output {name}" for name in differing), None)


def _common_dtype(model_a: nn.Module, model_b: nn.Module) -> torch.dtype:
    found = []
    for name, model in (("A", model_a), ("B", model_b)):
        if model.training:
            raise VerificationError(
                f"model {name} is in training mode, where dropout makes every run differ; call .eval()."
            )
        found.append(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    if found[0] != found[1]:
        raise VerificationError(f"expected both models in one dtype, found {found[0]} and {found[1]}; convert one.")
    return found[0]


def _ids_of_rows(inputs: Inputs, output: torch.Tensor) -> torch.Tensor | None:
    """The ids, `(batch, length)`, that the rows of the output, `(batch, length, width)`, belong to; None: to none."""
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return ids if ids is not None and output.ndim == 3 and output.shape[:2] == ids.shape else None


def _next_ids(ids: torch.Tensor) -> torch.Tensor:
    """What a causal model is to predict at each position; -100 at the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)


def _is_causal(model: nn.Module, inputs: Inputs, logits: torch.Tensor, lifted: bool) -> bool:
    """Whether earlier logits stay when the last token changes: only then is the next token theirs to predict."""
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs[name].clone()
    if ids.shape[1] < 2 or int(ids.max()) >= logits.shape[-1]:
        return False
    ids[:, -1] = torch.where(ids[:, -1] == 1, 2, 1)
    changed = outputs_of(model, {**inputs, name: ids}, lifted, "A")["logits"]
    error = compare_logits(logits[:, :-1], changed[:, :-1]).error
    return error is not None and error.max < _UNCHANGED
