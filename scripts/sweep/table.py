"""Records of `examine` as a Markdown table, and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

Record = dict[str, Any]
#: results that need a person to look
BAD = ("WRONG", "unstable", "crashed")

# How the analysis names a stream that more than norms read, or that the model gives out.
_OUTPUT, _READ = "is an output of the model", ("would notice a shift", "is not invariant to shifts")


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """The totals, as plain data.

    A site counts as converted where its conversion measured exact. `pre` are the sites on pre-norm streams: of role
    stream or final, on a stream of which no block ends in a norm. Of the pre-norm sites that are refused, `output` and
    `read` count those whose stream the model gives out as it is, or that something other than a norm of all its
    channels reads; `normed` are all others.
    """
    records = list(records)
    built = [record for record in records if record["status"] != "missing"]
    inspected = [record for record in built if record["status"] == "inspected"]
    asked = list(dict.fromkeys(words for record in inspected for words in record["conversions"]))
    return {
        "types": len(records),
        "built": len(built),
        "inspected": len(inspected),
        "sites": dict(Counter(site["kind"] for record in inspected for site in record["sites"])),
        "audit": {record["type"]: record["audit"] for record in inspected if record["audit"]},
        "conversions": {words: _totals(inspected, words) for words in asked},
        "disk": dict(Counter(record["disk"]["result"] for record in inspected if "disk" in record)),
        "bad": [
            {"type": record["type"], "conversion": words, "result": found["result"], "why": found["why"]}
            for record in inspected
            for words, found in record["conversions"].items()
            if found["result"] in BAD
        ]
        + [
            {"type": record["type"], "conversion": "inspect", "result": record["status"], "why": record["why"]}
            for record in built
            if record["status"] != "inspected"
        ]
        + [
            {"type": record["type"], "conversion": "on disk", "result": found["result"], "why": found.get("why", "")}
            for record in inspected
            if (found := record.get("disk", {"result": ""}))["result"] in BAD
        ],
    }


def _totals(inspected: list[Record], words: str) -> dict[str, Any]:
    totals = Counter()
    results: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    types: dict[str, list[str]] = {}
    error = 0.0
    for record in inspected:
        found = of(record, words)
        if found is None:
            continue
        results[found["result"]] += 1
        exact = found["result"] == "exact"
        error = max(error, found["error"]) if exact else error
        pre = {stream["name"] for stream in record["streams"] if stream["pre"]}
        for site in record["sites"]:
            if not _is_asked(site, words):
                continue
            done = exact and site["path"] in found["converted"] and site["path"] not in found["refused"]
            why, pattern = found.get("refused", {}).get(site["path"], ("", found["result"]))
            groups = ["all"]
            if site["role"] in ("stream", "final") and site["stream"] in pre:
                groups.append("pre")
                if not done and _OUTPUT in why:
                    groups.append("output")
                elif not done and any(reading in why for reading in _READ):
                    groups.append("read")
                else:
                    groups.append("normed")
            groups += ["linear"] if site["linear"] else []
            for group in groups:
                totals[group] += 1
                totals[f"{group} done"] += done
            if not done:
                reasons[pattern] += 1
                types.setdefault(pattern, []).append(record["type"])
    groups = {
        group: {"sites": totals[group], "converted": totals[f"{group} done"]}
        for group in ("all", "pre", "normed", "linear", "output", "read")
    }
    top = [
        {"reason": reason, "sites": count, "types": list(dict.fromkeys(types[reason]))}
        for reason, count in reasons.most_common()
    ]
    return {"results": dict(results), "worst error": error, "groups": groups, "reasons": top}


def of(record: Record, words: str) -> Record | None:
    """The record's conversion; where untying would change nothing, that with ties kept."""
    return record["conversions"].get(words) or record["conversions"].get(words.removesuffix(" --tied untie"))


def _is_asked(site: Record, words: str) -> bool:
    if "--norm" in words and site["kind"] == "layernorm":
        return True
    parts = site["kind"] in ("layernorm", "rmsnorm") and bool(site["gain"] or site["bias"])
    return "--fold" in words and (parts or site["kind"] == "batchnorm")


def summary_lines(found: dict[str, Any], reasons: int = 12) -> list[str]:
    """The totals as lines of Markdown."""
    share = found["inspected"] / max(1, found["built"])
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found["sites"].items()))
    lines = [
        f"Of {found['types']} model types, {found['built']} can be built; inspect succeeds on {found['inspected']} of "
        f"them ({share:.1%}), with {kinds} sites; its audit finds fault with {len(found['audit'])}.",
        "",
        f"| conversion | exact | {' | '.join(BAD)} | worst error | sites | on pre-norm streams | "
        "of these, on streams that norms alone read | with linear readers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for words, totals in found["conversions"].items():
        results = totals["results"]
        cells = [_share(totals["groups"][group]) for group in ("all", "pre", "normed", "linear")]
        counts = " | ".join(str(results.get(result, 0)) for result in ("exact", *BAD))
        lines.append(f"| `{words}` | {counts} | {totals['worst error']:.1e} | {' | '.join(cells)} |")
    if found["disk"]:
        lines += ["", f"On disk: {', '.join(f'{count} {result}' for result, count in found['disk'].items())}."]
    for words, totals in found["conversions"].items():
        groups = totals["groups"]
        lines += [
            "",
            f"Refused by `{words}` (on pre-norm streams, {groups['output']['sites']} sites because the model gives the "
            f"stream out, and {groups['read']['sites']} because something other than a norm reads it):",
            "",
        ]
        for top in totals["reasons"][:reasons]:
            some = ", ".join(top["types"][:4]) + (", ..." if len(top["types"]) > 4 else "")
            lines.append(f"- {top['sites']}: {top['reason']} ({some})")
    lines += ["", *(f"- {b['result']}: {b['type']}, {b['conversion']}: {_line(b['why'])}" for b in found["bad"])]
    lines += [f"- audit: {name}: {'; '.join(faults[:3])}" for name, faults in found["audit"].items()]
    return lines


def _share(group: dict[str, int]) -> str:
    return f"{group['converted']} of {group['sites']} ({group['converted'] / max(1, group['sites']):.1%})"


def table_lines(records: Iterable[Record]) -> list[str]:
    """One row per type, and below it the reasons that the rows number."""
    records = list(records)
    asked = list(dict.fromkeys(words for record in records for words in record.get("conversions", {})))
    numbers: dict[str, int] = {}
    rows = []
    for record in records:
        if record["status"] != "inspected":
            cells = [
                record.get("class", ""),
                f"{record['status']}: {_line(record['why'])}",
                "",
                *("" for _ in asked),
                "",
            ]
        else:
            found = [_cell(record["conversions"].get(words), numbers) for words in asked]
            audit = "; ".join(record["audit"]).replace("|", "/")
            cells = [record["class"], _sites(record), _streams(record), *found, audit]
        rows.append(f"| {record['type']} | {' | '.join(cells)} |")
    titles = ["type", "class", "sites", "streams: width, placement", *(f"`{words}`" for words in asked), "audit"]
    legend = [f"- R{number}: {reason}" for reason, number in numbers.items()]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows, "", *legend]


def _sites(record: Record) -> str:
    counts = Counter((site["kind"], site["role"]) for site in record["sites"])
    return ", ".join(f"{count} {kind} {role}" for (kind, role), count in counts.items())


def _streams(record: Record) -> str:
    return "; ".join(f"{s['name']}: {s['width']}, {'/'.join(s['placements'])}" for s in record["streams"])


def _cell(found: Record | None, numbers: dict[str, int]) -> str:
    """`exact 4 of 6, 1e-15; 2 R3`: sites converted and asked for, the worst error, refusals by number of reason."""
    if found is None or found["result"] == "nothing":
        return ""
    refused = found.get("refused", {})
    converted = [site for site in found.get("converted", []) if site not in refused]
    words = f"{found['result']} {len(converted)} of {len(converted) + len(refused)}"
    if found["result"] == "exact":
        words += f", {found['error']:.0e}"
    if found["result"] in BAD:
        words = f"**{found['result']}**: {_line(found['why'])}"
    counts = Counter(pattern for _, pattern in refused.values())
    return "; ".join([words, *_numbered(counts, numbers)])


def _numbered(counts: Counter[str], numbers: dict[str, int]) -> Iterator[str]:
    for reason, count in counts.items():
        yield f"{count} R{numbers.setdefault(reason, len(numbers) + 1)}"


def _line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]
