"""The commands of `ia3` and their options. Only this file knows typer; what the commands call imports torch."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import IA3Error
from . import boundary
from .options import DEVICES, DTYPES, SCHEDULES, Sampling, TrainingOptions

# Everything here works on local files: no library may ask the network, or draw progress bars beside ours.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}

app = typer.Typer(
    help="Fine-tune language models with (IA)3 vectors, and use what came of it.",
    no_args_is_help=True,
    add_completion=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line on `arguments` (default: the process's).

    Returns the exit code: 0, 2 for an error of the user's, 1 for one of ours, 130 for Ctrl-C.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    settings = boundary.Settings()
    given = sys.argv[1:] if arguments is None else list(arguments)
    return boundary.run(lambda: app(args=given, prog_name="ia3", standalone_mode=False, obj=settings), settings)


# --- checks that typer has no words for ---------------------------------------------------------------------------


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check


def _at_least(minimum: int) -> Callable[[int | None], int | None]:
    def check(value: int | None) -> int | None:
        if value is not None and value < minimum:
            raise typer.BadParameter(f"{value} is below {minimum}")
        return value

    return check


def _between(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[float], float]:
    def check(value: float) -> float:
        too_low = value <= low if open_low else value < low
        too_high = value >= high if open_high else value > high
        if too_low or too_high or math.isnan(value):
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
            raise typer.BadParameter(f"{value:g} is not in {bounds}")
        return value

    return check


_positive = _between(0, math.inf, open_low=True, open_high=True)


def _modules(value: str | None) -> list[str] | str | None:
    """Module names as IA3Config wants them: a list, a regular expression (given as `re:...`), or `all-linear`."""
    if value is None or value == "all-linear":
        return value
    if value.startswith("re:"):
        return value.removeprefix("re:")
    return [name.strip() for name in value.split(",") if name.strip()]


# --- options that commands share ----------------------------------------------------------------------------------

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model folder in transformers' format, or a .gguf file.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="TYPE", callback=_one_of(DTYPES), help=f"Type of the frozen weights: {', '.join(DTYPES)}."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", callback=_one_of(DEVICES), help="auto (CUDA if it is there), cpu or cuda."
    ),
]
SeedOption = Annotated[int, typer.Option(callback=_between(0, 2**32 - 1), help="The same seed gives the same result.")]


@app.callback()
def _global(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error, to report it.")
    ] = False,
) -> None:
    context.obj.traceback = traceback


@app.command()
def doctor() -> None:
    """Show what is installed, what was built, and which backend runs what, and why."""
    from . import doctor as command

    command.run()


@app.command()
def finetune(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="UTF-8 text, or JSON Lines (.jsonl) with 'text', or with 'prompt' and 'completion', of which only the "
            "completion is learned.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to make for the adapter, loss curve and metrics."),
    ],
    target_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Layers that get a vector: NAME,NAME,... or re:REGEX or all-linear. Default: the model type's.",
        ),
    ] = None,
    feedforward_modules: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Those of them whose input is scaled: NAME,NAME,... or re:REGEX."),
    ] = None,
    exclude_modules: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Layers that get none: NAME,NAME,... or re:REGEX."),
    ] = None,
    modules_to_save: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Further modules, trained and saved whole: NAME,NAME,..."),
    ] = None,
    fan_in_fan_out: Annotated[
        bool, typer.Option("--fan-in-fan-out", help="The layers store (in, out), as GPT-2's do.")
    ] = False,
    random_init: Annotated[bool, typer.Option("--random-init", help="Start at random values instead of ones.")] = False,
    steps: Annotated[
        int | None, typer.Option(callback=_at_least(1), help="Optimizer steps; wins over --epochs.")
    ] = None,
    epochs: Annotated[float, typer.Option(callback=_positive, help="Passes over the data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(callback=_at_least(1), help="Sequences in a batch.")] = 4,
    accumulation: Annotated[
        int, typer.Option(callback=_at_least(1), help="Batches whose gradients make one step.")
    ] = 1,
    block_size: Annotated[int, typer.Option(callback=_at_least(2), help="Tokens in a sequence, at most.")] = 256,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", callback=_positive, help="AdamW's.")
    ] = 1e-2,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME", callback=_one_of(SCHEDULES), help=f"Of the learning rate: {', '.join(SCHEDULES)}."
        ),
    ] = "constant",
    held_out: Annotated[
        float,
        typer.Option(
            callback=_between(0, 1, open_high=True),
            help="Fraction of the data to keep apart and measure on; 0 for none.",
        ),
    ] = 0.1,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Train (IA)3 vectors on text, and write adapter, loss curve and metrics to a new folder."""
    from . import finetune as command

    command.run(
        command.Job(
            model=model,
            data=data,
            output=output,
            adapter={
                "target_modules": _modules(target_modules),
                "feedforward_modules": _modules(feedforward_modules),
                "exclude_modules": _modules(exclude_modules),
                "modules_to_save": _modules(modules_to_save),
                "fan_in_fan_out": fan_in_fan_out,
                "init_ia3_weights": not random_init,
            },
            training=TrainingOptions(
                steps=steps,
                epochs=epochs,
                batch_size=batch_size,
                accumulation=accumulation,
                learning_rate=learning_rate,
                schedule=schedule,
                seed=seed,
            ),
            block_size=block_size,
            held_out=held_out,
            dtype=dtype,
            device=device,
        )
    )


@app.command()
def generate(
    model: ModelArgument,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with an adapter. Without one, the base model speaks."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text to go on from; may be given several times. Default: what is piped in."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(callback=_at_least(1), help="Tokens to write, at most.")] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            callback=_between(0, math.inf, open_high=True), help="0 takes the likeliest token, more is more random."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(callback=_between(0, 1, open_low=True), help="Sample from the likeliest tokens of this mass."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(callback=_at_least(0), help="Sample from that many of the likeliest tokens; 0 for all.")
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(callback=_positive, help="Above 1 holds back tokens that were there already.")
    ] = 1.0,
    echo: Annotated[bool, typer.Option(help="Write the prompt before its continuation.")] = True,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with a sub-folder for each adapter that --requests may name."),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON Lines: a 'prompt', and if wanted its 'adapter' and 'max_new_tokens', in each. Needs --adapters.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(callback=_at_least(1), help="Requests that run together.")] = 32,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where the answers to --requests go. Default: stdout."),
    ] = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> int:
    """Write continuations of prompts, with an adapter or without; or answer many requests, each with its own."""
    if temperature == 0 and (top_p < 1 or top_k > 0):
        raise IA3Error("--top-p and --top-k choose what to sample from, but --temperature is 0, which does not sample.")
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    if (adapters is None) != (requests is None):
        raise IA3Error("--adapters and --requests belong together; give both, or --adapter and --prompt.")
    if adapters is not None and requests is not None:
        if adapter is not None or prompt:
            raise IA3Error("--requests names its own prompts and adapters; leave --prompt and --adapter out.")
        from . import generate_requests

        return generate_requests.run(
            generate_requests.Job(model, adapters, requests, output, batch_size, sampling, dtype, device)
        )
    if output is not None:
        raise IA3Error("--output is for the answers to --requests; redirect stdout instead.")
    from . import generate as command

    command.run(command.Job(model, adapter, prompt or (), sampling, echo, dtype, device))
    return 0


@app.command()
def tune(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Folder of a model, whose scaled layers are measured.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN", help="A weight to measure; may be given several times.")
    ] = None,
    dtype: Annotated[str, typer.Option(callback=_one_of(DTYPES), help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    rows: Annotated[
        list[int] | None, typer.Option(help="Tokens in a batch; may be given several times. Default: 1 to 16384.")
    ] = None,
) -> None:
    """Measure the matmuls of a model on this GPU, so that scaled_linear takes the fastest."""
    from . import tune as command

    if any(count < 1 for count in rows or ()):
        raise typer.BadParameter("--rows is below 1")
    command.run(model, shape or [], dtype, rows or list(command.ROWS))


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
