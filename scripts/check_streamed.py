"""Conversions verified with every weight read from disk as it is used, beside the same verified in memory.

    .venv/bin/python scripts/check_streamed.py [TYPE ...]

Every kind of model in scripts/sweep/zoo.json (or the TYPEs given) is saved, converted (`--norm rmsnorm --partial` or,
where that is nothing, `--fold --partial`) and verified twice. Both have to measure the same sites and outputs, to
rounding. Prints one line for each, and at the end how many agree; exits with 1 where any does not.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

REQUESTS = (dict(norm="rmsnorm"), dict(fold=True))
# Rounding of float64 in another order of sums.
TOLERANCE = 1e-9


def main() -> int:
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from sweep import zoo

    disable_progress_bar()
    torch.set_num_threads(1)
    # inputs that a model was not made for may have its code ask for any amount of memory
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    counts: Counter[str] = Counter()
    for model_type in sys.argv[1:] or zoo.model_types():
        with tempfile.TemporaryDirectory() as folder:
            said = tried(model_type, Path(folder))
        counts[said.partition(":")[0]] += 1
        print(f"{model_type:28} {said}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.most_common()))
    return 1 if counts["differs"] or counts["fails"] else 0


def tried(model_type: str, folder: Path) -> str:
    """What came of one model, in words."""
    import normswap
    from normswap.errors import NormswapError
    from normswap.verification import on_disk
    from sweep import zoo

    try:
        zoo.build(model_type).save_pretrained(folder / "source")
    except Exception as error:  # models that no folder holds
        return f"not saved: {type(error).__name__}: {error}"
    for request in REQUESTS:
        try:
            on_disk.IN_MEMORY, on_disk.SMALL = 2**40, 2**15
            whole = normswap.convert(folder / "source", folder / "whole", verify="fast", partial=True, **request)
        except NormswapError as error:
            reason = " ".join(str(error).split())
            continue
        on_disk.IN_MEMORY, on_disk.SMALL = 0, 64
        held, begin = set(), on_disk.read_on_use
        on_disk.read_on_use = lambda model, own, begin=begin, held=held: held.update(own) or begin(model, own)
        try:
            parts = normswap.convert(folder / "source", folder / "parts", verify="fast", partial=True, **request)
        except Exception as error:  # whatever it is, it is what this looks for
            return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            on_disk.read_on_use = begin
        a, b = (done.report.mathematics.comparison for done in (whole, parts))
        same = [site.site for site in a.sites] == [site.site for site in b.sites] and a.unmatched == b.unmatched
        same &= whole.report.tensors_checked >= parts.report.tensors_checked > 0
        close = abs(a.worst_error - b.worst_error) < TOLERANCE or whole.plan.claim != "exact"
        if not (same and close and a.dtype == b.dtype):
            return f"differs: {a.worst_error:.1e} {b.worst_error:.1e} {a.dtype} {b.dtype} {len(a.sites)} {len(b.sites)}"
        if not held:
            return "in memory: not all of it is stored"
        return f"agrees: {len(held)} weights read as they were used, {b.worst_error:.1e}"
    return f"not converted: {reason:.100}"


if __name__ == "__main__":
    sys.exit(main())
