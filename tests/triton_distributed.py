"""Two gloo processes: DTensors through the operators, FSDP2 and DDP around the kernels, each against one process.

python tests/triton_distributed.py FOLDER     prints what was compared
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from normswap.kernels.triton import ops
from triton_cases import inputs, options, quick_interpreter, ran

FORMS = ["norm", "add-norm", "norm-add", "norm-add-norm"]
TOLD = {"kind": "layernorm", "eps": 1e-5, "gain": "w", "casting": "float32"}


class Block(nn.Module):
    """A branch between two norms, with parameters that the kernels are given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.weight, self.bias, self.weight2 = (nn.Parameter(torch.rand(16)) for _ in range(3))

    def forward(self, x):
        branch = self.linear(ops.norm(x, self.weight, self.bias, **TOLD))
        return ops.norm_add(branch, x, self.weight2, kind="rmsnorm", eps=1e-5)


def dtensors(mesh) -> int:
    """Each form, rows sharded along each axis: no communication, the gradients of one process."""
    checked = 0
    for form in FORMS:
        tensors, told = inputs(form, (4, 6, 16), torch.float32, "cpu"), options(form, **TOLD)
        wanted = ran(form, tensors, told)
        arriving = [torch.randn(r.shape, generator=torch.Generator().manual_seed(i)) for i, r in enumerate(wanted)]
        of_one = torch.autograd.grad(wanted, list(tensors.values()), arriving)
        for axis in (0, 1):
            sharded = {
                name: distribute_tensor(
                    tensor.detach(), mesh, [Replicate() if tensor.ndim == 1 else Shard(axis)]
                ).requires_grad_()
                for name, tensor in tensors.items()
            }
            found = ran(form, sharded, told)
            assert all(result.placements == (Shard(axis),) for result in found)
            of_two = torch.autograd.grad(
                found, list(sharded.values()), [distribute_tensor(g, mesh, [Shard(axis)]) for g in arriving]
            )
            for name, one, two in zip(tensors, of_one, of_two, strict=True):
                assert two.placements == (Shard(axis) if one.ndim == 3 else Partial(),), (form, name, two.placements)
                torch.testing.assert_close(two.full_tensor(), one, rtol=1e-5, atol=1e-5)
                checked += 1
            for one, two in zip(wanted, found, strict=True):
                assert torch.equal(two.full_tensor(), one)
    along_the_row = distribute_tensor(tensors["x"].detach(), mesh, [Shard(2)])  # is gathered
    weight = distribute_tensor(tensors["weight"].detach(), mesh, [Replicate()])
    found = ops.norm(along_the_row, weight, **TOLD)
    assert torch.equal(found.full_tensor(), ops.norm(tensors["x"], tensors["weight"], **TOLD).detach())
    return checked


def wrapped(rank: int, mesh, wrap) -> int:
    """A block under `wrap`, each process with its half of a batch, against one with all of it."""
    torch.manual_seed(0)
    alone, shared = Block(), Block()
    shared.load_state_dict(alone.state_dict())
    x = torch.randn(4, 3, 16)
    alone(x).square().mean().backward()
    shared = wrap(shared, mesh)
    shared(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    checked = 0
    for one, two in zip(alone.parameters(), shared.parameters(), strict=True):
        gradient = two.grad.full_tensor() if hasattr(two.grad, "full_tensor") else two.grad
        torch.testing.assert_close(gradient, one.grad, rtol=1e-4, atol=1e-6)
        checked += 1
    return checked


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    quick_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    told = {
        "dtensors": dtensors(mesh),
        "fsdp": wrapped(rank, mesh, lambda model, mesh: fully_shard(model, mesh=mesh)),
        "ddp": wrapped(rank, mesh, lambda model, _: DistributedDataParallel(model)),
    }
    if rank == 0:
        print(*(f"{what} {checked}" for what, checked in told.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
