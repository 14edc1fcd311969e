"""`python -m normswap`: the command line."""

from normswap.cli.process import run

run()
