"""Seconds of a training step: forward, backward and zeroing of gradients, without an optimizer."""

from __future__ import annotations

from .. import llama, training
from ..measure import interleave
from ..records import Recorder
from ..settings import Settings


def run(settings: Settings, recorder: Recorder) -> None:
    """Measures every implementation in each dtype."""
    config = llama.config(settings)
    for dtype in settings.dtypes:
        inputs = training.batch(settings, dtype, config.hidden_size, config.vocab_size)
        steps = {
            impl: training.step_function(impl, model.train(), inputs)
            for impl, model in llama.models(settings, dtype, settings.implementations).items()
        }
        llama.check_agreement({impl: step() for impl, step in steps.items()}, dtype)
        times = interleave(steps, settings.rounds(12), warmup=2, device=settings.device)
        batch, tokens = inputs.labels.shape
        recorder.add_times(
            "train_step", f"{llama.describe(config)}, batch {batch}x{tokens}", dtype, times, llama.BASELINES
        )
