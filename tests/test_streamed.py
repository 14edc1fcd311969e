"""Models that read their weights from disk as they run, against the same models in memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from models import tiny
from normswap.errors import VerificationError
from normswap.verification import on_disk, streamed
from normswap.verification.streamed import Held, Reading, placeholder, read_on_use
from normswap.verification.weights import Part, ranges


@pytest.fixture
def from_disk(monkeypatch):
    """Every model is read as it runs, all of it but vectors; the shapes of what was read."""
    monkeypatch.setattr(on_disk, "IN_MEMORY", 0)
    monkeypatch.setattr(on_disk, "SMALL", 64)
    monkeypatch.setattr(streamed, "_AT_ONCE", 500)
    found, read, parts = [], Reading.read, Reading.parts

    def spy(self, own, rows=None):
        value = read(self, own, rows)
        found.append((tuple(own.shape), tuple(value.shape)))
        return value

    def spy_on_parts(self, own):
        for part in parts(self, own):
            found.append((tuple(own.shape), tuple(part.values.shape)))
            yield part

    monkeypatch.setattr(Reading, "read", spy)
    monkeypatch.setattr(Reading, "parts", spy_on_parts)
    return found


CASES = {
    "tied, Conv1D": ("gpt2", dict(norm="rmsnorm"), {}),
    "tied, given up": ("gpt2", dict(norm="rmsnorm", fold=True, tied="untie"), {}),
    "experts merged on loading": ("phimoe", dict(norm="rmsnorm"), {}),
    "half precision": ("gpt_neox", dict(norm="rmsnorm", dtype="bfloat16"), {}),
    "encoder and decoder": ("t5", dict(fold=True), {}),
    "sharded": ("llama", dict(fold=True), {"max_shard_size": "20KB"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_is_measured_without_its_weights_in_memory(tmp_path, from_disk, case):
    kind, request, saving = CASES[case]
    tiny(kind).save_pretrained(tmp_path / "source", **saving)
    done = normswap.convert(tmp_path / "source", tmp_path / "out", partial=True, verify="fast", **request)
    assert len(from_disk) > 20 and any(read != own for own, read in from_disk)  # some in parts
    found = done.report.mathematics.comparison
    assert found.dtype == "float64" and len(found.sites) > 2 and not found.unmatched
    assert found.worst_error < 1e-10  # measured: 7e-15 at most
    assert done.report.tensors_checked > 10


def test_two_folders_measure_the_same_as_in_memory(tmp_path, from_disk):
    tiny("gpt2").save_pretrained(tmp_path / "source")
    out = normswap.convert(tmp_path / "source", tmp_path / "out", norm="rmsnorm", verify="none").folder
    read = normswap.verify(tmp_path / "source", out, tokens=40, dtype="float64").comparison
    assert len(from_disk) > 20
    on_disk.IN_MEMORY = 2**23
    whole = normswap.verify(tmp_path / "source", out, tokens=40, dtype="float64").comparison
    assert [site.site for site in read.sites] == [site.site for site in whole.sites]
    assert read.output.error.mean == pytest.approx(whole.output.error.mean, rel=1e-6)  # 5e-8: stored in float32
    assert read.worst_error == pytest.approx(whole.worst_error, rel=1e-6)


def test_a_folder_that_is_not_what_the_plan_makes_is_refused(tmp_path, from_disk, monkeypatch):
    tiny("gpt2").save_pretrained(tmp_path / "source")
    write = normswap.conversion.write_tensors

    def write_and_damage(source, keymap, plan, folder, *rest):
        summary = write(source, keymap, plan, folder, *rest)
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\1")
        return summary

    monkeypatch.setattr(normswap.conversion, "write_tensors", write_and_damage)
    with pytest.raises(VerificationError, match="1 tensors of the folder are not what the plan makes"):
        normswap.convert(tmp_path / "source", tmp_path / "out", norm="rmsnorm", verify="fast")
    assert not (tmp_path / "out").exists()


def test_undoing_is_measured_as_well(tmp_path, from_disk):
    tiny("gpt_neox").save_pretrained(tmp_path / "source")
    normswap.convert(tmp_path / "source", tmp_path / "out", norm="rmsnorm", verify="none")
    from_disk.clear()
    done = normswap.undo(tmp_path / "out", tmp_path / "back", verify="fast")
    assert len(from_disk) > 20 and done.report.tensors_checked > 20
    assert done.report.mathematics.comparison.worst_error < 1e-4  # measured: 2e-7, what float32 has lost


class Weights:
    """Weights in memory, that are asked for as those on disk are."""

    def __init__(self, axis=0, **tensors):
        self.axis, self.tensors = axis, tensors

    def read(self, name, rows=None):
        value = self.tensors[name]
        return value if rows is None else value[rows.start : rows.stop]

    def parts(self, name, most):
        value, axis = self.tensors[name], self.axis
        for part in ranges(value.shape, axis, most):
            yield Part(axis, part, value.narrow(axis, part.start, len(part)))


class Net(nn.Module):
    """What models do with weights, one by one; attribute `uses` says which."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, use, x):
        return USES[use](x, self.weight)


ids = torch.tensor([[3, 4, 4], [9, 0, 5]])
USES = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with a bias": lambda x, w: F.linear(x, w, w[:, 0]),
    "matmul": lambda x, w: x @ w.T,
    "addmm by rows": lambda x, w: torch.addmm(torch.zeros(6), x @ w.T, w),
    "embedding": lambda x, w: F.embedding(ids, w, padding_idx=0),
    "embedding that is scaled": lambda x, w: F.embedding(ids, w.clone(), max_norm=1.0),
    "embedding of nothing": lambda x, w: F.embedding(ids[:, :0], w),
    "row": lambda x, w: w[-2],
    "row by a tensor": lambda x, w: w[torch.tensor(7)],
    "rows": lambda x, w: w[2:5] + w[-3:],
    "rows that are chosen": lambda x, w: w[torch.tensor([1, 8, 8])],
    "mask": lambda x, w: w[torch.arange(10) > 6],
    "step": lambda x, w: w[::2],
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "in a list": lambda x, w: torch.cat([w, w]),
    "transposed": lambda x, w: w.T.sum(0),
    "data": lambda x, w: w.data.sum(0),
    "shape": lambda x, w: torch.tensor([*w.shape, w.size(0), len(w), w.dim(), w.numel(), w.ndim]),
    "made like it": lambda x, w: torch.zeros_like(w) + torch.ones(3, 6, dtype=w.dtype, device=w.device).sum(),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_weight_gets_its_values(use, axis, monkeypatch):
    monkeypatch.setattr(streamed, "_AT_ONCE", 20)  # three rows
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        net = Net(placeholder((10, 6), torch.float64))
        read_on_use(net, {id(net.weight): Held(Weights(axis, weight=weight), "weight", None)})
        found, expected = net(use, x), Net(nn.Parameter(weight))(use, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-14)  # measured: 1e-15


def test_what_passes_the_reading_by_is_no_number():
    net = Net(placeholder((10, 6), torch.float64))
    assert torch.isnan(net.weight @ torch.ones(6, dtype=torch.float64)).all()
    assert net.weight.untyped_storage().nbytes() == 8
    held = {id(net.weight): Held(Weights(weight=torch.ones(10, 6)), "weight", None)}
    read_on_use(net, held)
    assert net("matmul", torch.ones(1, 6, dtype=torch.float64)).tolist() == [[6.0] * 10]
    with pytest.raises(KeyError):
        net("no such use", torch.ones(1, 6))
    assert torch.isnan(net.weight.sum())  # the mode has ended with the failed run as well
