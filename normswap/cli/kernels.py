"""`normswap kernels`"""

from __future__ import annotations

import json

import click

from normswap.cli.options import err, json_option, out, quiet, source_options

DTYPES = ("float32", "bfloat16", "float16", "float64")


@click.command("kernels")
@click.argument("model", required=False)
@click.option("--backend", multiple=True, metavar="NAME", help="Of these alone, in this order. By default the fastest.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, ... By default the GPU where there is one.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights. By default as the configuration says.")
@click.option("--autocast", type=click.Choice(DTYPES[1:3]), help="The dtype of torch.autocast in training.")
@click.option(
    "--fuse-residual", is_flag=True, help="Have norms make the residual sums beside them, and show the source."
)
@source_options
@json_option
def command(
    model: str | None,
    backend: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    autocast: str | None,
    fuse_residual: bool,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show which fused kernel each norm of MODEL would get on this machine, why, and what rejected the others.

    Each kernel is measured against the norm it would stand for, and timed; times are kept in the user's cache. No
    weights are read. Without MODEL, lists the backends and whether they are installed.

    \b
    normswap kernels
    normswap kernels ./my-llama --dtype bfloat16
    normswap kernels ./my-llama --fuse-residual
    normswap kernels ./my-llama --backend liger --json | jq '.sites[0]'
    """
    quiet()
    import torch

    from normswap.kernels.survey import backends, survey
    from normswap.report.kernels import backends_table, kernels_table

    if model is None:
        if as_json:
            click.echo(json.dumps(backends(), indent=2))
        else:
            out().print(backends_table(backends()))
        return
    console = err()
    with console.status("looking") as status:
        found = survey(
            model,
            backend or "auto",
            fuse_residual=fuse_residual,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            autocast=getattr(torch, autocast) if autocast else None,
            revision=revision,
            trust_remote_code=trust_remote_code,
            tell=status.update,
        )
    if as_json:
        click.echo(json.dumps(found.summary(), indent=2))
    else:
        out().print(kernels_table(found))
