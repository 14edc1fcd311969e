"""`normswap verify`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from normswap.cli.options import err, json_option, out, progress_bars, quiet, report_option


@click.command("verify")
@click.argument("a")
@click.argument("b")
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="UTF-8 text to compare on.")
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="How many tokens to run.")
@click.option("--dtype", metavar="DTYPE", help="What both compute in; float64 or, for half-precision weights, float32.")
@click.option("--device", metavar="DEVICE", help="Where to run: cpu, cuda ...")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run model code that comes with the checkpoints. Off by default."
)
@report_option
@json_option
def command(a, b, text, tokens, dtype, device, trust_remote_code, page, as_json) -> None:
    """Measure how far the checkpoints A and B, of one vocabulary, are apart, and where they part first.

    \b
    normswap verify ./my-gpt2 ./my-gpt2-rms
    normswap verify ./my-gpt2 ./my-gpt2-rms --text held-out.txt --json
    normswap verify ./my-gpt2 ./my-gpt2-rms --report report.html
    """
    quiet()
    import normswap
    from normswap.report.comparison import comparison_table

    if page is not None:
        from normswap.report.page.write import check_place

        check_place(page, a, b)
    with progress_bars(enabled=not as_json) as bars:
        report = normswap.verify(
            a,
            b,
            text=text,
            tokens=tokens,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: bars("comparing", done, total),
        )
    if page is not None:
        from normswap.report.findings.gather import of_comparison
        from normswap.report.page.write import write_page

        write_page(of_comparison(report, trust_remote_code), page)
        err().print(f"wrote {page}", style="bold")
    if as_json:
        # in ASCII, as everywhere: texts and names may hold what moves the cursor
        click.echo(json.dumps(json.loads(report.model_dump_json()), indent=2))
    else:
        out().print(comparison_table(report))
