"""What `bench_kernels.py` measured, as a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from stopwatch import in_words

TITLES = {"cuda": "GPU", "cpu": "CPU, one thread"}
OURS = {"cuda": "triton", "cpu": "cpu"}
#: values per element that must be moved, forward and backward, by how many sums and norms an operation has
MOVED = {"norm": (2, 3), "add-norm": (4, 4), "norm-add": (3, 3), "norm-add-norm": (4, 6)}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
#: rows from which a summary counts: fewer do not fill a device
LARGE = {"cuda": 4096, "cpu": 512}


class Cell(NamedTuple):
    """Seconds by contender, and the bound: what must be moved at the speed of a copy."""

    operation: str
    which: str
    dtype: str
    rows: int
    width: int
    bound: float
    seconds: Mapping[str, float]


def cells(found: Mapping) -> Iterator[Cell]:
    """All of one device."""
    for name, cell in found["cells"].items():
        operation, dtype, rows, width = name.split("|")
        for at, which in enumerate(("forward", "backward")):
            moved = MOVED[cell["form"]][at] * int(rows) * int(width) * ITEMSIZE[dtype]
            yield Cell(
                operation, which, dtype, int(rows), int(width), moved / cell["copied_per_second"][which], cell[which]
            )


def table(found: Mapping[str, Mapping]) -> str:
    """The file: by device a summary, the host's time, and every cell."""
    parts = ["<!-- scripts/bench_kernels.py -->"]
    for device, title in TITLES.items():
        parts.append(f"# {title}\n")
        if device not in found:
            parts.append("Not measured.\n")
            continue
        of_device = list(cells(found[device]))
        names = sorted({name for cell in of_device for name in cell.seconds}, key=lambda name: (name != "eager", name))
        speeds = [
            speed / 1e9 for cell in found[device]["cells"].values() for speed in cell["copied_per_second"].values()
        ]
        parts += [
            f"{in_words(found[device]['machine'])}; a copy moves {statistics.median(speeds):.4g} GB/s "
            f"({min(speeds):.4g} to {max(speeds):.4g} from cell to cell: how much else ran on the machine).\n",
            f"Geometric means over sizes of at least {LARGE[device]} rows: the bound over the time (100%: the speed of "
            "a copy), and in the last two columns how many times faster than the best of the others "
            f"`{OURS[device]}` is, in the mean and in the worst cell.\n",
            *_summary(device, of_device, names),
            "\nMicroseconds of the host per call (forward / backward, tiny inputs):\n",
            *_host(found[device]["on_host"], names),
            "\nEvery cell, microseconds (the bound over the time):\n",
            *_all(of_device, names),
            "",
        ]
    return "\n".join(parts)


def picture(found: Mapping[str, Mapping], path: Path) -> None:
    """The bound over the time by width, for the most rows of each, operations below one another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    device = next((device for device in TITLES if device in found), None)
    if device is None:
        return
    of_device = list(cells(found[device]))
    dtype = next(d for d in ITEMSIZE if any(cell.dtype == d for cell in of_device))
    of_device = [cell for cell in of_device if cell.dtype == dtype]
    operations = list(dict.fromkeys(cell.operation for cell in of_device))
    figure, axes = pyplot.subplots(len(operations), 2, figsize=(10, 2.2 * len(operations)), sharex=True, squeeze=False)
    for (row, operation), (column, which) in (
        (a, b) for a in enumerate(operations) for b in enumerate(("forward", "backward"))
    ):
        axis = axes[row][column]
        lines: dict[str, dict[int, float]] = defaultdict(dict)
        for cell in sorted(of_device, key=lambda cell: cell.rows):
            if (cell.operation, cell.which) == (operation, which):
                for name, seconds in cell.seconds.items():
                    lines[name][cell.width] = 100 * cell.bound / seconds
        for name, points in lines.items():
            widths = sorted(points)
            axis.plot(
                widths,
                [points[width] for width in widths],
                marker="o",
                markersize=3,
                label=name,
                linewidth=2.5 if name == OURS[device] else 1,
            )
        axis.set_title(f"{operation}, {which}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.axhline(100, color="grey", linewidth=0.5)
    axes[0][0].legend(fontsize=7)
    figure.supylabel("% of the speed of a copy")
    figure.supxlabel("width")
    figure.suptitle(f"{found[device]['machine']['hardware']}, {dtype}, most rows measured", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _summary(device: str, of_device: list[Cell], names: list[str]) -> Iterator[str]:
    ours = OURS[device]
    yield f"| operation | pass | dtype | {' | '.join(names)} | mean ratio | worst |"
    yield "|---" * (len(names) + 5) + "|"
    groups = defaultdict(list)
    for cell in of_device:
        if cell.rows >= LARGE[device]:
            groups[cell.operation, cell.which, cell.dtype].append(cell)
    for key, group in groups.items():
        shares = [
            _mean([cell.bound / cell.seconds[name] for cell in group])
            if all(name in c.seconds for c in group)
            else None
            for name in names
        ]
        ratios = [
            min(seconds for name, seconds in cell.seconds.items() if name != ours) / cell.seconds[ours]
            for cell in group
            if ours in cell.seconds
        ]
        compared = (f"{_mean(ratios):.2f}", f"{min(ratios):.2f}") if ratios else ("", "")
        told = ("" if share is None else f"{share:.0%}" for share in shares)
        yield f"| {' | '.join((*key, *told, *compared))} |"


def _host(on_host: Mapping[str, Mapping], names: list[str]) -> Iterator[str]:
    yield f"| operation | dtype | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for key, times in on_host.items():
        told = (
            " / ".join(f"{seconds * 1e6:.0f}" for seconds in times[name]) if name in times else "" for name in names
        )
        yield f"| {' | '.join((*key.split('|'), *told))} |"


def _all(of_device: list[Cell], names: list[str]) -> Iterator[str]:
    yield f"| operation | pass | dtype | rows | width | bound | {' | '.join(names)} |"
    yield "|---" * (len(names) + 6) + "|"
    for cell in of_device:
        told = (
            f"{cell.seconds[name] * 1e6:.4g} ({cell.bound / cell.seconds[name]:.0%})" if name in cell.seconds else ""
            for name in names
        )
        sizes = (str(cell.rows), str(cell.width), f"{cell.bound * 1e6:.4g}")
        yield f"| {' | '.join((cell.operation, cell.which, cell.dtype, *sizes, *told))} |"


def _mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))
