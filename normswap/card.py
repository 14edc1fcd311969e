"""The model card of a converted checkpoint: what was done, what was measured, how to load it."""

from __future__ import annotations

import re
from pathlib import Path

from normswap.apply.layout import WriteSummary
from normswap.plans import Plan
from normswap.proof import Proof
from normswap.source import Source

_LICENSE = re.compile(r"^license(_name|_link)?:.*$", re.MULTILINE)


def write_card(folder: Path, source: Source, plan: Plan, written: WriteSummary, report: Proof, command: str) -> None:
    """Write `README.md` into `folder`, in the Hub's metadata format, with the source's licence carried over."""
    loader = next(
        (name for name in ("AutoModelForCausalLM",) if plan.architecture.endswith(("CausalLM", "LMHeadModel"))),
        "AutoModel",
    )
    trusted = ", trust_remote_code=True" if plan.module_edits() else ""
    lines = [
        *_metadata(source),
        f"# {folder_title(source)}, {plan.request.words()}",
        "",
        f"Made from `{source.name}` by normswap. Claim: **{plan.claim}**.",
        "",
        *(f"- {reason}" for reason in plan.reasons),
        "",
        "## Measured",
        "",
        *report.markdown(),
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"',
        f"model = {loader}.from_pretrained(folder{trusted})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
    ]
    if plan.module_edits():
        lines += [
            "`modeling_normswap.py` subclasses the stock classes of transformers and needs nothing else; "
            "`normswap.load(folder)` opens the same model without running it.",
            "",
        ]
    lines += ["## Made by", "", "```", command, "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def folder_title(source: Source) -> str:
    return Path(source.name).name or source.name


def _metadata(source: Source) -> list[str]:
    """The block between dashes at the top of a card."""
    lines = ["---", "library_name: transformers", "tags:", "- normswap"]
    if not Path(source.name).exists():
        lines += ["base_model:", f"- {source.name}"]
    card = source.folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace").split("---")
        if len(head) > 2:
            lines += [match.group(0) for match in _LICENSE.finditer(head[1])]
    return [*lines, "---", ""]
