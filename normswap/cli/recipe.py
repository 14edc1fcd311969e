"""`normswap recipe`"""

from __future__ import annotations

import json

import click

from normswap.cli.options import err, json_option, out


@click.group("recipe")
def command() -> None:
    """Look at recipes, those that ship with normswap and your own.

    \b
    normswap recipe list
    normswap recipe show to-dyt > my-recipe.yaml
    normswap recipe validate my-recipe.yaml
    normswap recipe schema
    """


@command.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """List the recipes that ship with normswap, and what each is for."""
    from rich.table import Table

    from normswap.tune.shipped import shipped

    about = {name: _purpose(path.read_text(encoding="utf-8")) for name, path in shipped().items()}
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    table = Table("recipe", "what for", box=None)
    for name, text in about.items():
        table.add_row(name, text)
    out().print(table)


@command.command("show")
@click.argument("recipe")
@click.option("--resolved", is_flag=True, help="With all that it leaves out filled in.")
def show(recipe: str, resolved: bool) -> None:
    """Print RECIPE, a name or a file."""
    from normswap.tune.recipe import Recipe
    from normswap.tune.shipped import find

    text = Recipe.of(recipe).to_yaml() if resolved else find(recipe).read_text(encoding="utf-8")
    click.echo(text, nl=False)


@command.command("validate")
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
def validate(recipes: tuple[str, ...]) -> None:
    """Check each RECIPE, a name or a file, without its model or data. All faults are listed."""
    from normswap.errors import RecipeError
    from normswap.tune.recipe import Recipe

    faults = []
    for recipe in recipes:
        try:
            Recipe.of(recipe)
            err().print(f"{recipe}: in order")
        except RecipeError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError("\n".join(faults))


@command.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors that check YAML while you write."""
    from normswap.tune.recipe import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def _purpose(text: str) -> str:
    """The first comment of a recipe."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.removeprefix("#").strip():
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
