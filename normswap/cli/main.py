"""`normswap`: the group of commands, and what happens to errors."""

from __future__ import annotations

import importlib
import os
import sys

import click

from normswap.errors import NormswapError, RefusedError
from normswap.report.printable import printable

#: command -> the first line of its help; the file of that name is imported when the command is used
COMMANDS = {
    "inspect": "Show what the norms of a model are, and where.",
    "plan": "Show what a conversion would do, without doing it.",
    "norms": "List the kinds of norm that can be asked for.",
    "convert": "Convert a checkpoint, verify the result and publish it.",
    "verify": "Measure how far two checkpoints are apart.",
    "report": "Show what was done to a model, as a page and as tables.",
    "kernels": "Show which fused kernel each norm would get.",
    "finetune": "Convert a checkpoint and heal it, as a recipe says.",
    "recipe": "Look at recipes: list, show, validate, schema.",
}


class Commands(click.Group):
    """Commands in files of their own, so that `normswap --help` does not import torch."""

    def list_commands(self, context):
        return list(COMMANDS)

    def get_command(self, context, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"normswap.cli.{name}").command

    def format_commands(self, context, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, context):
        try:
            return super().invoke(context)
        except NormswapError as error:
            _end(error)
            sys.exit(2)
        except KeyboardInterrupt as error:
            for line in ("Interrupted.", *getattr(error, "__notes__", ())):
                click.echo(printable(line), err=True)
            sys.exit(130)  # as a shell says of a command that Ctrl-C ended


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="normswap")
def main() -> None:
    """Change the norms of trained Hugging Face checkpoints: their kind, their weights, their place.

    \b
    normswap inspect MODEL
    normswap plan MODEL --norm rmsnorm
    normswap convert MODEL OUT --norm rmsnorm
    normswap convert MODEL OUT --placement post
    normswap verify MODEL OUT
    normswap report OUT
    normswap kernels MODEL
    normswap finetune RECIPE

    MODEL is a folder with config.json and *.safetensors, or a Hub id. Results go to stdout, messages to stderr.
    """


def _end(error: NormswapError) -> None:
    """Say what it is: in one of several processes, or, where it came to one alone, in that one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _print_error(error)
        return
    from normswap.tune.processes import all_end, is_main

    if is_main():
        _print_error(error)
    if not all_end() and not is_main():
        _print_error(error)


def _print_error(error: NormswapError) -> None:
    kind = "Refused" if isinstance(error, RefusedError) else "Error"
    text = " ".join([str(error), *getattr(error, "__notes__", ())])
    click.echo(f"{click.style(kind, fg='red', bold=True)}: {printable(text)}", err=True)
