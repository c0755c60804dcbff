"""The learning-rate range test of a phase: training steps with a learning rate that grows exponentially."""

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.config.phases import AutoPhases, Phase, Schedule
from trainer.config.schema import RequestedConfig, derive_teacher_config
from trainer.context import PhaseRun, RunContext, open_phase
from trainer.data.images import convert_data_errors
from trainer.data.remote import show_addresses_in_errors
from trainer.data.sharding import count_steps_per_epoch
from trainer.errors import ConfigError
from trainer.models.freezing import set_trainable_layers
from trainer.monitoring.log import log
from trainer.rates.curve import Bounds, Suggestion, count_steps_per_decade, has_diverged, smooth, suggest
from trainer.report.figures import to_svg
from trainer.report.page import INDEX, render, require_replaceable_page, write_output
from trainer.report.scatter import draw_rates
from trainer.runs.folder import open_run_folder
from trainer.storage.base import encode_json
from trainer.storage.path import storage_path
from trainer.train import choose_inputs, make_plan, restore, set_up

SUMMARY = "rates.json"  # name of the file with the result of `summarize`, next to the HTML page


def run_range_test(config: RequestedConfig, phase: str | None, bounds: Bounds, output: str) -> None:
    """Test learning rates for a phase, print a summary with a suggestion, and write index.html and rates.json.

    The run is set up in a temporary folder, which is deleted at the end.

    Args:
        config: the run's configuration.
        phase: name of the phase to test; None means the first phase.
        bounds: learning rates of the first and the last step.
        output: folder for index.html and rates.json, a local path or a bucket address.

    Raises:
        ConfigError: the phase does not exist, the run would train its teacher first, or the loss is not finite.
        StopRequested: the process has received a signal.
        TrainerError: the run cannot be set up, for example because the data cannot be read.
    """
    page_folder = storage_path(output)
    require_replaceable_page(page_folder, "trainer.rates", SUMMARY)
    if phase is not None and not isinstance(config.phases, AutoPhases):
        require_phase(phase, config.phases)
    if derive_teacher_config(config):
        fix = "leave it out, or give the output_dir of a trained teacher, without distillation.model"
        raise ConfigError("is not trained in a range test", key="distillation.teacher", value="train", fix=fix)
    with tempfile.TemporaryDirectory(prefix="kubetune-rates-") as temporary_dir:
        test_config = config.model_copy(update={"output_dir": f"{temporary_dir}/run", "resume": "auto"})
        stop, control = StopFlag(), ControlChannel(discover(environment={}), connections={})
        run_folder = open_run_folder(test_config)
        try:
            run, divisions, _, rss_bytes = set_up(test_config, run_folder, control, stop, time.time())
            try:
                name = phase or next(iter(run.config.phases))
                require_phase(name, run.config.phases)  # phases=auto has only now chosen the phases
                original_phase = run.config.phases[name]
                use_test_phase(run, name, bounds)
                with show_addresses_in_errors(run.images.addresses):
                    _, sharding = restore(run)
                    features, compiled, teacher = choose_inputs(run, run_folder, {name: divisions[name]}, rss_bytes)
                    run.plan = make_plan(run, features, compiled, teacher, sharding)
                    rates, losses = measure_losses(run, name)
            finally:
                run.metrics.close()
                run.images.close()
        finally:
            run_folder.abandon()
    smoothed = smooth(losses)
    suggestion = suggest(rates, smoothed)
    lines = describe(name, original_phase, rates, smoothed, suggestion)
    results = summarize(name, original_phase, rates, losses, suggestion)
    write_output(page_folder, SUMMARY, encode_json(results))
    write_output(page_folder, INDEX, render_page(name, lines, rates, losses, smoothed, suggestion))
    print("\n".join(lines))
    log.info(f"page: {page_folder / INDEX}")


def require_phase(name: str, phases: Mapping[str, Phase]) -> None:
    """Raise a ConfigError about the argument `phase` if there is no phase of this name."""
    if name not in phases:
        fix = f"use {' or '.join(phases)}"
        raise ConfigError("is not a phase of the configuration", key="phase", value=name, fix=fix)


def use_test_phase(run: RunContext, name: str, bounds: Bounds) -> None:
    """Replace all phases in the configuration of `run` by one: the phase `name`, changed for the test."""
    steps_per_epoch = count_steps_per_epoch(run.images.dataset.splits["train"], run.config.training.batch_size)
    phase = make_test_phase(run.config.phases[name], bounds, steps_per_epoch)
    debug = run.config.debug.model_copy(update={"max_steps": None})
    run.config = run.images.config = run.config.model_copy(update={"phases": {name: phase}, "debug": debug})


def make_test_phase(phase: Phase, bounds: Bounds, steps_per_epoch: int) -> Phase:
    """Return a copy of a phase that ends when its learning rate has grown from the lowest to the highest bound."""
    steps_per_decade = count_steps_per_decade(bounds, steps_per_epoch)
    num_steps = int(np.ceil(np.log10(bounds.highest / bounds.lowest) * steps_per_decade - 1e-9)) + 1
    schedule = Schedule.model_validate({"name": "exponential", "decay": 10.0, "every": f"{steps_per_decade} steps"})
    optimizer = phase.optimizer.model_copy(update={"learning_rate": bounds.lowest})
    length = {"epochs": None, "examples": None, "steps": num_steps}
    return phase.model_copy(update={"schedule": schedule, "optimizer": optimizer, **length})


def measure_losses(run: RunContext, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Train the test phase `name` until the loss diverges. Return each step's learning rate and loss, float64 [n].

    A step's loss is the mean over its batch, before the step updates the weights. The first step whose loss is not
    finite, and all later steps, are omitted.

    Raises:
        ConfigError: the first or second loss is not finite.
        DataError: the images of the batches cannot be read.
        StopRequested: the process has received a signal.
    """
    phase = run.config.phases[name]
    max_steps = run.config.count_phase_steps(phase, run.plan.sharding.steps_per_epoch)
    freezing = set_trainable_layers(
        run.classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay
    )
    log.info(f"phase {name}: up to {max_steps} steps of {phase.optimizer.name}")
    phase_run = open_phase(run, name, freezing, max_steps)
    losses = np.zeros(0)
    while len(losses) < max_steps and not (len(losses) and has_diverged(losses)):
        losses = np.concatenate([losses, _run_steps(run, phase_run, min(5, max_steps - len(losses)), len(losses))])
        run.worker.stop.check("during the range test")
    phase_run.batches = None  # deletes the pipeline, which ends its prefetching
    phase_run.gate.close()
    rates = np.array([float(phase_run.schedule(step)) for step in range(len(losses))])
    num_finite = len(losses) if np.isfinite(losses).all() else int(np.argmax(~np.isfinite(losses)))
    if num_finite < 2:
        problem, fix = "the loss is not finite from the first steps on", "use a smaller one"
        raise ConfigError(problem, key="lowest", value=f"{rates[0]:g}", fix=fix)
    return rates[:num_finite], losses[:num_finite]


def _run_steps(run: RunContext, current: PhaseRun, count: int, step: int) -> np.ndarray:
    """Run `count` training steps, the first with index `step`, and return their mean losses, float64 [count].

    The loss of a step without readable images is NaN.
    """
    with convert_data_errors(current.inputs.training):
        current.gate.wait_for(count * run.config.training.batch_size)
        sums, _, _ = current.step.run(current.batches, count, step, step)
    run.images.require_readable()
    loss_sums, _, num_examples = sums.astype(np.float64).T
    return np.divide(loss_sums, num_examples, out=np.full(len(loss_sums), np.nan), where=num_examples > 0)


def describe(
    name: str, phase: Phase, rates: np.ndarray, smoothed: np.ndarray, suggestion: Suggestion | None
) -> list[str]:
    """Return the lines of a test's summary. If there is no suggestion, they state that the loss does not decrease.

    Args:
        name: name of the phase.
        phase: configuration of the phase, with the learning rate of the run.
        rates: learning rate of each step, float [n].
        smoothed: smoothed loss of each step, float [n].
        suggestion: result of `trainer.rates.curve.suggest`.
    """
    lines = [f"phase {name}, {phase.optimizer.name}: {len(rates)} steps, learning rates {rates[0]:.1e} to "
             f"{rates[-1]:.1e}"]  # fmt: skip
    if suggestion is None:
        return [*lines, "the loss does not decrease in this range: no rate is suggested"]
    key = f"phases.{name}.optimizer.learning_rate"
    return [
        *lines,
        f"  loss {smoothed[0]:.3f}, at its minimum {smoothed.min():.3f}",
        f"  steepest descent          {suggestion.steepest:.1e}",
        f"  a tenth of the minimum's  {suggestion.tenth:.1e}",
        f"  configured                {phase.optimizer.learning_rate:.1e}",
        f"suggested: {key}={suggestion.chosen:g}",
    ]


def summarize(
    name: str, phase: Phase, rates: np.ndarray, losses: np.ndarray, suggestion: Suggestion | None
) -> dict[str, Any]:
    """Return the content of rates.json: phase, optimizer, configured rate, rate and loss per step, suggested rate."""
    return {
        "phase": name, "optimizer": phase.optimizer.name, "configured": phase.optimizer.learning_rate,
        "learning_rates": rates.tolist(), "losses": losses.tolist(),
        "suggestion": suggestion and suggestion.chosen,
    }  # fmt: skip


def render_page(
    name: str,
    lines: list[str],
    rates: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestion: Suggestion | None,
) -> str:
    """Render the self-contained HTML page with the summary, which `describe` returned as `lines`, and the curve."""
    marks: list[tuple[str, float]] = []
    if suggestion:
        marks = [("steepest descent", suggestion.steepest), ("a tenth of the minimum's", suggestion.tenth)]
    chart = draw_rates("Loss over the learning rate", rates, losses, smoothed, marks)
    return render("rates.html.j2", name=name, lines=lines, chart=to_svg("rates", chart))
