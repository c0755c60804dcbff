"""Print the sections of a plan, each a heading with a table. `Plan` collects the warnings and errors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.cli.compose import GROUPS, compose
from trainer.cluster.discovery import Cluster
from trainer.config.auto import resolve_auto
from trainer.config.diff import flatten
from trainer.config.schema import RequestedConfig, RunConfig, validate_config
from trainer.data.host import get_memory_limit_bytes
from trainer.data.images import CachePlan
from trainer.distillation.own_teacher import locate_teacher
from trainer.errors import ConfigError, TrainerError
from trainer.models.weights_folder import describe_weights
from trainer.monitoring.console import get_width
from trainer.planning import checks
from trainer.planning.estimates import MemoryUses, PhasePlan, estimate_split_bytes
from trainer.planning.timing import format_time
from trainer.report.counts import format_counts
from trainer.runs.folder import find_folder_holder, inspect_folder, is_finished, require_output_dir
from trainer.storage.disk import format_bytes
from trainer.storage.path import ObjectInfo, storage_path
from trainer.storage.staging import is_remote
from trainer.types import Dataset

WIDTH = 100  # characters per line if neither a terminal nor $COLUMNS determines them
MAX_NAMES = 5  # maximum number of printed class names or addresses
Rows = list[tuple[str, str]]  # (label, value)


@dataclass
class Plan:
    """The results of a dry run so far, and the warnings and errors that it prints at its end."""

    config: RequestedConfig
    cluster: Cluster
    replicas: int = 1  # number of replicas on this worker
    warnings: list[str] = field(default_factory=list)
    errors: list[TrainerError] = field(default_factory=list)  # errors with which a run would end
    dataset: Dataset | None = None  # None until it is opened, or if it cannot be opened
    resuming: bool = False  # True if a run would resume from a checkpoint
    labels_known: bool = True  # False if only the metadata of the dataset was read
    reasons: list[str] = field(default_factory=list)  # one line per value that a resumed run chose for `auto`
    to_stage: list[ObjectInfo] = field(default_factory=list)  # files that a run would first fetch from a bucket
    untrained_teacher: RequestedConfig | None = None  # configuration of a teacher that would be trained first
    finished: bool = False  # True if the run in output_dir is finished, so that it would exit with 0 at once

    @property
    def bytes_to_stage(self) -> int:
        """Total size of the files to stage."""
        return sum(file.size for file in self.to_stage)

    def print_section(self, title: str, rows: Rows, width: int = 14) -> None:
        """Print a heading and a table of labels and values. The column of labels has at least `width` characters."""
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text(f"  {name}", style="dim"), Text(value))
        self.print(Text(f"\n{title}", style="bold"), table)

    def print(self, *renderables: RenderableType) -> None:
        """Print Rich tables and texts, without trailing spaces."""
        console = Console(width=get_width(WIDTH), highlight=False)
        with console.capture() as captured:
            console.print(*renderables, sep="\n")
        print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").splitlines()), flush=True)

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Context manager that catches a TrainerError, and adds it to `errors` unless they already contain its text."""
        try:
            yield
        except TrainerError as error:
            if str(error) not in map(str, self.errors):
                self.errors.append(error)

    def show_warnings_and_raise(self) -> None:
        """Print the warnings, and raise the collected errors. For a finished run, the errors become warnings.

        Raises:
            TrainerError: the only error, or a ConfigError that lists all errors, with the first one's exit code.
        """
        if self.finished:
            self.warnings += [f"if the run were extended: {error}" for error in self.errors]
            self.errors = []
        if self.warnings:
            self.print_section("warnings", [("!", warning) for warning in self.warnings], width=1)
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            error = ConfigError.combine(self.errors, "the run")
            error.exit_code = self.errors[0].exit_code  # a run would end with the first error
            raise error

    def check(self, action: Callable[[], str]) -> str:
        """Call `action` and return "✓ RESULT", or collect its TrainerError and return "✗ ERROR"."""
        with self.collect_errors():
            try:
                return f"✓ {action()}"
            except TrainerError as error:
                line = f"✗ {error}"
                raise
        return line


def format_names(names: Sequence[str]) -> str:
    """Format the first `MAX_NAMES` names, and the number of the remaining ones."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def show_configuration(plan: Plan, arguments: list[str]) -> None:
    """Print the chosen configuration groups, the values changed on the command line, and the state of output_dir.

    Also set the fields of the plan that depend on output_dir: `config` with the `auto` values of a resumed run,
    `reasons`, `resuming` and `finished`. `arguments` are the run's command-line arguments, such as "data=digits".
    """
    config, output = plan.config, plan.config.output_dir
    choices = [a for a in arguments if a.split("=")[0] in GROUPS]
    rows: Rows = [("choices", "  ".join(choices) or "experiment=quickstart"), ("seed", str(config.seed))]
    with suppress(ConfigError):  # the groups alone may lack required keys
        base, now = (
            flatten(validate_config(compose(choices) or {}).model_dump(mode="json")),
            flatten(config.model_dump(mode="json")),
        )
        changed = [f"{k} = {v} (was {base.get(k)})" for k, v in now.items() if v != base.get(k) and k != "output_dir"]
        rows += [("" if i else "changed", line) for i, line in enumerate(changed)]
    state = "a new run in a new folder below outputs/"
    if output:
        state = "new"
        with plan.collect_errors():
            if is_finished(config):
                plan.finished = True
                state = "already finished (has DONE): the run would exit at once"
            elif begun := inspect_folder(config)[0]:
                plan.config, plan.reasons = resolve_auto(config, stored_config=begun)
                plan.resuming = True
                newest = checks.read_newest_state(config) or {"step": 0, "phase": 0}
                phase = ([*plan.config.phases, "the end"])[newest["phase"]]
                state = f"has this run, which would resume at step {newest['step']:,}, phase {phase}"
            if (holder := find_folder_holder(config)) and not plan.finished:
                plan.warnings.append(f"output_dir={output} is in use by {holder}: a run would wait for it or end")
        if plan.errors:
            state = f"a run would fail: {plan.errors[-1]}"
    num_errors = len(plan.errors)
    with plan.collect_errors():
        require_output_dir(config, plan.cluster.size)
    if len(plan.errors) > num_errors:
        state += "; a run with several workers would fail"
    plan.print_section("configuration", [*rows, ("output_dir", f"{output}: {state}" if output else state)])


def show_data(plan: Plan, dataset: Dataset, rows: Rows) -> None:
    """Print the dataset's name, classes, splits and class balance, and a table of the examples per class.

    `rows` describe how the dataset was opened; they are printed after the rows about its content.
    """
    names = dataset.class_names
    dataset_rows: Rows = [("name", dataset.name), ("classes", f"{len(names)}: {format_names(names)}")]
    for name, split in dataset.splits.items():
        num_files = len({shard.path for shard in split.shards})
        shards = f" in {num_files} shard{'s' * (num_files != 1)}" if num_files else " in files"
        size_note = f", {format_bytes(count)}" if (count := estimate_split_bytes(split)) else ""
        dataset_rows.append((name, f"{split.count:,} examples{shards}{size_note}"))
    if plan.labels_known:
        counts = np.bincount(dataset.splits["train"].labels, minlength=len(names))
        largest, smallest = int(counts.argmax()), int(counts.argmin())
        dataset_rows.append(("balance", f"most training examples {counts[largest]:,} ({names[largest]}), "
                                        f"fewest {counts[smallest]:,} ({names[smallest]})"))  # fmt: skip
    plan.print_section("data", [*dataset_rows, *rows, *(("note", note) for note in dataset.notes)])
    if plan.labels_known:
        counts_per_split = {
            name: np.bincount(split.labels, minlength=len(names)).tolist() for name, split in dataset.splits.items()
        }
        table = Text("\n".join(format_counts(names, counts_per_split)), no_wrap=True)
        plan.print(Text("\nexamples per class", style="bold"), table)


def show_storage(plan: Plan, problem: str) -> None:
    """Read from the dataset, write to output_dir, check warm start, teacher and weights, and print the results.

    Args:
        problem: why the dataset could not be opened; "" if it was opened, or would first be staged.
    """
    config = plan.config
    dataset = plan.dataset
    read_result = problem or "not on this machine yet"
    if dataset or plan.bytes_to_stage:
        if plan.bytes_to_stage:
            path = min((file for file in plan.to_stage if file.size), key=lambda file: file.size).path
        else:
            assert dataset
            split = dataset.splits["train"]
            path = storage_path(Path(split.files[0] if split.files else split.shards[0].path))
        read_result = plan.check(lambda: f"{path}: {len(path.read_range(0, 64))} bytes read")
    rows: Rows = [
        ("read data", read_result),
        ("write output", plan.check(lambda: checks.check_output_writable(config))),
    ]
    if config.warm_start and not plan.resuming:
        rows.append(("warm start", plan.check(lambda: checks.describe_warm_start(str(config.warm_start)))))
    if config.distillation:
        address = locate_teacher(config.distillation.teacher, str(config.output_dir))
        classes = dataset.class_names if dataset else None
        teacher_text = "trained first, as above"
        if not plan.untrained_teacher:
            teacher_text = plan.check(lambda: checks.check_teacher(address, classes).summary)
        rows.append(("teacher", teacher_text))
    if plan.resuming:
        rows.append(("weights", "those of the checkpoint"))
    elif config.model.backbone != "auto":
        rows += show_weights(plan)
    plan.print_section("storage", rows)


def show_weights(plan: Plan) -> Rows:
    """Check that a run can copy or download its backbone's weights, and return the result as a row; [] if local."""
    model = plan.config.model
    if model.weights == "imagenet" or is_remote(model.weights):
        return [("weights", plan.check(lambda: describe_weights(model)))]
    return []


def show_phases(
    plan: Plan,
    config: RunConfig,
    phases: list[PhasePlan],
    num_parameters: int,
    steps_per_epoch: int,
    sharding_mode: str,
) -> None:
    """Print a table of the phases.

    Args:
        num_parameters: number of all parameters of the model.
        steps_per_epoch: number of steps per epoch.
        sharding_mode: unit in which the dataset is sharded over workers, "record" or "file".
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  phase")
    for name in ("steps", "epochs", "trains", "layers"):
        table.add_column(name, justify="right")
    for name in ("thaw", "optimizer", "rate and schedule"):
        table.add_column(name, overflow="fold")
    for phase in phases:
        settings = config.phases[phase.name]
        optimizer, schedule = settings.optimizer, settings.schedule
        warmup = schedule.warmup.steps(steps_per_epoch, config.training.batch_size)
        rate = f"{optimizer.learning_rate:g} {schedule.name}" + (f", warm-up {warmup:,}" if warmup else "")
        rate += f", backbone x {settings.backbone_rate:g}" if settings.backbone_rate != 1 else ""
        rate += f", x {settings.layer_decay:g} per block" if settings.layer_decay != 1 else ""
        counts = (f"{phase.steps:,}", f"{phase.epochs:.3g}", f"{phase.trainable_parameters:,}")
        layers = f"{phase.freezing.num_selected_layers}/{phase.freezing.num_layers}"
        cells = (f"  {phase.name}", *counts, layers, settings.thaw, optimizer.name, rate)
        table.add_row(*(Text(cell) for cell in cells))
    suffix = f"; sharded by {sharding_mode}" if plan.cluster.size > 1 else ""
    step_counts = f"{sum(phase.steps for phase in phases):,} steps at most, {steps_per_epoch:,} per epoch{suffix}"
    summary = f"  {step_counts}; {num_parameters:,} parameters, the head included"
    plan.print(Text("\nphases", style="bold"), table, Text(summary))


def show_memory(plan: Plan, uses: MemoryUses) -> None:
    """Print the estimated uses of memory, their sum, and this machine's limit."""
    sizes = [*uses, ("in total", sum(count for _, count in uses)), ("limit of this machine", get_memory_limit_bytes())]
    plan.print_section("memory (estimate)", [(name, f"{format_bytes(count):>11}") for name, count in sizes])


def show_time(plan: Plan, seconds: dict[str, float], devices: int) -> None:
    """Print the estimated time of each phase and of scoring; nothing if `seconds` is empty.

    Args:
        seconds: seconds on one device, by phase name and for "scoring" (`estimate_time`).
        devices: number of devices of the run, by which the seconds are divided.
    """
    if seconds:
        rows = [(name, f"about {format_time(phase_seconds / devices)}") for name, phase_seconds in seconds.items()]
        total = format_time(sum(seconds.values()) / devices)
        rows.append(("in total", f"about {total}, and the time to start, read the images, export and report"))
        plan.print_section("time (estimated from a few steps on this machine)", rows)


def show_bytes(
    plan: Plan, phases: list[PhasePlan], caches: dict[str, CachePlan], checkpoint_bytes: int, model_bytes: int
) -> None:
    """Print the bytes that a run reads and writes.

    Args:
        caches: plan of the decoded images' cache, by split name.
        checkpoint_bytes: size of a checkpoint.
        model_bytes: size of the exported model in float32.
    """
    assert plan.dataset
    config = plan.config
    num_epochs = sum(int(np.ceil(phase.epochs)) for phase in phases)
    passes = {name: 1 if caches[name].where != "none" or name == "test" else num_epochs for name in caches}
    num_bytes_read = sum(
        estimate_split_bytes(split) * passes[name] for name, split in plan.dataset.splits.items() if name in passes
    )
    staging_note = f"; {format_bytes(plan.bytes_to_stage)} from the bucket, once" if plan.bytes_to_stage else ""
    num_saves = sum(phase.max_checkpoints for phase in phases)
    num_stored = config.runtime.keep_checkpoints + len(phases)
    formats = config.export.formats
    stored_text = f"{num_stored} at once, {format_bytes(num_stored * checkpoint_bytes)}"
    plan.print_section("bytes", [
        ("read", f"{format_bytes(num_bytes_read or plan.bytes_to_stage)} of images{staging_note}"),
        ("checkpoints", f"up to {num_saves:,} of {format_bytes(checkpoint_bytes)}; {stored_text}"),
        ("export", f"{', '.join(formats)}: about {format_bytes(model_bytes * len(formats))}" if formats else "nothing"),
    ])  # fmt: skip
