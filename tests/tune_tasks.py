"""`normswap finetune` in processes of their own, which are killed, or are several: forked from one that has all
imports, so that a run costs what it trains."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

# what a forked process does not import again
import normswap.cli.finetune
import normswap.report.training  # noqa: F401
import normswap.tune.prepare as prepare_module
import normswap.tune.publish
import normswap.tune.run as run_module
from normswap.cli import main
from normswap.tune.recipe import Recipe
from normswap.tune.trainer import StagedTrainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
# the process that others are forked from looks for what it imports by this alone
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))


def finetune(folder: Path, args: list[str], processes: int = 1, *, within: float = 600, **upset) -> list[int]:
    """`normswap finetune ARGS` in so many processes; their exit codes (-9: killed). What they say is in `folder`.

    Args:
        upset: what happens to them, by the name of a function below, with its argument.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    made = [
        CONTEXT.Process(target=_process, args=(str(folder), args, rank, processes, port, upset))
        for rank in range(processes)
    ]
    for process in made:
        process.start()
    for process in made:
        process.join(within)
    codes = [process.exitcode for process in made]
    for process in made:
        process.kill()
    return codes


def said(folder: Path, rank: int = 0, stream: str = "err") -> str:
    return (folder / f"{stream}-{rank}").read_text()


def published(out: Path) -> tuple[dict, dict]:
    """Weights and record of a result."""
    return load_file(out / "model.safetensors"), json.loads((out / "normswap.json").read_text())["training"]


def _process(folder: str, args: list[str], rank: int, processes: int, port: int, upset: dict) -> None:
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(Path(folder) / f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in upset.items():
        globals()[name](value)
    main(["finetune", *args], prog_name="normswap")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(step: int) -> None:
    """Killed in the middle of that optimizer step, counted from 0."""
    _in_step(step, _kill)


def interrupt_in_step(step: int) -> None:
    """Ctrl-C there."""
    _in_step(step, lambda: os.kill(os.getpid(), signal.SIGINT))


def _in_step(step: int, do) -> None:
    inner = StagedTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step and "control" not in self.args.output_dir:
            do()
        return inner(self, *args, **kwargs)

    StagedTrainer.compute_loss = compute_loss


def kill_in_control(step: int) -> None:
    inner = StagedTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == step and "control" in self.args.output_dir:
            _kill()
        return inner(self, *args, **kwargs)

    StagedTrainer.compute_loss = compute_loss


def kill_in_save(step: int) -> None:
    """Killed while the checkpoint of that step is written: its weights are there, its optimizer is not."""
    inner = StagedTrainer._save_optimizer_and_scheduler

    def save(self, folder):
        if self.state.global_step == step:
            _kill()
        inner(self, folder)

    StagedTrainer._save_optimizer_and_scheduler = save


def kill_in_publish(_: object) -> None:
    """Killed when all training has been done."""
    run_module.publish = lambda *args: _kill()


def poison_step(step: int) -> None:
    """The loss of that step is no number."""
    inner = StagedTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = inner(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == step else loss

    StagedTrainer.compute_loss = compute_loss


def fail_in_surgery(_: object) -> None:
    """The main process alone comes upon an error."""
    from normswap.errors import RefusedError

    def refuse(*args):
        raise RefusedError("this surgery is refused")

    prepare_module.plan_surgery = refuse


def slow_main(seconds: float) -> None:
    """The main process comes to the recipe later than the others."""
    import time

    inner = Recipe.of
    if os.environ.get("RANK", "0") == "0":
        Recipe.of = classmethod(lambda cls, *args: (time.sleep(seconds), inner(*args))[1])


def without_comparison(_: object) -> None:
    """The result is published without being compared with the source, which other tests do, nor drawn."""

    class Nothing:
        def model_dump(self, **kwargs):
            return None

    normswap.tune.publish._compared = lambda *args: Nothing()
    normswap.tune.publish.draw = lambda *args: None
    normswap.tune.publish.write_trained_card = lambda *args: None


def note_rows(folder: str) -> None:
    """Each process writes the rows that it trains on, in order."""
    inner = StagedTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            with open(Path(folder) / f"rows-{self.args.process_index}", "a") as file:
                file.writelines(f"{self.state.global_step} {row.tolist()}\n" for row in inputs["input_ids"])
        return inner(self, model, inputs, *args, **kwargs)

    StagedTrainer.compute_loss = compute_loss
