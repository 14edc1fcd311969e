"""The model card of a converted checkpoint: what was done, what was measured, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from normswap.adapters.publish import ADAPTERS
from normswap.checkpoint.kept import KEPT
from normswap.checkpoint.publish import README
from normswap.checkpoint.source import Source
from normswap.planning.plans import Plan
from normswap.report.claims import MEANINGS
from normswap.report.findings.words import verdict
from normswap.report.kinds import kind_name
from normswap.report.metadata import metadata
from normswap.report.moved import moved_markdown
from normswap.report.proof import proof_markdown, reports_markdown
from normswap.verification.proof import Proof
from normswap.verification.run import Report

if TYPE_CHECKING:
    from normswap.tune.run import Finetuned


def write_card(folder: Path, source: Source, plan: Plan, report: Proof, command: str, hub: str | None = None) -> None:
    """Write `README.md` into `folder`, in the Hub's metadata format, with the source's licence carried over.

    Args:
        hub: the repository that the folder is for.
    """
    unmeasured = ", **not verified**" if report.mode == "none" else ""
    lines = [
        f"# {source.title}{with_words(plan)}",
        "",
        f"Made from `{source.title}` by normswap. Claim: **{plan.claim}**{unmeasured}. {MEANINGS[plan.claim]}",
        "",
        *_verdict(plan, report),
        *_done(plan),
    ]
    lines += _moved(plan) if plan.moved else []
    lines += ["", "## Measured", "", *proof_markdown(report), *_use(folder, plan, hub)]
    lines += ["## Made by", "", "```", command, "```", ""]
    lines += ["`normswap report path/to/this/folder` shows all that was measured, as a page with drawings.", ""]
    if plan.claim == "exact" and (folder / KEPT).exists():
        lines += [
            "`normswap convert path/to/this/folder path/to/another --undo` gives the source's own class back, with the "
            f"weights as they are now; `{KEPT}` holds what that takes.",
            "",
        ]
    _write(folder, source, lines)


def write_trained_card(folder: Path, source: Source, plan: Plan, report: Report, done: Finetuned, data: str) -> None:
    """Write `README.md` of a fine-tuned model into `folder`: before and after, the curves, the recipe."""
    rows = [
        f"| {name} | {values['mean']:.4f} | {values['p99.9']:.2f} |"
        for name, values in ((label, done.scores.get(key)) for key, label in SCORES.items())
        if values is not None
    ]
    lines = [
        f"# {source.title}{with_words(plan) if plan.edits else ''}, fine-tuned",
        "",
        f"Made from `{source.title}` by normswap, and fine-tuned on {done.tokens} tokens ({data}).",
        "",
        *(["As converted, before training:", ""] if plan.reasons else []),
        *_done(plan),
        *_moved_table(plan),
        "",
        "## Measured",
        "",
        "Held-out data, by the first objective of the recipe (nats, or one minus a cosine):",
        "",
        "| model | mean | p99.9 |",
        "|---|---|---|",
        *rows,
        "",
        "![curves](training.png)",
        "",
        "Beside the source, on other text:",
        "",
        *reports_markdown({"as stored": report}),
        *_use(folder, plan),
        "## Made by",
        "",
        "```",
        "normswap finetune recipe.yaml",
        "```",
        "",
        "with the `recipe.yaml` beside this card, in which all that was left out is filled in.",
        "",
        *_changes(done),
    ]
    _write(folder, source, lines, trained=True)


def _verdict(plan: Plan, proof: Proof) -> list[str]:
    """What was measured, in a sentence."""
    reports = {"mathematics": proof.mathematics, "as stored": proof.stored}
    known = {name: report for name, report in reports.items() if report is not None}
    if not known:
        return []
    told = verdict(plan.claim, known, known.get("as stored") or known["mathematics"])
    return [f"**{told.headline}.** {told.sentence}", ""]


def _done(plan: Plan) -> list[str]:
    """What was done, why it holds, and what was not."""
    lines = [f"- {reason}" for reason in plan.reasons]
    if not plan.base_output_unchanged:
        lines.append("- The model without its head gives its output before the last norm's gain and bias.")
    if plan.refused:
        lines += ["", f"{len(plan.refused)} norms are as they were, or not all that was asked for was done:", ""]
        lines += [f"- `{refusal.site}`: {refusal.reason}" for refusal in plan.refused]
    return lines


def _changes(done: Finetuned) -> list[str]:
    """What was another in the recipe before the run was resumed."""
    rows = [
        f"| `{c.key}` | {c.was} | {c.now} | {', '.join(f'{step} ({run})' for run, step in c.since.items())} |"
        for c in done.changes
    ]
    if not rows:
        return []
    head = [
        "The run was resumed with a changed recipe:",
        "",
        "| key | was | became | behind step |",
        "|---|---|---|---|",
    ]
    return [*head, *rows, ""]


#: what is measured of a fine-tune, and what it is called
SCORES = {
    "source": "the source",
    "start": "converted, before training",
    "healed": "converted and trained",
    "control": "the source, trained as much (control)",
}


def _write(folder: Path, source: Source, lines: list[str], trained: bool = False) -> None:
    text = f"---\n{metadata(source, trained)}\n---\n\n" + "\n".join(lines)
    (folder / README).write_text(text, encoding="utf-8")


def _use(folder: Path, plan: Plan, hub: str | None = None) -> list[str]:
    """How to load the folder."""
    loader = _loader(plan.architecture)
    tokenizer = any(folder.glob("tokenizer*"))
    lines = [
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import {loader}{', AutoTokenizer' if tokenizer else ''}",
        "",
        f'folder = "{hub or "path/to/this/folder"}"',
        f"model = {loading(plan)}",
        *(["tokenizer = AutoTokenizer.from_pretrained(folder)"] if tokenizer else []),
        "```",
        "",
    ]
    if plan.module_edits():
        lines += [
            "`modeling_normswap.py` subclasses the stock classes of transformers and needs nothing else; "
            "`normswap.load(folder)` opens the same model without running it.",
            "",
        ]
    return [*lines, *_adapters(folder)]


def _adapters(folder: Path) -> list[str]:
    """How to load the adapters that lie in the folder."""
    names = sorted(path.parent.name for path in (folder / ADAPTERS).glob("*/adapter_model.safetensors"))
    if not names:
        return []
    lines = [f'model = PeftModel.from_pretrained(model, folder, subfolder="{ADAPTERS}/{name}")' for name in names]
    return [
        "Adapters of the source, carried over to this model; their measurements are in `normswap.json`. One at a time:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        *lines,
        "```",
        "",
    ]


def _moved_table(plan: Plan) -> list[str]:
    return ["", "## Moved norms", "", *moved_markdown(plan)] if plan.moved else []


def _moved(plan: Plan) -> list[str]:
    """What moved, what that cost, and what to do about it."""
    lines = _moved_table(plan)
    if plan.claim == "exact":
        return lines
    left = "What is left of the difference (below, KL in nats per token) heals in a fine-tune."
    lines += ["", f"Nothing in this folder undoes the move; the checkpoint it was made from is unchanged. {left}"]
    return lines


def loading(plan: Plan) -> str:
    """The call of transformers that loads what a plan made."""
    trusted = ", trust_remote_code=True" if plan.module_edits() else ""
    return f"{_loader(plan.architecture)}.from_pretrained(folder{trusted})"


def _loader(architecture: str) -> str:
    """The Auto class that gives the model with its head."""
    task = "CausalLM" if architecture.endswith("LMHeadModel") else architecture.rpartition("For")[2]
    name = f"AutoModelFor{task}"
    return name if architecture != task and hasattr(transformers, name) else "AutoModel"


def with_words(plan: Plan) -> str:
    """What a plan made, in words behind the name of the source: ` with post RMSNorm`."""
    request = plan.request
    kinds = (kind_name(choice.kind).replace("frozen scale", "frozen scales") for choice in request.norms)
    kind = " and ".join(dict.fromkeys(kinds))
    places = " and ".join(dict.fromkeys(placement.name for placement in request.placements))
    parts = [f"{'weightless ' if request.fold else ''}{f'{places} ' if places else ''}{kind or 'norms'}"]
    if not (request.fold or places or kind):
        parts = []
    parts += [f"{kind_name(request.qk_norm)} on queries and keys"] if request.qk_norm else []
    parts += ["its stream in another basis"] if request.rotate else []
    return f" with {' and '.join(parts) or 'norms'}"
