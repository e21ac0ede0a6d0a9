"""The `distillery` command."""

from distillery_cli.app import main

__all__ = ["main"]
