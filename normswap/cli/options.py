"""Options that several commands share, and the consoles they print to."""

from __future__ import annotations

import atexit
import gc
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from normswap.report.printable import printable


def one_line(names: Iterable[str]) -> str:
    """Names of files, which may hold anything, with commas between."""
    return ", ".join(printable(name).replace("\n", "?") for name in names)


class SafeConsole(Console):
    """A console that shows what is not printable as `?`."""

    def render(self, renderable, options=None):
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def out() -> Console:
    """For results. Wide when piped, so that no table is cut."""
    return SafeConsole(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


def err() -> Console:
    """For messages and progress; lines are as long as they are when they go to a file."""
    return SafeConsole(file=sys.stderr, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())


def quiet() -> None:
    """Keep other libraries' warnings and bars off the terminal; what matters of them, normswap checks and says."""
    _import_transformers()
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # those of downloads, too
    if downloads:
        enable_progress_bars()


def _import_transformers() -> None:
    """What reading any model needs, in four fifths of the time: Python does not look for garbage in what stays."""
    if "transformers.modeling_utils" in sys.modules:
        return
    gc.disable()
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else extensions complain of what is left
        gc.enable()


def _together(*options: Callable) -> Callable:
    return lambda command: reduce(lambda c, option: option(c), reversed(options), command)


source_options = _together(
    click.option("--revision", metavar="REV", help="Branch, tag or commit, when the model is a Hub id."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run model code that comes with the checkpoint. Off by default."
    ),
)

request_options = _together(
    click.option("--norm", multiple=True, metavar="KIND", help="Norm to convert to: `normswap norms` lists them."),
    click.option(
        "--sites",
        multiple=True,
        metavar="GLOB",
        help="Which norms, by path: '*.ln_1', '*.h.0.*,*.h.1.*'. With several kinds, one for each; '*' is all.",
    ),
    click.option(
        "--role",
        multiple=True,
        metavar="ROLE",
        help="Which norms, by what they do: stream, branch, qk, embedding, final, head. With several kinds, one for "
        "each; any is all.",
    ),
    click.option("--fold", is_flag=True, help="Move gains and biases into the linear maps that read them."),
    click.option(
        "--placement",
        multiple=True,
        metavar="NAME",
        help="Where norms are to stand: post, pre, deepnorm, sandwich, reordered, keel, layernorm-scaling or "
        "pre-normalized-skip.",
    ),
    click.option(
        "--layers",
        multiple=True,
        metavar="LAYERS",
        help="Which layers the placement is for: 0-3,7; or auto:KL, the most that stay under that KL (nats per token). "
        "With several placements, one for each.",
    ),
    click.option(
        "--qk-norm",
        metavar="KIND",
        help="Put norms on the heads of queries and keys, rmsnorm or layernorm, behind a gate that is the identity.",
    ),
    click.option("--exact", is_flag=True, help="Move norms only in forms that compute the same function."),
    click.option(
        "--tied",
        type=click.Choice(["keep", "untie"]),
        default="keep",
        show_default=True,
        help="Tied embeddings: keep the tie, centring the embedding's output instead of its weights; or store both.",
    ),
    click.option("--partial", is_flag=True, help="Convert the sites that can be, and list the rest."),
    click.option(
        "--explicit",
        type=click.Choice(["never", "shared", "always"]),
        default="shared",
        show_default=True,
        help="Subtract a mean at run time where no weights control it: never; once, where several norms gain by it; "
        "or always, if need be in front of each norm.",
    ),
    click.option(
        "--rotate",
        type=click.Choice(["hadamard", "random", "pca"]),
        help="Carry the streams of RMSNorms in another basis: the same function, for quantisation and slicing.",
    ),
)

#: what of a progress is counted in bytes: `conversion.WRITING`, which takes torch to import
BYTES = frozenset({"writing"})

#: `calibration.run.TOKENS`, which takes torch to import
TOKENS = 8192

tokens_option = _together(
    click.option(
        "--tokens",
        type=click.IntRange(min=2),
        default=TOKENS,
        show_default=True,
        help="How many tokens to calibrate on, where it takes data. More are better, and take longer.",
    ),
    click.option(
        "--window",
        type=click.IntRange(min=8),
        default=256,
        show_default=True,
        help="In windows of how many tokens; shorter ones for a model of short texts.",
    ),
)

report_option = click.option(
    "--report",
    "page",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write an HTML page of it, with drawings and advice.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


class _Bytes(ProgressColumn):
    """How many bytes of how many, and how many a second; nothing where what is counted are no bytes."""

    max_refresh = 0.5

    def render(self, task):
        if task.description not in BYTES:
            return Text()
        speed = "?" if task.speed is None else f"{decimal(int(task.speed))}/s"
        return Text(f"{decimal(int(task.completed))} of {decimal(int(task.total))}, {speed}", no_wrap=True)


@contextmanager
def progress_bars(enabled: bool = True):
    """A callback `(what, done, total)` that draws one bar per `what` on stderr while the block runs."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        _Bytes(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bars:
        tasks: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
