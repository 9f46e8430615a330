"""The command line. The entry point `ia3` calls `main`; the steps behind its commands are modules of their own."""

from .app import main

__all__ = ["main"]
