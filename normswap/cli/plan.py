"""`normswap plan`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from normswap.cli.options import json_option, out, progress_bars, quiet, request_options, source_options, tokens_option


@click.command("plan")
@click.argument("model")
@request_options
@click.option("--calibrate", is_flag=True, help="Fit what moves to what the model does on text, as `convert` does.")
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text; its last three quarters are calibrated on.",
)
@tokens_option
@source_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the plan as JSON; what was fitted goes beside it, into *.safetensors.",
)
@json_option
def command(model, output, as_json, **options) -> None:
    """Show what a conversion of MODEL would do: the edits, the claim and its reasons, what changes on disk.

    Nothing is written, except the plan itself with -o; `convert --plan` runs it. Where norms move, the constants are 1
    and the claim is untrained until --calibrate fits them, which reads the weights; what -o saves then needs no text.

    \b
    normswap plan ./my-gpt2 --norm rmsnorm
    normswap plan ./my-gpt2 --norm rmsnorm --fold --tied untie -o plan.json
    normswap plan ./my-gpt2 --placement post --calibrate --text corpus.txt -o plan.json
    """
    quiet()
    import normswap
    from normswap.conversion import preview_on_disk
    from normswap.report.plan import disk_facts, plan_view

    with progress_bars(enabled=not as_json) as progress:
        made = normswap.plan(model, progress=progress, **options)
    disk = preview_on_disk(model, made, **{name: options[name] for name in ("revision", "trust_remote_code")})
    if output is not None:
        click.echo(f"saved {' and '.join(map(str, made.save(output)))}", err=True)
    if as_json:
        facts = None if disk is None else disk_facts(disk)
        click.echo(json.dumps({"plan": made.model_dump(mode="json"), "disk": facts}, indent=2))
    else:
        out().print(plan_view(made, disk))
