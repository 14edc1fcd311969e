"""The numbers of the README, measured again: conversions of the trained checkpoints, and inspection at full size.

.venv/bin/python scripts/measure.py                                  # prints Markdown tables
.venv/bin/python scripts/measure.py --placement                      # moved norms, calibrated on the shipped text
.venv/bin/python scripts/measure.py --placement --text corpus.txt    # and on another one, four times as much of it
.venv/bin/python scripts/measure.py --norms                          # fitted norms, and what they begin as elsewhere
"""

from __future__ import annotations

import copy
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers
from transformers.utils import logging

import normswap
from normswap.calibration.data import TOKENS, WINDOW, text_data
from normswap.checkpoint.source import Source
from normswap.verification.metrics import TokenComparison
from normswap.verification.outputs import outputs_of
from starts import best_start

CHECKPOINTS = Path(__file__).parent.parent / "tests" / "checkpoints"
CONVERSIONS = [
    ("gpt2-shakespeare", "--norm rmsnorm", dict(norm="rmsnorm")),
    ("gpt2-shakespeare", "--norm rmsnorm --tied untie", dict(norm="rmsnorm", tied="untie")),
    ("gpt2-shakespeare", "--norm rmsnorm --fold --tied untie", dict(norm="rmsnorm", fold=True, tied="untie")),
    ("gpt_neox-shakespeare", "--norm rmsnorm", dict(norm="rmsnorm")),
    ("gpt_neox-shakespeare", "--norm rmsnorm --fold", dict(norm="rmsnorm", fold=True)),
    ("llama-shakespeare", "--fold", dict(fold=True)),
]
FITTED, FITTED_TOKENS = ("dyt", "derf", "none", "none-eps", "repbn"), 32768
PLACEMENTS = ("post", "deepnorm", "sandwich", "reordered", "keel")
# shapes of well-known models, built without weights: type, sizes, what to plan
FULL_SIZE = {
    "Llama 7B": ("llama", dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                               num_attention_heads=32, vocab_size=32000), dict(fold=True)),
    "Llama 70B": ("llama", dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                num_attention_heads=64, num_key_value_heads=8, vocab_size=128256), dict(fold=True)),
    "GPT-NeoX 20B": ("gpt_neox", dict(hidden_size=6144, intermediate_size=24576, num_hidden_layers=44,
                                      num_attention_heads=64, vocab_size=50432), dict(norm="rmsnorm", fold=True)),
    "Phi-MoE 371B": ("phimoe", dict(hidden_size=8192, intermediate_size=14336, num_hidden_layers=64,
                                    num_attention_heads=64, num_key_value_heads=8, num_local_experts=16),
                     dict(norm="rmsnorm")),
    "Mixtral 411B": ("mixtral", dict(hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
                                     num_attention_heads=48, num_key_value_heads=8, num_local_experts=24),
                     dict(fold=True)),
    "DeepSeek-V3 671B": ("deepseek_v3", dict(), dict(fold=True)),
    "LLaVA 7B": ("llava", dict(), dict(norm="rmsnorm", fold=True)),
}  # fmt: skip


@click.command()
@click.option("--full-size", "name", type=click.Choice(list(FULL_SIZE)), hidden=True)
@click.option("--placement", is_flag=True, help="Move norms instead, and measure what that costs.")
@click.option("--norms", is_flag=True, help="Fit norms of other kinds instead, and measure what that costs.")
@click.option("--text", metavar="FILE", help="With --placement, calibrate on this text as well, for post.")
@click.option("--only", metavar="NAME", help="With --placement or --norms, this checkpoint alone.")
def main(name: str | None, placement: bool, norms: bool, text: str | None, only: str | None) -> None:
    """Measure and print the tables of the README."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is not None:
        _full_size(*FULL_SIZE[name])
        return
    if text is not None and not placement:
        raise click.UsageError("--text is for --placement.")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {os.cpu_count()} CPU cores\n")
    if placement or norms:
        _placements(text, only) if placement else _norms(only)
        return
    print("| checkpoint | conversion | worst error, float64 | worst error, float32 | nats, float32 | nats, bfloat16 |")
    print("|---|---|---|---|---|---|")
    for name, words, request in CONVERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            source, half = CHECKPOINTS / name, Path(folder) / "half"
            report = normswap.convert(source, Path(folder) / "out", **request).report
            normswap.convert(source, half, **request, dtype="bfloat16", verify="fast")
            cost = _nats(normswap.verify(source, half, dtype="bfloat16"))
        exact, stored = report.mathematics.comparison.output, report.stored
        print(
            f"| {name} | `{words}` | {exact.error.max:.1e} | {stored.comparison.output.error.max:.1e} "
            f"| {_nats(stored):+.1e} | {cost:+.1e} |"
        )
    print(
        "\n| configuration, no weights | norms | plan | converted | seconds | peak memory |\n|---|---|---|---|---|---|"
    )
    for name, (_, _, request) in FULL_SIZE.items():
        command = [sys.executable, __file__, "--full-size", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        words = " ".join(f"--{key} {value}" if isinstance(value, str) else f"--{key}" for key, value in request.items())
        print(
            f"| {name} | {found['norms']} | `{words}` | {found['converted']} | {found['seconds']:.1f} "
            f"| {found['gib']:.2f} GiB |"
        )


def _placements(text: str | None, only: str | None) -> None:
    """What moving every block costs, in nats of KL on the text that `verify` takes, which no calibration sees."""
    print("| checkpoint | placement | tokens | KL, mean | median | p99.9 | same top-1 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in dict.fromkeys(name for name, _, _ in CONVERSIONS if only in (None, name)):
            runs = [(placement, None, TOKENS) for placement in PLACEMENTS]
            if text is not None:
                runs.insert(1, ("post", text, 4 * TOKENS))
            for number, (placement, corpus, tokens) in enumerate(runs):
                moved = Path(folder) / f"{checkpoint}-{number}"
                try:
                    done = normswap.convert(
                        CHECKPOINTS / checkpoint, moved, placement=placement, text=corpus, tokens=tokens, verify="none"
                    )
                except normswap.RefusedError as error:
                    print(f"| {checkpoint} | {placement} | refused: {str(error).splitlines()[0]} |")
                    continue
                found = normswap.verify(CHECKPOINTS / checkpoint, moved).comparison.output
                print(
                    f"| {checkpoint} | {placement} | {done.plan.calibrated_on} | {found.kl.mean:.2g} "
                    f"| {found.kl.median:.2g} | {found.kl.p999:.2g} | {found.top1:.1%} |",
                    flush=True,
                )


def _norms(only: str | None) -> None:
    """What fitted norms cost, and what they cost as they begin elsewhere, on text that no calibration sees."""
    print("| checkpoint | norm | KL at the start | which start | KL, fitted | times lower | p99.9 | same top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    rounded: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in dict.fromkeys(name for name, _, _ in CONVERSIONS if only in (None, name)):
            source = CHECKPOINTS / checkpoint
            data = text_data(Source.open(source), None, TOKENS, WINDOW, None)()
            for kind in (None, *FITTED):
                out = source
                if kind is not None:
                    out = Path(folder) / f"{checkpoint}-{kind}"
                    plan = normswap.plan(source, norm=kind, calibrate=True, tokens=FITTED_TOKENS)
                    normswap.convert(source, out, plan=plan, verify="none")
                    # an eps that outweighs variances is another form of a frozen scale, and begins as that does
                    start, words = best_start(data.model, kind.removesuffix("-eps"), data.batches, data.measured)
                    found = normswap.verify(source, out).comparison.output
                    print(
                        f"| {checkpoint} | {kind} | {start:.2g} | {words} | {found.kl.mean:.2g} "
                        f"| {start / found.kl.mean:.0f} | {found.kl.p999:.2g} | {found.top1:.1%} |",
                        flush=True,
                    )
                rounded.append(_rounded(checkpoint, kind, out))
    print("\n| checkpoint | norm | weights in bfloat16: KL | worst error | computed in it too: KL | worst error |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rounded))


def _rounded(checkpoint: str, kind: str | None, whole: Path) -> str:
    """What storing a model in bfloat16 costs it, and what computing in bfloat16 does: a row of a table."""
    model = normswap.load(whole) if kind else transformers.AutoModelForCausalLM.from_pretrained(whole)
    held = model.state_dict()
    stored = {name: t.bfloat16().to(t.dtype) if t.is_floating_point() else t for name, t in held.items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(stored)
    batches = text_data(Source.open(CHECKPOINTS / checkpoint), None, TOKENS, WINDOW, None)().measured
    cells = []
    model = model.double().eval()
    for dtype in (torch.float64, torch.bfloat16):
        twin = twin.to(dtype).eval()
        comparison = TokenComparison(distributions=True)
        for inputs in batches:
            outputs = (outputs_of(m, inputs, False, "") for m in (model, twin))
            comparison.add(*(found["logits"].double() for found in outputs))
        metrics = comparison.metrics()
        cells += [f"{metrics.kl.mean:.1e}", f"{metrics.error.max:.1e}"]
    return f"| {checkpoint} | {kind or 'as it is'} | {' | '.join(cells)} |"


def _full_size(model_type: str, sizes: dict, request: dict) -> None:
    """Inspect and plan one configuration, in a process of its own for the sake of peak memory."""
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    classes = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    architecture = next(c._model_mapping[type(config)] for c in classes if type(config) in c._model_mapping)
    inputs = _picture_and_text(config) if hasattr(config, "vision_config") else None
    with tempfile.TemporaryDirectory() as folder:
        written = {**config.to_dict(), "architectures": [architecture.__name__]}
        (Path(folder) / "config.json").write_text(json.dumps(written))
        start = time.perf_counter()
        plan = normswap.plan(folder, partial=True, inputs=inputs, **request)  # which inspects first
        seconds = time.perf_counter() - start
        norms = len(normswap.inspect(folder, inputs=inputs).sites)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(norms=norms, converted=len(plan.converted), seconds=seconds, gib=peak)))


def _picture_and_text(config) -> dict[str, torch.Tensor]:
    """One picture and a few words, for a model that puts one token per patch into the text."""
    side = config.vision_config.image_size
    patches = (side // config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, *[config.image_token_id] * patches, 2, 3, 4]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, side, side))


def _nats(report) -> float:
    """Change of the mean cross-entropy."""
    output = report.comparison.output
    return output.cross_entropy_b.mean - output.cross_entropy_a.mean


if __name__ == "__main__":
    main()
