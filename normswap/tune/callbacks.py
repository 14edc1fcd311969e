"""What happens between the steps of a training: ramps are set, a run that diverges is stopped, somebody is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from normswap.calibration.data import Progress
from normswap.errors import DivergedError
from normswap.tune import checkpoints
from normswap.tune.recipe import Guards
from normswap.tune.schedule import Schedule
from normswap.tune.tapers import set_ramps


class Ramps(TrainerCallback):
    """Sets the ramp of every site before each step; what is evaluated and saved has them as they stand.

    Args:
        model: before it is wrapped.
        sites: paths of the modules with a ramp.
        groups: which turn each takes.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, sites: list[str], groups: list[int]):
        self.model, self.schedule, self.sites, self.groups = model, schedule, sites, groups

    def on_step_begin(self, args, state, control, **kwargs):
        ramps = self.schedule.ramps(state.global_step, self.groups)
        set_ramps(self.model, dict(zip(self.sites, ramps, strict=True)))

    def mean(self, step: int) -> float | None:
        found = self.schedule.ramps(step, self.groups)
        return sum(found) / len(found) if found else None


class Guard(TrainerCallback):
    """Stops a run that diverges, before its weights are saved.

    Args:
        run: the folder that has its checkpoints, for the message.
        schedule: to name the stage in it.
    """

    def __init__(self, guards: Guards, run: Path, schedule: Schedule):
        self.guards, self.run, self.schedule = guards, run, schedule

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise self._diverged(state, f"{name} is {logs[name]} in training")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        past = [entry for entry in state.log_history if "eval_mean" in entry and entry["step"] < state.global_step]
        for name, key, margin in (
            ("held-out loss", "eval_mean", self.guards.loss),
            ("p99.9", "eval_p99.9", self.guards.tail),
        ):
            now = metrics[key]
            best = min((entry[key] for entry in past), default=math.inf)
            if not math.isfinite(now):
                raise self._diverged(state, f"the {name} is {now}")
            if margin is not None and now > best + margin:
                raise self._diverged(
                    state, f"the {name} is {now:.3f}, {now - best:.3f} above its best ({margin:g} allowed)"
                )

    def _diverged(self, state, what: str) -> DivergedError:
        last = max((checkpoints.step(path) for path in self.run.glob("checkpoint-*")), default=None)
        number = self.schedule.spans.index(self.schedule.at(max(state.global_step - 1, 0)))
        lower = f"stages.{number}.learning_rate"
        if last is None:
            kept = f"no checkpoint was saved before. Begin again with a lower {lower} or a warmup"
        else:
            kept = (
                f"the last good checkpoint is {self.run / f'checkpoint-{last}'}. The same command with --resume and a "
                f"lower {lower} goes on from it"
            )
        return DivergedError(
            f"the run diverged: in step {state.global_step} {what}; {kept}; a slower taper may help too. Nothing was "
            f"published. guards.loss and guards.tail say what is allowed."
        )


class Told(TrainerCallback):
    """Hands progress and log lines on.

    Args:
        what: is being trained.
        say: called with each log entry.
        ramps: to say how far the taper is.
    """

    def __init__(
        self, what: str, progress: Progress, say: Callable[[dict[str, Any]], None], schedule: Schedule, ramps: Ramps
    ):
        self.what, self.progress, self.say, self.schedule, self.ramps = what, progress, say, schedule, ramps
        self.minutes, self._since = 0.0, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        # those before it was interrupted
        self.minutes = max((entry.get("minutes", 0.0) for entry in state.log_history), default=0.0)
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            # a loss in the log is the mean since the one before it: with none pending, a resumed run has the same
            control.should_log = True
        if state.is_world_process_zero:
            self.progress(self.what, state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        last = max(state.global_step - 1, 0)
        entry = state.log_history[-1]
        entry["tokens"] = state.global_step * self.schedule.tokens_per_step
        entry["stage"] = self.schedule.at(last).name
        entry["minutes"] = self.minutes + (time.monotonic() - self._since) / 60
        ramp = self.ramps.mean(last) if state.global_step else None
        if ramp is not None:
            entry["ramp"] = ramp
        if state.is_world_process_zero:
            self.say({"run": self.what, **entry})
