"""The transformers Trainer, with a recipe's losses and stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from normswap.checkpoint.saving import save_tensors
from normswap.errors import RecipeError
from normswap.tune import checkpoints
from normswap.tune.objectives import Losses
from normswap.tune.passes import Passes
from normswap.tune.processes import on_main, shard_on_cpu
from normswap.tune.schedule import Schedule

WEIGHTS = "model.safetensors"


class StagedTrainer(Trainer):
    """Trains in stages with one optimizer: a parameter that a stage does not train has no gradient in it.

    Args:
        rows: of the training part; they are taken in passes, to the last step.
        losses: what is minimised, and how held-out data are judged.
        schedule: the stages.
        trained: by name of each stage, the parameters that it trains.
        More are those of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        rows: Any,
        losses: Losses,
        schedule: Schedule,
        trained: Mapping[str, set[str]],
        **kwargs: Any,
    ):
        self.losses, self.schedule, self.trained = losses, schedule, trained
        # where a checkpoint is put while it is written
        self._written: Path | None = None
        taken = schedule.steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        passes = Passes(rows, taken, args.seed if args.data_seed is None else args.data_seed)
        kwargs["compute_metrics"] = lambda found: judged(found.predictions)
        super().__init__(args=args, train_dataset=passes, **kwargs)
        # our losses are means over a batch: the Trainer divides by the number of batches in a step
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise RecipeError("training: fsdp_config.version is 1, which torch has given up; expected 2.")
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or blocks(self.model)
        self.remove_callback(PrinterCallback)  # it prints to stdout, which is for results

    def result(self, spare: nn.Module | None) -> nn.Module:
        """The model with its trained weights, on the CPU.

        Args:
            spare: of the same structure, which gets the weights where those of the model are in parts (FSDP); in the
                main process alone.
        """
        if spare is None:
            return self.accelerator.unwrap_model(self.model).to("cpu")
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_world_process_zero():
            _check_loaded(spare, spare.load_state_dict(state, strict=False))
        return spare

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env(
            "ACCELERATE_USE_FSDP"
        ):
            shard_on_cpu(self.accelerator, FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {})))
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = self.losses.loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if idle := self._idle():
            for name, parameter in self._named(model):
                if name in idle:
                    parameter.grad = None  # before gradients are clipped, so that they count for nothing
        return loss

    def _idle(self) -> set[str]:
        """Parameters that some stage trains, and this one does not."""
        now = self.trained[self.schedule.at(self.state.global_step).name]
        return set().union(*self.trained.values()) - now

    def _named(self, model: nn.Module):
        """Parameters by the names that they have in the model, whatever it is wrapped in."""
        for name, parameter in model.named_parameters():
            parts = [p for p in name.split(".") if p not in ("_checkpoint_wrapped_module", "_orig_mod")]
            yield ".".join(parts[1:] if parts[0] == "module" else parts), parameter

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            # relative to what the optimizer was made with
            base = self.args.learning_rate
            self.lr_scheduler = LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: self.schedule.at(step).rate(step) / base,
            )
        return self.lr_scheduler

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.losses.scores(model, inputs)
        return scores.nanmean().detach(), scores, scores

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # FSDP asks for a state of all that has gradients, and what no stage has trained yet has none
        begun = set().union(*(self.trained[s.name] for s in self.schedule.spans if s.start < self.state.global_step))
        ever = set().union(*self.trained.values())
        waiting = [p for name, p in self._named(self.model) if name in ever - begun]
        for parameter in waiting:
            parameter.requires_grad_(False)
        super()._load_optimizer_and_scheduler(checkpoint)
        for parameter in waiting:
            parameter.requires_grad_(True)
        if checkpoint is not None:  # the rates are the recipe's, which may have others than when it was saved
            groups = self.optimizer.param_groups
            rate = self.schedule.at(self.state.global_step).rate(self.state.global_step)
            for group in groups:
                group["initial_lr"], group["lr"] = self.args.learning_rate, rate
            self.lr_scheduler.base_lrs = [self.args.learning_rate] * len(groups)
            self.lr_scheduler._last_lr = [rate] * len(groups)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._written is None else str(self._written)

    def _save_checkpoint(self, model, trial):
        run = Path(self.args.output_dir)
        self._written = run / checkpoints.PARTIAL
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._written = None
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        on_main(lambda: checkpoints.keep(run, name, self.args.save_total_limit))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # as the model has them: `save_pretrained` renames and regroups some models' tensors, and a checkpoint of a
        # training is loaded by `load_state_dict`
        if not self.args.should_save or self.is_fsdp_enabled:  # FSDP has a file of its own
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        seen: set[int] = set()
        alone = {}
        for name, tensor in state.items():
            if tensor.data_ptr() not in seen or not tensor.numel():
                alone[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())
        save_tensors(alone, folder / WEIGHTS, metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        _check_loaded(self.model, load_result)


def _check_loaded(model: nn.Module, found: Any) -> None:
    """Raises where a state had not all of a model; of tied tensors one is enough."""
    tied = {name for group in tied_names(model) for name in group}
    missing = [name for name in found.missing_keys if name not in tied]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"the checkpoint is of another model: {[*missing, *found.unexpected_keys][0]} is not in both."
        )


def blocks(model: nn.Module) -> list[str]:
    """Names of the classes of a model's blocks, which FSDP shards one by one. Those that a surgery has made are
    subclasses of those that transformers names."""
    known = set(getattr(model, "_no_split_modules", None) or ())
    classes = {type(module) for module in model.modules()}
    return sorted({cls.__name__ for cls in classes if known & {base.__name__ for base in cls.__mro__}})


def tied_names(model: nn.Module) -> list[set[str]]:
    """Names that stand for one parameter."""
    by_id: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), set()).add(name)
    return [names for names in by_id.values() if len(names) > 1]


def judged(scores: np.ndarray) -> dict[str, float]:
    """What is said of scores `(rows, n)`: their mean, and the 99.9th percentile."""
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores[scores > -99]  # the Trainer pads with -100; nan compares as false
    if not len(scores) or not np.isfinite(scores).all():
        return {"mean": float("nan"), "p99.9": float("nan")}
    return {"mean": float(scores.mean()), "p99.9": float(np.quantile(scores, 0.999))}
