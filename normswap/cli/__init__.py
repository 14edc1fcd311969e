"""The command line: one file per command, each parses, calls the library and prints."""

from normswap.cli.main import main

__all__ = ["main"]
