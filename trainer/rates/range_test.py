"""The range test of a phase: its training steps, with a learning rate that grows exponentially."""

import json
import tempfile
import time
from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.config.phases import AutoPhases, Phase, Schedule
from trainer.config.schema import RequestedConfig, configure_teacher
from trainer.context import PhaseRun, RunContext, open_phase
from trainer.data.images import convert_data_errors
from trainer.data.remote import addresses_in_errors
from trainer.data.sharding import steps_per_epoch
from trainer.errors import ConfigError
from trainer.models.freezing import apply_thaw
from trainer.monitoring.log import log
from trainer.rates.curve import Bounds, Suggestion, count_steps_per_decade, has_diverged, smooth, suggest
from trainer.report.figures import to_svg
from trainer.report.page import INDEX, render, require_page_of
from trainer.report.scatter import draw_rates
from trainer.runs.folder import open_run_folder
from trainer.storage.path import storage_path
from trainer.train import choose_inputs, make_plan, restore, set_up

SUMMARY = "rates.json"


def run_range_test(config: RequestedConfig, phase: str | None, bounds: Bounds, output: str) -> None:
    """Test the learning rates of a phase, print a summary with a suggestion, and write the page and rates.json.

    The run is set up in a temporary folder, which is deleted.

    Raises:
        TrainerError: what ends the run at its start; StopRequested after a signal.
    """
    page_folder = storage_path(output)
    require_page_of(page_folder, "trainer.rates", SUMMARY)
    if phase is not None and not isinstance(config.phases, AutoPhases) and phase not in config.phases:
        fix = f"use {' or '.join(config.phases)}"
        raise ConfigError("is not a phase of the configuration", key="phase", value=phase, fix=fix)
    if configure_teacher(config):
        fix = "leave it out, or give the output_dir of a trained teacher, without distillation.model"
        raise ConfigError("is not trained in a range test", key="distillation.teacher", value="train", fix=fix)
    with tempfile.TemporaryDirectory(prefix="kubetune-rates-") as temporary:
        requested = config.model_copy(update={"output_dir": f"{temporary}/run", "resume": "auto"})
        stop, control = StopFlag(), ControlChannel(discover({}), {})
        folder = open_run_folder(requested)
        try:
            run, divisions, _, baseline = set_up(requested, folder, control, stop, time.time())
            try:
                name = phase or next(iter(run.config.phases))
                if name not in run.config.phases:  # chosen by phases=auto
                    fix = f"use {' or '.join(run.config.phases)}"
                    raise ConfigError("is not a phase of the configuration", key="phase", value=name, fix=fix)
                original = run.config.phases[name]
                restrict(run, name, bounds)
                with addresses_in_errors(run.images.addresses):
                    _, sharding = restore(run)
                    features, compiled, teacher = choose_inputs(run, folder, {name: divisions[name]}, baseline)
                    run.plan = make_plan(run, features, compiled, teacher, sharding)
                    rates, losses = measure_losses(run, name)
            finally:
                run.metrics.close()
                run.images.close()
        finally:
            folder.abandon()
    smoothed = smooth(losses)
    suggestion = suggest(rates, smoothed)
    results = summarize(name, original, rates, losses, suggestion)
    (page_folder / SUMMARY).write(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (page_folder / INDEX).write(render_page(name, original, rates, losses, suggestion))
    print("\n".join(describe(name, original, rates, smoothed, suggestion)))
    log.info(f"page: {page_folder / INDEX}")


def restrict(run: RunContext, name: str, bounds: Bounds) -> None:
    """Make a phase the only one of a run, with the rates and the length of the test."""
    per_epoch = steps_per_epoch(run.images.dataset.splits["train"], run.config.training.batch_size)
    phase = make_test_phase(run.config.phases[name], bounds, per_epoch)
    debug = run.config.debug.model_copy(update={"max_steps": None})
    run.config = run.images.config = run.config.model_copy(update={"phases": {name: phase}, "debug": debug})


def make_test_phase(phase: Phase, bounds: Bounds, per_epoch: int) -> Phase:
    """Return a phase with a learning rate that grows from the lowest to the highest, in its number of steps."""
    per_decade = count_steps_per_decade(bounds, per_epoch)
    steps = int(np.ceil(np.log10(bounds.highest / bounds.lowest) * per_decade - 1e-9)) + 1
    schedule = Schedule.model_validate({"name": "exponential", "decay": 10.0, "every": f"{per_decade} steps"})
    optimizer = phase.optimizer.model_copy(update={"learning_rate": bounds.lowest})
    length = {"epochs": None, "examples": None, "steps": steps}
    return phase.model_copy(update={"schedule": schedule, "optimizer": optimizer, **length})


def measure_losses(run: RunContext, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Train the steps of the test until the loss diverges; return the rates and mean losses of the steps, float [n].

    The losses are those before the update of their step.
    """
    phase = run.config.phases[name]
    total = run.config.phase_steps(phase, run.plan.sharding.steps_per_epoch)
    thaw = apply_thaw(run.classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    log.info(f"phase {name}: up to {total} steps of {phase.optimizer.name}")
    current = open_phase(run, name, thaw, total)
    losses = np.zeros(0)
    while len(losses) < total and not (len(losses) and has_diverged(losses)):
        losses = np.concatenate([losses, _run_steps(run, current, min(5, total - len(losses)), len(losses))])
        run.worker.stop.check("during the range test")
    current.batches = None  # deletes the pipeline, which ends its prefetching
    current.gate.close()
    rates = np.array([float(current.schedule(step)) for step in range(len(losses))])
    finite = len(losses) if np.isfinite(losses).all() else int(np.argmax(~np.isfinite(losses)))
    if finite < 2:
        problem, fix = "the loss is not finite from the first steps on", "use a smaller one"
        raise ConfigError(problem, key="lowest", value=f"{rates[0]:g}", fix=fix)
    return rates[:finite], losses[:finite]


def _run_steps(run: RunContext, current: PhaseRun, count: int, step: int) -> np.ndarray:
    """Run training steps, and return their mean losses, float64 [n]; NaN for a step without a readable image."""
    with convert_data_errors(current.inputs.training):
        current.gate.wait_for(count * run.config.training.batch_size)
        sums, _, _ = current.step.run(current.batches, count, step, step)
    run.images.require_readable()
    loss, _, examples = sums.astype(np.float64).T
    return np.divide(loss, examples, out=np.full(len(loss), np.nan), where=examples > 0)


def describe(
    name: str, phase: Phase, rates: np.ndarray, smoothed: np.ndarray, suggestion: Suggestion | None
) -> list[str]:
    """Return the summary of a test."""
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
    """Return the content of rates.json: the rate and the mean loss of each step, and the suggestion, or None."""
    return {
        "phase": name, "optimizer": phase.optimizer.name, "configured": phase.optimizer.learning_rate,
        "learning_rates": rates.tolist(), "losses": losses.tolist(),
        "suggestion": suggestion and suggestion.chosen,
    }  # fmt: skip


def render_page(
    name: str, phase: Phase, rates: np.ndarray, losses: np.ndarray, suggestion: Suggestion | None
) -> str:  # fmt: skip
    """Render the page, which needs no other file."""
    smoothed = smooth(losses)
    marks: list[tuple[str, float]] = []
    if suggestion:
        marks = [("steepest descent", suggestion.steepest), ("a tenth of the minimum's", suggestion.tenth)]
    chart = draw_rates("Loss over the learning rate", rates, losses, smoothed, marks)
    lines = describe(name, phase, rates, smoothed, suggestion)
    return render("rates.html.j2", name=name, lines=lines, chart=to_svg("rates", chart))
