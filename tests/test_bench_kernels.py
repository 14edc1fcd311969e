"""The benchmark of kernels, on inputs too small to mean anything: what is measured, kept and told."""

import json

import torch
from click.testing import CliRunner

import bench_kernels
import stopwatch
from normswap.kernels.backends import BACKENDS


def test_bench_kernels(tmp_path, monkeypatch):
    """Every cell has a bound and its contenders; a second run measures nothing; a GPU that is not there is said."""
    monkeypatch.setitem(bench_kernels.SIZES, ("cpu", True), ((32,), (512,)))
    monkeypatch.setattr(bench_kernels, "BACKENDS", {"torch": BACKENDS["torch"]})
    for operation in list(bench_kernels.OPERATIONS)[2:-1]:
        monkeypatch.delitem(bench_kernels.OPERATIONS, operation)
    monkeypatch.setitem(stopwatch.FLUSHED, "cpu", 1 << 10)
    monkeypatch.setattr(stopwatch.Stopwatch.on_host, "__defaults__", (2,))
    told = ["--device", "cpu", "--quick", "--turns", "2", "--results", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        first = CliRunner().invoke(bench_kernels.main, told, catch_exceptions=False)
        monkeypatch.setattr(bench_kernels, "picture", lambda *_: None)  # seconds
        again = CliRunner().invoke(bench_kernels.main, told, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert first.exit_code == again.exit_code == 0
    operations = bench_kernels.OPERATIONS
    assert first.output.count("forward eager") == len(operations) == 3 and "forward" not in again.output
    cells = json.loads((tmp_path / "kernels-cpu.json").read_text())["cells"]
    assert len(cells) == len(operations)
    for cell in cells.values():  # F.rms_norm rounds once, and is no contender where Llama's norm is asked for
        assert {"eager"} <= cell["forward"].keys() == cell["backward"].keys() <= {"eager", "torch"}
        assert min(cell["copied_per_second"].values()) > 0
    text = (tmp_path / "kernels.md").read_text()
    assert "# GPU\n\nNot measured.\n" in text and (tmp_path / "kernels.png").stat().st_size > 10_000
    rows = [line for line in text.splitlines() if line.startswith("| rmsnorm, add, rmsnorm |")]
    assert [line.count("%") for line in rows if "| 512 | 32 |" in line] == [2, 2]
    if not torch.cuda.is_available():
        missing = CliRunner().invoke(bench_kernels.main, ["--results", str(tmp_path)])
        assert missing.exit_code == 1 and "no GPU here" in missing.output
