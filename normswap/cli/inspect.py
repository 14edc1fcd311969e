"""`normswap inspect`"""

from __future__ import annotations

import json

import click

from normswap.cli.options import json_option, out, quiet, source_options


@click.command("inspect")
@click.argument("model")
@source_options
@json_option
def command(model: str, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show what the norms of MODEL are, and where: streams, blocks, sites, writers and readers.

    Reads the configuration and the headers of the files, no weights. MODEL is a folder, a config.json or a Hub id.

    \b
    normswap inspect ./my-gpt2
    normswap inspect ./my-gpt2 --json | jq '.sites[0]'
    """
    quiet()
    import normswap
    from normswap.report.map import map_table

    normmap = normswap.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(normmap.summary(), indent=2))
    else:
        out().print(map_table(normmap))
