"""The commands of `ia3`. Declaring them imports no torch; what they do imports what it needs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import typer

from . import boundary, doctor, merge, tune, vllm
from .finetune import Finetune
from .generate import Generate

# Everything here works on local files: no library may ask the network, or draw progress bars.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
# What packages that transformers and PEFT import say of themselves, by logger: no user can act on it.
NOISE = {
    "torchao": "Failed to load",  # its kernels of other Python versions and of GPUs; the others load
    "torch.utils._pytree": "Enum subclass",  # torchao, as it registers two of its classes with torch
    "bitsandbytes.backends.cpu.ops": "kernels-community",  # it goes on with its own kernels
}

app = typer.Typer(
    help="Fine-tune language models with (IA)3 vectors, and use what came of it.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("finetune", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(Finetune)
app.command("generate")(Generate)
app.command("doctor")(doctor.run)
app.command("tune")(tune.run)
app.command("vllm-args")(vllm.run)
app.command("merge")(merge.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's).

    Returns the exit code: 0, 2 for an error of the user's, 1 for a bug, 130 for Ctrl-C.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in NOISE:
        logging.getLogger(name).addFilter(is_news)  # once, however often it is added
    settings = boundary.Settings()
    given = sys.argv[1:] if arguments is None else list(arguments)

    def command() -> object:
        result = app(args=given, prog_name="ia3", standalone_mode=False, obj=settings)
        return result.run() if isinstance(result, (Finetune, Generate)) else result

    return boundary.run(command, settings)


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a record is worth a reader's time: a filter for the loggers in NOISE."""
    return NOISE[record.name] not in record.getMessage()


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"ia3-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    traceback: bool = typer.Option(False, "--traceback", help="Show the traceback of an error, to report it."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version, and exit."
    ),
) -> None:
    context.obj.traceback = traceback
