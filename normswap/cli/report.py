"""`normswap report`"""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import click

from normswap.cli.options import err, json_option, out, quiet


@click.command("report")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page; by default OUT's name-report.html.",
)
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
@json_option
def command(folder: Path, output: Path | None, show: bool, as_json: bool) -> None:
    """Show what was done to a model: tables here, and one HTML page that works offline.

    OUT is a folder that `convert` or `finetune` wrote; nothing else is needed, and nothing is written into it. With
    --json the data is printed, and there is a page only where -o names one.

    \b
    normswap report ./my-gpt2-rms
    normswap report ./my-gpt2-rms -o report.html --open
    normswap report ./my-gpt2-rms --json | jq .advice
    """
    quiet()
    from normswap.report.findings.gather import of_folder
    from normswap.report.findings_view import findings_view
    from normswap.report.page.write import check_place, write_page

    if output is None and not (as_json and not show):
        output = Path(f"{folder.resolve().name}-report.html")
    if output is not None:
        check_place(output, folder)
    found = of_folder(folder)
    if as_json:
        click.echo(json.dumps(found.data(), indent=2))
    else:
        out().print(findings_view(found))
    if output is not None:
        write_page(found, output)
        err().print(f"wrote {output}", style="bold")
    if show:
        webbrowser.open(output.resolve().as_uri())
