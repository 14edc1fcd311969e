"""`normswap convert`"""

from __future__ import annotations

import json
from pathlib import Path

import click
from click.core import ParameterSource

from normswap.cli.options import (
    err,
    json_option,
    one_line,
    out,
    progress_bars,
    quiet,
    report_option,
    request_options,
    source_options,
    tokens_option,
)


@click.command("convert")
@click.argument("model")
@click.argument("destination", metavar="OUT", type=click.Path(path_type=Path))
@request_options
@click.option(
    "--plan", "plan_file", metavar="FILE", type=click.Path(path_type=Path), help="Run a plan saved by `plan -o`."
)
@click.option("--dtype", metavar="DTYPE", help="Store all floating tensors so: float32, bfloat16, float16 or float64.")
@click.option(
    "--verify",
    type=click.Choice(["full", "fast", "none"]),
    default="full",
    show_default=True,
    help="full: in float64 and as stored; fast: in float64 on few tokens; none: nor are the source's files hashed.",
)
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text to verify on. Where norms move, it calibrates on three quarters of it and verifies on the rest.",
)
@tokens_option
@click.option(
    "--adapter",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A LoRA adapter of MODEL (PEFT; a folder or Hub id), to become one of OUT that gives the same outputs there, "
    "in OUT/adapters. May be given several times.",
)
@click.option(
    "--push-to-hub", metavar="REPO", help="Upload OUT to that repository of the Hub, which is made if need be."
)
@click.option("--private", is_flag=True, help="Make that repository a private one.")
@click.option("--undo", is_flag=True, help="MODEL is what normswap made: turn it back into its source's own class.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads that read, compute and write. Default: one per processor, at most 8, and two more.",
)
@click.option("-v", "--verbose", is_flag=True, help="List what happened to each tensor.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a model folder at OUT, once the new one is complete; and what is in REPO.",
)
@source_options
@report_option
@json_option
@click.pass_context
def command(
    context, model, destination, plan_file, adapter, push_to_hub, private, undo, verbose, page, as_json, **options
) -> None:
    """Convert the checkpoint MODEL into the folder OUT: plan, apply, verify, publish.

    OUT appears whole, after verification, or not at all. MODEL is never written to.

    \b
    normswap convert ./my-gpt2 ./my-gpt2-rms --norm rmsnorm
    normswap convert ./my-llama ./weightless --fold
    normswap convert ./my-gpt2 ./my-gpt2-post --placement post --text corpus.txt --tokens 32768
    normswap convert ./my-gpt2 ./mix-ln --placement post --layers 0-3
    normswap convert ./my-gpt2 ./careful --placement post --layers auto:0.002
    normswap convert ./my-gpt2-rms ./my-gpt2-again --undo
    normswap convert ./my-llama ./weightless --fold --adapter ./my-lora --push-to-hub me/weightless
    """
    quiet()
    if undo:
        _undo(context, model, destination, page, as_json)
        return
    import normswap
    from normswap.hub import Target
    from normswap.report.adapters import adapter_lines
    from normswap.report.plan import disk_facts, plan_view, tensors_view
    from normswap.report.proof import proof_view

    target = Target.check(push_to_hub, private, options["overwrite"])
    if page is not None:
        from normswap.report.page.write import check_place

        check_place(page, model, destination)
    with progress_bars(enabled=not as_json) as progress:
        done = normswap.convert(
            model,
            destination,
            plan=plan_file,
            adapters=adapter,
            hub=target and target.repo,
            progress=progress,
            **options,
        )
    if as_json:
        result = {
            "folder": str(done.folder),
            "plan": done.plan.model_dump(mode="json"),
            "disk": disk_facts(done.written),
            "report": done.report.model_dump(mode="json"),
            "skipped": list(done.skipped),
            "seconds": done.seconds,
            "adapters": list(done.adapters),
        }
        click.echo(json.dumps(result, indent=2))
    else:
        out().print(plan_view(done.plan, done.written))
        if verbose:
            out().print(tensors_view(done.written))
        out().print(proof_view(done.report))
    for line in adapter_lines(done.adapters):
        err().print(line)
    if page is not None:
        _write_page(page, done)
    if done.skipped:
        err().print(f"left behind (other formats hold the unconverted weights): {one_line(done.skipped)}")
    if options["verify"] == "none":
        err().print("NOT VERIFIED: the result was published without being measured (--verify none).", style="bold red")
    err().print(f"published {done.folder}", style="bold")
    if target is not None:
        err().print(f"pushed to {target.push(done.folder)}", style="bold")


def _write_page(page: Path, done) -> None:
    from normswap.report.findings.gather import of_folder
    from normswap.report.page.write import write_page

    write_page(of_folder(done.folder, proof=done.report, seconds=done.seconds), page)
    err().print(f"wrote {page}", style="bold")


#: options that go with --undo; what to undo, the folder says
_UNDO_TAKES = ("model", "destination", "undo", "verify", "text", "overwrite", "verbose", "as_json", "page")


def _undo(context: click.Context, model: str, destination: Path, page: Path | None, as_json: bool) -> None:
    import normswap
    from normswap.report.findings.gather import of_undone
    from normswap.report.page.write import check_place, write_page
    from normswap.report.plan import disk_facts
    from normswap.report.proof import proof_view

    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if odd := [name for name in given if name not in _UNDO_TAKES]:
        raise click.UsageError(f"--undo takes no --{odd[0].replace('_', '-')}: what is to be undone, {model} says.")
    options = {name: context.params[name] for name in ("verify", "text", "overwrite")}
    if page is not None:
        check_place(page, model, destination)
    with progress_bars(enabled=not as_json) as progress:
        done = normswap.undo(model, destination, progress=progress, **options)
    if as_json:
        result = {
            "folder": str(done.folder),
            "undone": done.undone.model_dump(mode="json"),
            "disk": disk_facts(done.written),
            "report": done.report.model_dump(mode="json"),
            "same_files": done.same_files,
        }
        click.echo(json.dumps(result, indent=2))
    else:
        out().print(proof_view(done.report))
    if page is not None:
        write_page(of_undone(done, model), page)
        err().print(f"wrote {page}", style="bold")
    words = done.undone.request.words()
    how = (
        "its weights are the source's byte for byte"
        if done.same_files
        else "its weights are the source's but for rounding"
    )
    for name in done.adapters:
        err().print(
            f"{name} was left behind: it is of the converted model. The one that it was made of fits the result."
        )
    err().print(f"undone: {words}; {how}, where nothing was trained since")
    err().print(f"published {done.folder}", style="bold")
