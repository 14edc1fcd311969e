"""What a training minimises: losses of the model's own task, and distances to the unconverted model.

Each objective gives one number per batch for training. The first of them that measures the task (`lm`, `mlm`,
`classification`; else the first) also gives scores, one for each token or text, by which held-out data are judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normswap.errors import RecipeError
from normswap.tune.recipe import Objective

Batch = Mapping[str, torch.Tensor]
#: objectives that measure the task itself
TASKS = ("lm", "mlm", "classification")
#: those that need the unconverted model
TAUGHT = ("distill", "hidden", "embedding")


@dataclass
class Losses:
    """The objectives of a recipe.

    Attributes:
        objectives: in order.
        teacher: the unconverted model, in eval mode; None where no objective asks for it.
        centred: whether the norms of the streams do not see means, so that hidden states are compared without theirs.
    """

    objectives: Sequence[Objective]
    teacher: nn.Module | None = None
    centred: bool = False

    @property
    def judge(self) -> Objective:
        """The objective that held-out data are judged by."""
        return next((o for o in self.objectives if o.kind in TASKS), self.objectives[0])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, Any]:
        """The weighted sum, a scalar with gradients, and the model's outputs."""
        given = self._run(model, batch)
        taught = self._taught(batch)
        total = sum(o.weight * _mean(*self._scores(o, given, taught, batch)) for o in self.objectives)
        return total, given

    @torch.no_grad()
    def scores(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """How well `model` does, `(rows, n)` in float32, lower is better: nats, or 1 - cosine; nan: there is none.

        A score that is there and no number is infinite.
        """
        judge = self.judge
        taught = self._taught(batch) if judge.kind in TAUGHT else None
        found, there = self._scores(judge, self._run(model, batch), taught, batch)
        found = torch.where(there, found.float().nan_to_num(nan=torch.inf, posinf=torch.inf), torch.nan)
        return found if found.ndim == 2 else found[:, None]

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        hidden = any(o.kind in ("hidden", "embedding") for o in self.objectives)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs, **({"output_hidden_states": True} if hidden else {}))

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Any:
        return None if self.teacher is None else self._run(self.teacher, batch)

    def _scores(self, objective: Objective, given: Any, taught: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one objective, `(rows, n)` or `(rows,)`, and where there is something to score."""
        kind = objective.kind
        if kind == "lm":
            ids, keep = batch["input_ids"], _keep(batch)
            return _cross_entropy(_logits(given)[:, :-1], ids[:, 1:]), keep[:, 1:] & keep[:, :-1]
        if kind == "mlm":
            labels = batch["labels"]
            return _cross_entropy(_logits(given), labels.clamp_min(0)), labels >= 0
        if kind == "classification":
            return _all(_cross_entropy(_logits(given), batch["labels"]))
        if kind == "distill":
            found = _divergence(_logits(given), _logits(taught), objective.temperature)
            return _all(found) if found.ndim == 1 else (found, _keep(batch))
        if kind == "hidden":
            pairs = zip(_states(given), _states(taught), strict=True)
            return torch.stack([self._apart(a, b) for a, b in pairs]).mean(0), _keep(batch)
        keep = _keep(batch)
        return _all(1 - F.cosine_similarity(_pooled(given, keep), _pooled(taught, keep), dim=-1))

    def _apart(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """One minus the cosine of states `(rows, n, width)`: norms see no scale, and some see no mean."""
        a, b = a.float(), b.float()
        if self.centred:
            a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=-1)


def _mean(scores: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return torch.where(there, scores, 0).sum() / there.sum().clamp_min(1)


def _all(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scores, torch.ones_like(scores, dtype=torch.bool)


def _keep(batch: Batch) -> torch.Tensor:
    """Which tokens are no padding, `(rows, n)`."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In nats, of the shape of `labels`."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long(), reduction="none")
    return flat.view(labels.shape)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) in nats along the last axis, both at `temperature`, times its square."""
    p, q = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (teacher, student))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2


def _logits(outputs: Any) -> torch.Tensor:
    found = getattr(outputs, "logits", None)
    if found is None:
        raise RecipeError(
            f"the objective is on logits, and the model gives {', '.join(outputs.keys())}: expected a checkpoint "
            f"with a head, or objectives on hidden states or embeddings."
        )
    return found


def _states(outputs: Any) -> Sequence[torch.Tensor]:
    found = getattr(outputs, "hidden_states", None)
    if not found:
        raise RecipeError(
            "the objective is on hidden states, and the model gives none; expected an encoder or decoder."
        )
    return found[1:]


def _pooled(outputs: Any, keep: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of each text of the last hidden state, `(rows, width)`."""
    states = getattr(outputs, "last_hidden_state", None)
    states = (_states(outputs)[-1] if states is None else states).float()
    weights = keep.unsqueeze(-1).to(states.dtype)
    return (weights * states).sum(1) / weights.sum(1).clamp_min(1)
