"""The command line: fastckpt ls | show | check | analyze | prune | restore | salvage | trace (docs/cli.md)."""

from fastckpt.cli.main import main
from fastckpt.cli.output import BAD_CHECKPOINT, FOUND_DAMAGE, INTERRUPTED, OK, OS_ERROR, USAGE, human

__all__ = ["BAD_CHECKPOINT", "FOUND_DAMAGE", "INTERRUPTED", "OK", "OS_ERROR", "USAGE", "human", "main"]
