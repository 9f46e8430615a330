"""The commands of `ia3`. Parsing them imports no torch; what they call does."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import boundary
from .finetune import Finetune
from .generate import Generate
from .options import DTYPES, one_of

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
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error, to report it.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    context.obj.traceback = traceback


@app.command()
def doctor() -> None:
    """Show what is installed, what was built, and which backend runs what, and why."""
    from . import doctor as command

    command.run()


@app.command()
def tune(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Folder of a model, whose scaled layers are measured.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN", help="A weight to measure; may be given several times.")
    ] = None,
    dtype: Annotated[str, typer.Option(callback=one_of(DTYPES), help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    rows: Annotated[
        list[int] | None, typer.Option(help="Tokens in a batch; may be given several times. Default: 1 to 16384.")
    ] = None,
) -> None:
    """Measure the matmuls of a model on this GPU, so that scaled_linear takes the fastest."""
    from . import tune as command

    if any(count < 1 for count in rows or ()):
        raise typer.BadParameter("--rows is below 1")
    command.run(model, shape or [], dtype, rows or list(command.ROWS))


@app.command("vllm-args")
def vllm_args(
    adapters: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="The adapters' folders.")],
    model: Annotated[str | None, typer.Option(help="The model, where the adapters name another or none.")] = None,
    by_name: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Serve whatever adapters are in this folder, now or later.")
    ] = None,
) -> None:
    """Print the command that serves adapters with vLLM."""
    from . import vllm as command

    command.run(adapters, model, by_name)


@app.command()
def merge(
    base: Annotated[Path, typer.Option(metavar="FOLDER", help="The model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Option(metavar="FOLDER", help="The adapter.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to make for the merged model.")],
    link: Annotated[
        bool, typer.Option("--link", help="Hard links, not copies, for weight files that the adapter leaves alone.")
    ] = False,
) -> None:
    """Merge an adapter into a copy of a model's safetensors files, tensor by tensor, without loading the model."""
    from . import merge as command

    command.run(base, adapter, out, link)
