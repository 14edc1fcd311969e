"""Adapters of many kinds of model, carried over conversions of many kinds.

    .venv/bin/python scripts/check_adapters.py [TYPE ...]

Of every small random model of the tests, adapters of all linear maps (with nothing else, with all biases, and with
magnitudes) are carried over every exact conversion that the model takes, and measured in float64. Prints one line for
each, and at the end how many were carried, the worst error, and what was refused and why. About 6 minutes on 2 cores;
exits with 1 where an adapter does something else on the converted model.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

CONVERSIONS = {
    "--norm rmsnorm": dict(norm="rmsnorm"),
    "--norm rmsnorm --explicit always": dict(norm="rmsnorm", explicit="always"),
    "--norm rmsnorm --tied untie": dict(norm="rmsnorm", tied="untie"),
    "--fold --tied untie": dict(fold=True, tied="untie"),
    "--norm rmsnorm --fold --tied untie": dict(norm="rmsnorm", fold=True, tied="untie"),
    "--rotate random --tied untie": dict(rotate="random", tied="untie"),
    "--qk-norm rmsnorm": dict(qk_norm="rmsnorm"),
    "--placement post --exact": dict(placement="post", exact=True),
}
ADAPTERS = {"plain": {}, "biases": {"bias": "all"}, "magnitudes": {"use_dora": True}}


def main() -> int:
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from models import TINY

    disable_progress_bar()
    torch.set_num_threads(1)
    carried, refused, failed = [], Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for model_type in sys.argv[1:] or TINY:
            for what, said in tried(model_type, Path(folder) / model_type):
                print(f"{model_type:12} {what}: {said}", flush=True)
                if isinstance(said, float):
                    carried.append(said)
                elif said.startswith("refused"):
                    refused[said.partition(": ")[2]] += 1
                elif not said.startswith("no such conversion"):
                    failed += 1
    print(f"\n{len(carried)} carried, worst error {max(carried, default=0):.1e}; {failed} failed")
    for why, count in refused.most_common():
        print(f"{count:4} refused: {why}")
    return 1 if failed else 0


def tried(model_type: str, root: Path):
    """What was tried, and the error, or why there is none."""
    import normswap
    from lora import adapter_of, saved
    from normswap.errors import NormswapError, RefusedError

    root.mkdir()
    source = saved(root / "source", model_type)
    adapters = {}
    for name, settings in ADAPTERS.items():
        try:
            adapters[name] = adapter_of(source, root / name, target_modules="all-linear", **settings)
        except ValueError as error:  # PEFT has no such adapter of this model
            yield name, f"no such conversion: {error}"
    for conversion, words in CONVERSIONS.items():
        try:
            plan = normswap.plan(source, partial=True, **words)
        except RefusedError as error:
            yield conversion, f"no such conversion: {str(error).splitlines()[0]}"
            continue
        for name, adapter in adapters.items():
            out = root / f"{name} {conversion}"
            try:
                done = normswap.convert(source, out, plan=plan, adapters=[adapter], verify="fast")
                yield f"{name}, {conversion}", done.adapters[0]["measured"]["error"]
            except RefusedError as error:
                yield f"{name}, {conversion}", f"refused: {_why(str(error))}"
            except NormswapError as error:
                yield f"{name}, {conversion}", f"{type(error).__name__}: {error}"


def _why(message: str) -> str:
    """The reason without the names that are in it."""
    words = message.split("Merge it", 1)[0].split("fails in", 1)[0].split()
    return " ".join("..." if any(c in word for c in "._0123456789") and len(word) > 2 else word for word in words)[:160]


if __name__ == "__main__":
    sys.exit(main())
