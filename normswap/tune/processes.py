"""Several processes that train one model: what one of them does for all, and errors that all of them end with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from normswap.errors import RecipeError

T = TypeVar("T")

#: how long a process waits for one that converts, compares or writes for all; `training.ddp_timeout` says otherwise
PATIENCE = timedelta(hours=6)
#: how long, at an error, for the one that says what it is
_END = timedelta(seconds=20)


def start(training: Mapping[str, Any]) -> None:
    """Have `accelerate` find the other processes, as `transformers.TrainingArguments` will want it.

    Raises:
        RecipeError: it does not find them.
    """
    from accelerate import PartialState

    wait = training.get("ddp_timeout")
    options = {"backend": training.get("ddp_backend"), "timeout": timedelta(seconds=wait) if wait else PATIENCE}
    state = PartialState(cpu=on_cpu(training), **options)
    if state.num_processes != _count():
        raise RecipeError(
            f"{_count()} processes were started, and accelerate knows of {state.num_processes}. Start them with "
            f"torchrun or accelerate launch, on devices of one kind; for the CPU, set training.use_cpu."
        )


def on_cpu(training: Mapping[str, Any]) -> bool:
    """Whether a recipe trains on the CPU: it says so, or there is nothing else.

    Not told, accelerate would have each of several processes train alone there, and transformers refuses bf16.
    """
    import torch

    return bool(training.get("use_cpu", not torch.accelerator.is_available()))


def shard_on_cpu(accelerator: Any, plugin: Any) -> None:
    """Have FSDP on the CPU. accelerate shards on accelerators alone; on the CPU it leaves the sharding out, unsaid."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the one of several processes that speaks, by what `torchrun` and its like have set."""
    return int(os.environ.get("RANK", 0)) == 0


def on_main(do: Callable[[], T]) -> T:
    """What `do` gives in the main process, in every one. The error that ends it there is raised in all of them."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return do()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = do()
        except Exception as error:  # the others wait for it
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def main_first(do: Callable[[], T]) -> T:
    """What `do` gives in each process. The main one goes first, and the others find what it has cached."""
    found: list[T] = []
    on_main(lambda: found.append(do()))
    return found[0] if found else do()


def all_end() -> bool:
    """At an error: wait until the others are here too. False: they are not, the error is this process's alone.

    A launcher ends all processes as soon as one has left, and the main one may not have said why.
    """
    from torch import distributed

    from normswap.tune.extras import missing

    if missing():
        return True
    try:
        if not distributed.is_initialized():
            start({"use_cpu": True, "ddp_timeout": _END.total_seconds()})
        return bool(distributed.barrier(async_op=True).wait(_END))
    except Exception:  # whatever the backend says of a process that does not come, or that has left
        return False
