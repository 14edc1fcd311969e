"""Records of `of_kind` as a Markdown table, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sweep.table import BAD

Record = dict[str, Any]


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """The totals, as plain data; a site counts as converted where its conversion measured exact."""
    records = list(records)
    built = [record for record in records if record["status"] != "missing"]
    having = [record for record in built if record["status"] == "inspected"]
    asked = list(dict.fromkeys(words for record in having for words in record["conversions"]))
    return {
        "types": len(records),
        "built": len(built),
        "kind": next((record["kind"] for record in having), ""),
        "having": len(having),
        "sites": sum(len(record["sites"]) for record in having),
        "conversions": {words: _totals(having, words) for words in asked},
        "bad": [
            {"type": record["type"], "conversion": words, "result": found["result"], "why": found["why"]}
            for record in having
            for words, found in record["conversions"].items()
            if found["result"] in BAD
        ]
        + [
            {"type": record["type"], "conversion": "inspect", "result": record["status"], "why": record["why"]}
            for record in built
            if record["status"] in ("refused", "crashed")
        ],
    }


def _totals(having: list[Record], words: str) -> dict[str, Any]:
    found = {record["type"]: record["conversions"][words] for record in having}
    exact = {name: each for name, each in found.items() if each["result"] == "exact"}
    reasons: dict[str, list[str]] = {}
    for name, each in found.items():
        for _, pattern in each["refused"].values():
            reasons.setdefault(pattern, []).append(name)
    return {
        "exact": len(exact),
        "whole": sum(not each["refused"] for each in exact.values()),
        "converted": sum(len(each["converted"]) for each in exact.values()),
        "worst error": max((each["error"] for each in exact.values()), default=0.0),
        "reasons": [
            {"reason": reason, "sites": len(names), "types": list(dict.fromkeys(names))}
            for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))
        ],
    }


def summary_lines(found: dict[str, Any]) -> list[str]:
    """The totals as lines of Markdown."""
    lines = [
        f"Of {found['types']} model types, {found['built']} can be built; {found['having']} of these have a "
        f"{found['kind']}, {found['sites']} in all.",
        "",
        "| conversion | sites | types with every site | exact | worst error |",
        "|---|---|---|---|---|",
    ]
    for words, totals in found["conversions"].items():
        counts = (
            f"{totals['converted']} of {found['sites']} | {totals['whole']} of {found['having']} | {totals['exact']}"
        )
        lines.append(f"| `{words}` | {counts} | {totals['worst error']:.1e} |")
    for words, totals in found["conversions"].items():
        for top in totals["reasons"]:
            lines += ["", f"Refused by `{words}`, at {top['sites']} sites ({', '.join(top['types'])}): {top['reason']}"]
    return [*lines, "", *(f"- {b['result']}: {b['type']}, {b['conversion']}: {_line(b['why'])}" for b in found["bad"])]


def table_lines(records: Iterable[Record]) -> list[str]:
    """One row per type that has such a norm."""
    records = [record for record in records if record["status"] == "inspected"]
    asked = list(dict.fromkeys(words for record in records for words in record["conversions"]))
    rows = []
    for record in records:
        cells = [_cell(record["conversions"][words]) for words in asked]
        whys = [why for found in record["conversions"].values() for why, _ in found["refused"].values()]
        cells.append("; ".join(_line(why) for why in dict.fromkeys(whys)))
        rows.append(f"| {record['type']} | {record['class']} | {len(record['sites'])} | {' | '.join(cells)} |")
    titles = ["type", "class", "sites", *(f"`{words}`" for words in asked), "why not"]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows]


def _cell(found: Record) -> str:
    if found["result"] in BAD:
        return f"**{found['result']}**: {_line(found['why'])}"
    counts = f"{len(found['converted'])} of {len(found['converted']) + len(found['refused'])}"
    return counts + (f", {found['error']:.0e}" if found["result"] == "exact" else "")


def _line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]
