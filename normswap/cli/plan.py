"""`normswap plan`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from normswap.cli.options import json_option, out, quiet, request_options, source_options


@click.command("plan")
@click.argument("model")
@request_options
@source_options
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Save the plan as JSON.")
@json_option
def command(model, output, as_json, **options) -> None:
    """Show what a conversion of MODEL would do: the edits, the claim and its reasons, what changes on disk.

    Nothing is written, except the plan itself with -o; `convert --plan` runs it.

    \b
    normswap plan ./my-gpt2 --norm rmsnorm
    normswap plan ./my-gpt2 --norm rmsnorm --fold --tied untie -o plan.json
    """
    quiet()
    import normswap
    from normswap.conversion import preview_on_disk
    from normswap.report.plan import disk_facts, plan_view

    made = normswap.plan(model, **options)
    disk = preview_on_disk(model, made, **{name: options[name] for name in ("revision", "trust_remote_code")})
    if output is not None:
        made.save(output)
        click.echo(f"saved {output}", err=True)
    if as_json:
        facts = None if disk is None else disk_facts(disk)
        click.echo(json.dumps({"plan": made.model_dump(mode="json"), "disk": facts}, indent=2))
    else:
        out().print(plan_view(made, disk))
