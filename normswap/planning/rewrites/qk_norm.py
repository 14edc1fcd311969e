"""Norms on queries and keys where there were none, behind a gate that starts as the identity.

Each head is normalised by itself, before positions are turned into it, as in models that are trained so (Henry et al.,
2020; Dehghani et al., 2023). With `x + gate (N(x) - x)` and a gate of 0 the model is the same function; trained to 1,
the gate leaves the norm. Its gain is fitted on data, so that opening the gate changes least (`calibration.inserted`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from normswap.errors import RefusedError
from normswap.planning.edits import AddNorm, NormOutput
from normswap.planning.rewrites.rewriting import Rewriting
from normswap.understand.heads import Heads, NoHeads, find_heads
from normswap.understand.normmap import NormMap

KINDS = ("rmsnorm", "layernorm")
#: of a norm in a model that has none to take it from
EPS = 1e-6
#: said of a plan that no data were given for
NEUTRAL = "Their gains are 1, as there are no data: opening the gates gives every head one scale, whatever it had."


@dataclass
class Inserted(Rewriting):
    """What the insertion asks for; its sites are the new norms, what is refused is attention."""

    def reasons(self) -> list[str]:
        if not self.sites:
            return []
        what = f"{len(self.sites)} norms on heads of queries and keys stand behind a gate, which is 0: the identity."
        return [what, NEUTRAL]


def insert_qk_norms(normmap: NormMap, kind: str) -> Inserted:
    """Plan a norm of `kind` on every head of queries and keys that has none.

    Raises:
        RefusedError: another kind than `rmsnorm` or `layernorm`; no queries and keys without a norm.
    """
    if kind not in KINDS:
        raise RefusedError(f"--qk-norm {kind} is not offered: expected one of {', '.join(KINDS)}.")
    result = Inserted()
    analyses = [stream.found.analysis for stream in normmap.streams][:1]
    found = [heads for analysis in analyses for heads in find_heads(normmap.trace, analysis.meetings, analysis.base)]
    by_module: dict[str, list[Heads]] = defaultdict(list)
    for heads in found:
        if isinstance(heads, NoHeads):
            result.refused.setdefault(heads.module, heads.reason)
        else:
            by_module[heads.module].append(heads)
    eps = next((site.spec.eps for site in normmap.sites.values() if site.spec.eps), EPS)
    for module, its in by_module.items():
        if why := _obstacle(normmap, module, its):
            result.refused[module] = why
            continue
        runs = []
        for heads in its:
            name = f"{heads.name}_norm"
            result.edits.append(
                AddNorm(
                    module=f"{module}.{name}",
                    kind=f"gated-{kind}",
                    width=heads.width,
                    eps=eps,
                    gain="w",
                    bias=kind == "layernorm",
                    casting="float32",
                )
            )
            result.sites.append(f"{module}.{name}")
            runs.append((name, heads.starts, heads.width))
        result.edits.append(NormOutput(module=module, runs=tuple(runs)))
    if not result.sites:
        why = "; ".join(dict.fromkeys(result.refused.values())) or "no queries and keys were found in it"
        raise RefusedError(f"{normmap.architecture} gets no norm on queries and keys: {why}.")
    return result


def _obstacle(normmap: NormMap, module: str, its: list[Heads]) -> str | None:
    names = [heads.name for heads in its]
    if len(set(names)) < len(names):
        return "it gives queries or keys in two ways"
    cls = normmap.classes[module]
    if taken := [f"{name}_norm" for name in names if hasattr(cls, f"{name}_norm")]:
        return f"its class {cls.__name__} has a {taken[0]} of its own"
    return None
