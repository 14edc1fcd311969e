"""`normswap inspect`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from normswap.cli.options import err, json_option, out, quiet, report_option, source_options


@click.command("inspect")
@click.argument("model")
@source_options
@report_option
@json_option
def command(model: str, revision: str | None, trust_remote_code: bool, page: Path | None, as_json: bool) -> None:
    """Show what the norms of MODEL are, and where: streams, blocks, sites, writers and readers.

    Reads the configuration and the headers of the files, no weights. MODEL is a folder, a config.json or a Hub id.

    \b
    normswap inspect ./my-gpt2
    normswap inspect ./my-gpt2 --report map.html
    normswap inspect ./my-gpt2 --json | jq '.sites[0]'
    """
    quiet()
    import normswap
    from normswap.report.map import map_table

    if page is not None:
        from normswap.report.page.write import check_place

        check_place(page, model)
    normmap = normswap.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
    if page is not None:
        from normswap.report.findings.gather import of_model
        from normswap.report.page.write import write_page

        write_page(of_model(normmap, model), page)
        err().print(f"wrote {page}", style="bold")
    if as_json:
        click.echo(json.dumps(normmap.summary(), indent=2))
    else:
        out().print(map_table(normmap))
