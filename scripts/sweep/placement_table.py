"""Records of `place` as a Markdown table, and what they come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sweep.place import RESULTS

Record = dict[str, Any]
#: results that need a person to look
BAD = ("WRONG", "unstable", "crashed")


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """The totals, as plain data: types by result, what was moved in the confirmed ones, and refusals by reason."""
    records = list(records)
    built = [record for record in records if record["status"] != "missing"]
    inspected = [record for record in built if record["status"] == "inspected"]
    confirmed = [record for record in inspected if record["result"] == "confirmed"]
    reasons: Counter[str] = Counter()
    types: dict[str, list[str]] = {}
    for record in inspected:
        for pattern in dict.fromkeys(pattern for _, pattern in record.get("refused", {}).values()):
            reasons[pattern] += 1
            types.setdefault(pattern, []).append(record["type"])
    return {
        "placement": next((record["placement"] for record in inspected), ""),
        "types": len(records),
        "built": len(built),
        "inspected": len(inspected),
        "results": dict(Counter(record["result"] for record in inspected)),
        "whole": sum(record["moved"] == record["asked"] for record in confirmed),
        "asked": sum(record["asked"] for record in confirmed),
        "moved": sum(record["moved"] for record in confirmed),
        "worst error": max((record["error"] for record in confirmed), default=0.0),
        "worst gradient": max((record["gradient_error"] for record in confirmed), default=0.0),
        "gradients": sum(record["checked"] for record in confirmed),
        "reasons": [{"reason": reason, "types": types[reason]} for reason, _ in reasons.most_common()],
        "bad": [
            {"type": record["type"], "result": record["result"], "why": record["why"]}
            for record in inspected
            if record["result"] in BAD
        ]
        + [
            {"type": record["type"], "result": record["status"], "why": record["why"]}
            for record in built
            if record["status"] != "inspected"
        ],
    }


def summary_lines(found: dict[str, Any], reasons: int = 20) -> list[str]:
    """The totals as lines of Markdown."""
    results = {result: found["results"].get(result, 0) for result in RESULTS}
    asked = sum(count for result, count in results.items() if result != "nothing")
    lines = [
        f"Of {found['types']} model types, {found['built']} can be built and {found['inspected']} inspected; {asked} "
        f"of these have a stream that is not post-norm. Moved to `{found['placement']}`:",
        "",
        f"| {' | '.join(results)} |",
        "|---" * len(results) + "|",
        f"| {' | '.join(map(str, results.values()))} |",
        "",
        f"In the confirmed types {found['moved']} of {found['asked']} sums have moved, in {found['whole']} types all "
        f"that there are; the worst error of an output is {found['worst error']:.1e}, "
        f"of {found['gradients']} gradients {found['worst gradient']:.1e}.",
        "",
        "Refused, by reason:",
        "",
    ]
    for top in found["reasons"][:reasons]:
        some = ", ".join(top["types"][:6]) + (", ..." if len(top["types"]) > 6 else "")
        lines.append(f"- {len(top['types'])} types: {top['reason']} ({some})")
    return [*lines, "", *(f"- {bad['result']}: {bad['type']}: {_line(bad['why'])}" for bad in found["bad"])]


def table_lines(records: Iterable[Record]) -> list[str]:
    """One row per type."""
    rows = []
    for record in records:
        result = record.get("result", record["status"])
        if result == "confirmed":
            cells = [str(record["streams"]), f"{record['moved']} of {record['asked']}", f"{record['error']:.0e}"]
        else:
            cells = ["", "", ""]
        whys = [record["why"]] if "why" in record else [why for why, _ in record.get("refused", {}).values()]
        rows.append(
            f"| {record['type']} | {record.get('class', '')} | {result} | {' | '.join(cells)} | "
            f"{'; '.join(_line(why) for why in dict.fromkeys(whys))} |"
        )
    return [
        "| type | class | result | streams moved | sums | error | why not |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]
