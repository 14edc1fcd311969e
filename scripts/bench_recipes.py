"""How far the recipes heal: held-out loss before and after, beside the same training of the unconverted model.

    .venv/bin/python scripts/bench_recipes.py --text corpus.txt --minilm ./all-MiniLM-L6-v2
    .venv/bin/python scripts/bench_recipes.py --text corpus.txt --only 'to-dyt gpt2*'

The text is Tiny Shakespeare, of which the checkpoints saw the first 97%; its last 3% are held out. A line of the table
is kept in `--work` when it is done, so that a run that was stopped goes on where it was. About five minutes a line on
two cores. The table goes to scripts/results/recipes.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from fnmatch import fnmatchcase
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers

from normswap.cli.options import err, progress_bars, quiet
from normswap.tune.objectives import TAUGHT
from normswap.tune.recipe import Recipe
from normswap.tune.run import finetune

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "scripts" / "results" / "recipes.md"
MODELS = ("gpt2-shakespeare", "llama-shakespeare")
#: recipe -> how far from its control it is to come, in nats per token
TARGETS = {"pre-to-post": 0.01, "remove-norms": 0.03, "to-dyt": 0.03, "to-repbn": 0.03}
OTHERS = ("to-sandwich", "add-qk-norm")
#: each for the one of the models that has such norms
KINDS = ("layernorm-to-rmsnorm", "rmsnorm-to-layernorm")
#: of the recipe on sentence embeddings: one minus the mean cosine
EMBEDDINGS = ("post-to-pre", 0.005)


@click.command()
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False), help="Tiny Shakespeare.")
@click.option("--minilm", type=click.Path(exists=True, file_okay=False), help="all-MiniLM-L6-v2, a BERT.")
@click.option("--only", default="*", show_default=True, help="Pattern of 'recipe model'.")
@click.option("--tokens", type=int, help="Of each training; by default as the recipes say.")
@click.option("--work", default="bench-recipes", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def main(text: str, minilm: str | None, only: str, tokens: int | None, work: Path) -> None:
    quiet()
    work.mkdir(parents=True, exist_ok=True)
    common = [f"data.source={text}", "data.held_out=0.03", "verify=fast"]
    trained = ROOT / "tests" / "checkpoints"
    lines = {f"{recipe} {m}": [f"model={trained / m}"] for m in MODELS for recipe in (*TARGETS, *OTHERS)}
    lines |= {f"{recipe} {m}": [f"model={trained / m}"] for recipe, m in zip(KINDS, MODELS, strict=True)}
    if minilm:
        lines[f"{EMBEDDINGS[0]} all-MiniLM-L6-v2"] = [f"model={minilm}", "data.held_out=0.1"]
    for name, overrides in lines.items():
        kept = work / f"{name.replace(' ', '_')}.json"
        if kept.exists() or not fnmatchcase(name, only):
            continue
        length = [f"stages.0.tokens={tokens}"] if tokens else []
        recipe = Recipe.of(name.split()[0], (*common, *length, *overrides, f"output={kept.with_suffix('')}"))
        if recipe.objective[0].kind in TAUGHT:  # the source is at no distance from itself, and does not learn
            _run(name, recipe, kept)
            continue
        control = _control(recipe, work)
        if not control.exists():
            plain = Recipe.of(_plain(recipe) | {"output": str(control.with_suffix(""))})
            _run(f"control of {name}", plain, control)
        _run(name, recipe, kept, control=json.loads(control.read_text())["scores"]["healed"])
    RESULTS.write_text(_table(work, lines))
    click.echo(RESULTS.read_text())


def _run(name: str, recipe: Recipe, kept: Path, **scores: dict[str, float]) -> None:
    """Carry out a recipe, and keep what it gives, with `scores` of other models beside it."""
    err().print(name, style="bold")
    with progress_bars() as progress:
        done = finetune(recipe, restart=True, overwrite=True, progress=progress)
    found = {"scores": done.scores | scores, "tokens": done.tokens, "minutes": done.minutes, "folded": done.folded}
    kept.write_text(json.dumps(found, indent=1))


def _plain(recipe: Recipe) -> dict:
    """The same training of the unconverted model, which recipes of one length have in common."""
    plain = recipe.model_dump(mode="json") | {"surgery": [], "output": ""}
    plain["stages"] = [stage | {"taper": None, "train": "all", "name": ""} for stage in plain["stages"]]
    plain["data"]["calibration_tokens"] = 64
    return plain


def _control(recipe: Recipe, work: Path) -> Path:
    """Where the control of a recipe is kept."""
    digest = hashlib.sha256(json.dumps(_plain(recipe), sort_keys=True).encode()).hexdigest()[:12]
    return work / f"control_{digest}.json"


def _table(work: Path, lines: dict[str, list[str]]) -> str:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    columns = ["recipe", "checkpoint", "source", "before", "after", "control", "after - control", "wanted", "tokens"]
    columns += ["minutes", "fold"]
    rows = [
        "<!-- scripts/bench_recipes.py -->",
        f"{versions}, {os.cpu_count()} CPU cores",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name in lines:
        kept = work / f"{name.replace(' ', '_')}.json"
        if not kept.exists():
            continue
        found, (recipe, model) = json.loads(kept.read_text()), name.split()
        means = {key: value["mean"] for key, value in found["scores"].items()}
        control = means.get("control", means["source"])
        wanted = EMBEDDINGS[1] if recipe == EMBEDDINGS[0] else TARGETS.get(recipe)
        numbers = [*(f"{means[key]:.4f}" for key in ("source", "start", "healed")), f"{control:.4f}"]
        numbers += [f"{means['healed'] - control:+.4f}", "" if wanted is None else f"{wanted:g}"]
        numbers += [
            str(found["tokens"]),
            f"{found['minutes']:.1f}",
            "" if found["folded"] is None else f"{found['folded']:.0e}",
        ]
        rows.append(f"| {recipe} | {model} | {' | '.join(numbers)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
