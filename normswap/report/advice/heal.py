"""How a conversion that is not exact is brought nearer to its original."""

from __future__ import annotations

from normswap.report.findings.healing import recipe_for
from normswap.report.findings.model import Findings


def heal(found: Findings) -> str:
    """What to do, in words: the recipe that heals it, or what helps without one."""
    name = recipe_for(found.plan) if found.plan is not None else None
    if name is None:
        return (
            "fine-tune it (`normswap recipe list`), or calibrate on more text of yours (`--text FILE --tokens 32768`)."
        )
    return (
        f"`normswap finetune {name} model=SOURCE output=HEALED data.source=corpus.txt`. More calibration helps too: "
        f"`--text FILE --tokens 32768`."
    )
