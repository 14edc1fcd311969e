"""Every model type of transformers, small and random: inspected, converted in every way, and measured.

.venv/bin/python scripts/coverage.py                        # the whole sweep; goes on where it stopped
.venv/bin/python scripts/coverage.py --only 'gpt*,bert'     # some types, or globs
.venv/bin/python scripts/coverage.py --placement post       # the norms moved instead, and looked at twice
.venv/bin/python scripts/coverage.py --kind batchnorm       # the norms of one kind, and what is for them alone
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from datetime import date
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Types that one fresh process loads one after another; starting it takes longer than loading a few.
_LOADED_TOGETHER = 20
# In that process nothing lifts the float32 inside of models.
_ON_DISK = 1e-6

EXAMPLE = """\b
Examples:
  python scripts/coverage.py --out coverage.jsonl --jobs 2 --table coverage.md
  python scripts/coverage.py --only 'gpt*,bert' --redo --json
  python scripts/coverage.py --placement post --table placements.md
  python scripts/coverage.py --kind batchnorm --table batchnorm.md
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("coverage.jsonl"),
    show_default=True,
    help="Records, one line of JSON per type; those that are there are not made again.",
)
@click.option("--only", default="*", help="Model types, or globs of them, with commas between.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Processes.")
@click.option("--redo", is_flag=True, help="Make records again that are there.")
@click.option("--disk", is_flag=True, help="Save, convert and load each type as well, in a process without normswap.")
@click.option(
    "--placement",
    type=click.Choice(["post", "deepnorm", "keel", "layernorm-scaling"]),
    help="Move the norms of pre-norm streams there, in place of all else.",
)
@click.option(
    "--kind", type=click.Choice(["batchnorm", "rmsnorm"]), help="Only norms of this kind, in place of all else."
)
@click.option("--seconds", default=180.0, show_default=True, help="Time that one type may take.")
@click.option("--gibibytes", default=6.0, show_default=True, help="Memory that one process may take.")
@click.option("--table", type=click.Path(path_type=Path), help="Write summary and table there, as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def main(out: Path, only: str, jobs: int, redo: bool, disk: bool, placement: str | None, kind: str | None,
         seconds: float, gibibytes: float, table: Path | None, as_json: bool) -> None:  # fmt: skip
    """Inspect and convert a small random model of each type that transformers has, and measure each conversion.

    With `--placement`, move its norms, trace what came out again, and measure it against the original with its blocks
    evaluated in that placement by interception.

    With `--kind`, convert the norms of that kind alone, in the exact ways that are for it.

    Prints the summary. Ends with status 1 where a conversion is wrong, or anything crashed.
    """
    from sweep import kind_table, placement_table, zoo
    from sweep import table as conversion_table
    from sweep.examine import versions

    globs = [glob.strip() for glob in only.split(",")]
    types = [name for name in zoo.model_types() if any(fnmatch.fnmatch(name, glob) for glob in globs)]
    if not types:
        raise click.BadParameter(f"no model type of transformers is like {only}", param_hint="--only")
    if sum(map(bool, (placement, kind, disk))) > 1:
        raise click.UsageError("--placement, --kind and --disk are three sweeps: give one of them")
    key = versions() | ({"placement": placement} if placement else {"kind": kind} if kind else {"disk": disk})
    tables = placement_table if placement else kind_table if kind else conversion_table
    have = _read(out, key)
    todo = [name for name in types if redo or name not in have]
    if todo:
        have |= _sweep(todo, key, out, jobs, seconds, gibibytes)
    records = [have[name] for name in types]
    found = tables.summary(records)
    about = ", ".join(f"{name} {version}" for name, version in versions().items()) + f", {date.today():%Y-%m-%d}"
    if table is not None:
        lines = [about, "", *tables.summary_lines(found), "", *tables.table_lines(records)]
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(
        json.dumps({"versions": versions(), **found}, indent=1)
        if as_json
        else "\n".join([about, "", *tables.summary_lines(found)])
    )
    if any(bad["result"] in ("WRONG", "crashed") for bad in found["bad"]):
        sys.exit(1)


def _read(out: Path, key: dict[str, object]) -> dict[str, dict]:
    """The records made under `key`, by type; of several the last. A line that was cut off is made again."""
    found = {}
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["key"] == key:
            found[record["type"]] = record
    return found


def _sweep(
    types: list[str], key: dict[str, object], out: Path, jobs: int, seconds: float, gibibytes: float
) -> dict[str, dict]:
    """Examine the types, and append each record to `out` as it is made; with `disk` in the key, once it was loaded."""
    from sweep.examine import examine
    from sweep.of_kind import examine_kind
    from sweep.place import place
    from sweep.workers import run_all

    found = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        out.open("a", encoding="utf-8") as file,
        TemporaryDirectory() as scratch,
    ):
        if file.tell() and not out.read_bytes().endswith(b"\n"):
            file.write("\n")  # a line that was cut off stays by itself
        task = progress.add_task("examining", total=len(types))
        prepared = []
        work, args = examine, (scratch if key.get("disk") else None,)
        if "placement" in key:
            work, args = place, (key["placement"],)
        if "kind" in key:
            work, args = examine_kind, (key["kind"],)
        for name, record, why in run_all(work, types, args, jobs, seconds, gibibytes):
            found[name] = (record or {"type": name, "status": "crashed", "why": why, "seconds": {}}) | {"key": key}
            progress.update(task, advance=1, description=name[:24].ljust(24))
            if found[name].get("disk", {}).get("result") == "prepared":
                prepared.append(name)
            else:
                _append(file, found[name])
            if len(prepared) >= _LOADED_TOGETHER:
                _load(prepared, Path(scratch), found, file)
        _load(prepared, Path(scratch), found, file)
    return found


def _load(prepared: list[str], scratch: Path, found: dict[str, dict], file) -> None:
    """Load what was prepared on disk, in one process, and complete the records; `prepared` is empty afterwards."""
    from sweep.disk import load_all

    loaded = load_all([scratch / name for name in prepared], scratch / "cache") if prepared else {}
    for name in prepared:
        said = loaded.get(name, {"why": "the loading process ended before"})
        exact = said.get("error", 1.0) < _ON_DISK
        found[name]["disk"] = said | {"result": "exact" if exact else "WRONG" if "error" in said else "crashed"}
        _append(file, found[name])
        rmtree(scratch / name)
    prepared.clear()


def _append(file, record: dict) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


if __name__ == "__main__":
    main()
