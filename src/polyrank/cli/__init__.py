"""The command `polyrank`."""

from polyrank.cli.main import main

__all__ = ["main"]
