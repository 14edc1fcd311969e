"""`normswap finetune`"""

from __future__ import annotations

import json
from typing import Any

import click

from normswap.cli.options import err, json_option, out, progress_bars, quiet, report_option


@click.command("finetune")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print the plan, the stages, the tokens and the memory; train nothing.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; rates and guards may be others.")
@click.option("--restart", is_flag=True, help="Throw away a run that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Replace a model folder at the output, once the new one is complete.")
@report_option
@json_option
def command(recipe, overrides, dry_run, resume, restart, overwrite, page, as_json) -> None:
    """Carry out RECIPE, a YAML file or the name of a recipe that ships with normswap: convert a checkpoint and heal it.

    Keys of the recipe are set from the command line, items of lists by their number.

    \b
    normswap finetune my-recipe.yaml
    normswap finetune to-dyt model=./my-gpt2 output=./my-gpt2-dyt data.source=corpus.txt
    normswap finetune my-recipe.yaml stages.0.tokens=200000 training.seed=1 --dry-run
    normswap finetune my-recipe.yaml --resume
    normswap finetune my-recipe.yaml --resume stages.0.learning_rate=1e-4
    torchrun --nproc-per-node 4 -m normswap finetune my-recipe.yaml
    """
    quiet()
    from normswap.tune import extras

    extras.check()
    from normswap.tune.processes import is_main
    from normswap.tune.recipe import Recipe

    resolved = Recipe.of(recipe, overrides)
    if dry_run:
        _dry_run(resolved, as_json)
        return
    if page is not None:
        from normswap.report.page.write import check_place

        check_place(page, resolved.output)
    from normswap.report.training import scores_table
    from normswap.tune.run import finetune

    with progress_bars(enabled=is_main() and not as_json) as progress:
        try:
            done = finetune(resolved, resume=resume, restart=restart, overwrite=overwrite, progress=progress, say=_say)
        except KeyboardInterrupt:
            if is_main():
                words = "interrupted; the same command with --resume goes on from the last checkpoint"
                err().print(words, style="bold red")
            raise click.exceptions.Exit(130) from None
    if not is_main():
        return
    if as_json:
        result = {
            "folder": str(done.folder),
            "scores": done.scores,
            "tokens": done.tokens,
            "minutes": done.minutes,
            "folded": done.folded,
            "changes": [change.model_dump() for change in done.changes],
            "recipe": resolved.model_dump(mode="json"),
        }
        click.echo(json.dumps(result, indent=2))
    else:
        out().print(scores_table(done.scores, done.tokens, done.minutes))
    if page is not None:
        from normswap.report.page.write import write_report

        write_report(done.folder, page)
        err().print(f"wrote {page}", style="bold")
    err().print(f"published {done.folder}", style="bold")


def _dry_run(recipe, as_json: bool) -> None:
    from normswap.report.training import dry_run_view
    from normswap.tune.dry_run import foresee
    from normswap.tune.processes import is_main

    with progress_bars(enabled=not as_json) as progress:
        found = foresee(recipe, progress)
    if not is_main():
        return
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        out().print(dry_run_view(found, recipe))


#: what a log line has, in order, and how
_SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "gradient {:.2f}",
    "learning_rate": "rate {:.1e}",
    "ramp": "ramp {:.3f}",
    "eval_mean": "held out {:.4f}",
    "eval_p99.9": "p99.9 {:.2f}",
}


def _say(entry: dict[str, Any]) -> None:
    """A line of the log, on stderr."""
    if "note" in entry:
        err().print(f"{entry['run']}: {entry['note']}")
    words = [form.format(entry[key]) for key, form in _SHOWN.items() if isinstance(entry.get(key), float)]
    if "loss" in entry or "eval_mean" in entry:
        err().print(f"{entry['run']}, {entry['stage']}, step {entry['step']}: {', '.join(words)}")
