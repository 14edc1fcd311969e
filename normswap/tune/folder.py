"""The folder of a run that has not ended: its recipe, plans and checkpoints. A kill leaves nothing half written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normswap.checkpoint.lock import Lock
from normswap.errors import RecipeError
from normswap.planning.plans import Plan
from normswap.tune import checkpoints
from normswap.tune.amend import Change, differences, refused
from normswap.tune.recipe import Recipe
from normswap.tune.surgery import Surgery

#: behind the name of the output
RUN = ".training"
_STATE, _PLANS, _LOCK = "run.json", "plans", "lock"
#: which backend was chosen for which call of a kernel: a resumed run, and every process, has the same
CHOSEN = "kernels.json"


def path_of(recipe: Recipe) -> Path:
    return Path(f"{recipe.output.rstrip('/')}{RUN}")


def control_of(run: Path) -> Path:
    """The folder of the control's run."""
    return run / "control"


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Make the folder and keep other runs off it, until the block or the process ends. Raises RecipeError."""
    run.mkdir(parents=True, exist_ok=True)
    lock = Lock(run / _LOCK)
    if not lock.acquire():
        raise RecipeError(f"{run}: another process is training there. Wait for it to end, or give another output.")
    try:
        yield
    finally:
        lock.release()
        if not any(run.iterdir()):
            run.rmdir()


def begin(recipe: Recipe, size: Mapping[str, Any], resume: bool, restart: bool) -> list[Change]:
    """Begin a run, or go on with the one that is there. Returns what has changed in that since it began.

    Args:
        size: what has to be as it was, beside the recipe: how many rows a step has, say.

    Raises:
        RecipeError: a run is there that is not to be touched, or none to resume, or one of another recipe.
    """
    run = path_of(recipe)
    state = run / _STATE
    now = {"recipe": recipe.model_dump(mode="json"), "size": dict(size)}
    if not resume:
        if state.is_file() and not restart:
            raise RecipeError(f"{run} has a run that did not end: --resume goes on with it, --restart throws it away.")
        clear(run, logs=restart)
        _write(state, now | {"changes": []})
        return []
    if not state.is_file():
        raise RecipeError(f"{run} has no run to resume. Leave --resume out to begin one.")
    then = json.loads(state.read_text(encoding="utf-8"))
    found = differences(then["recipe"], now["recipe"])
    if other := refused(found):
        raise RecipeError(
            f"{run} is a run of another recipe, in which {_said(other)}. Resume it with its own, or give --restart to "
            f"throw it away. From where it is, its learning rates and guards may change."
        )
    if other := differences(then["size"], now["size"]):
        raise RecipeError(
            f"{run} is a run in which {_said(other)}. A step has as many rows as training.per_device_train_batch_size "
            f"times training.gradient_accumulation_steps times the number of processes: start as many processes as "
            f"before, or change the other two so that the product stays."
        )
    since = {"healed": _step(run), "control": _step(control_of(run))}
    since = since if recipe.control else {"healed": since["healed"]}
    changes = [Change(**change) for change in then["changes"]]
    changes += [change.model_copy(update={"since": since}) for change in found]
    _write(state, now | {"changes": [change.model_dump() for change in changes]})
    return changes


def save_plans(run: Path, surgery: Surgery) -> None:
    """All of them, or none."""
    made = run / f"{_PLANS}.partial"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name in ("target", "exact"):
        if getattr(surgery, name) is not None:
            getattr(surgery, name).save(made / f"{name}.json")
    os.rename(made, run / _PLANS)


def load_plans(run: Path, tapers: bool) -> Surgery | None:
    """What `save_plans` has saved; None: nothing."""
    folder = run / _PLANS
    if not folder.is_dir():
        return None
    exact = folder / "exact.json"
    return Surgery(Plan.load(folder / "target.json"), Plan.load(exact) if exact.is_file() else None, tapers)


def clear(run: Path, logs: bool = False) -> None:
    """Take away what a run needs to be resumed; `logs` that other tools wrote stay, unless they are to go too."""
    for folder in (control_of(run), run):
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            if logs and path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_dir() and (path.name in (_PLANS, checkpoints.PARTIAL) or path.name.startswith("checkpoint-")):
                shutil.rmtree(path)
        for name in (_STATE, CHOSEN):
            (folder / name).unlink(missing_ok=True)
        if folder != run and not any(folder.iterdir()):
            folder.rmdir()


def forget(run: Path) -> None:
    """Clear a run that ended with an error before it had a checkpoint: there is nothing to go on from."""
    if not any(path for folder in (run, control_of(run)) for path in folder.glob("checkpoint-*")):
        clear(run)


def _step(run: Path) -> int:
    found = checkpoints.last(run)
    return checkpoints.step(found) if found else 0


def _said(changes: list[Change]) -> str:
    more = f" ({len(changes) - 3} more differ)" if len(changes) > 3 else ""
    return "; ".join(f"{c.key} is {_word(c.was)} and not {_word(c.now)}" for c in changes[:3]) + more


def _word(value: Any) -> str:
    return "left out" if value is None else str(value)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    made = path.with_name(f"{path.name}.partial")
    made.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(made, path)
