"""`normswap norms`"""

from __future__ import annotations

import json

import click
from rich.table import Table

from normswap.cli.options import json_option, out


@click.command("norms")
@json_option
def command(as_json: bool) -> None:
    """List the kinds of norm that --norm takes, what each is made of, and what that promises.

    \b
    normswap norms
    normswap convert ./my-gpt2 ./out --norm rmsnorm
    """
    from normswap.norms.kind import Fitted
    from normswap.norms.kinds import OFFERED

    if as_json:
        kinds = {name: {"about": kind.about, "of": list(kind.routes)} for name, kind in OFFERED.items()}
        click.echo(json.dumps(kinds, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("norm", "made of", "what it is"):
        table.add_column(column)
    for name, kind in OFFERED.items():
        of = [
            f"{replaced}{' (fitted on data)' if isinstance(r, Fitted) else ''}" for replaced, r in kind.routes.items()
        ]
        table.add_row(name, "\n".join(of), kind.about)
    out().print(table)
