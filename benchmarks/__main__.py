"""`python -m benchmarks`: the command line of all benchmarks."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import click
import platformdirs
import typer
from click.core import ParameterSource

from benchmarks import (
    acceptance,
    demo,
    digests,
    distillation,
    dp_step,
    drift,
    edge,
    guard,
    homomorphic,
    photos,
    plots,
    results,
    sales,
    scale,
    secagg,
    training,
    wire,
)
from benchmarks.processes import ending_all_children
from benchmarks.results import Outcome
from benchmarks.samples import SampleLog, code_digest
from benchmarks.studies import algorithms, codecs, pretrained, privacy, robustness, skew, tuning, unequal
from benchmarks.studies.study import SEEDS, Study, results_of
from benchmarks.wire_limit import NUM_CLIENTS
from benchmarks.workloads import CHAIN, PILOT, Workload
from fedshelf.core.errors import FedShelfError

STUDIES = (
    algorithms.STUDY, pretrained.STUDY, privacy.STUDY, tuning.STUDY, skew.STUDY, robustness.STUDY, unequal.STUDY,
    codecs.STUDY,
)  # fmt: skip
CACHE = Path(platformdirs.user_cache_dir("fedshelf", appauthor=False)) / "benchmarks"
NOT_RECORDED = {"as_json", "write", "fresh", "recorded", "photos_folder", "work"}
"""Options that decide where a result goes, not what it is."""

app = typer.Typer(
    help="Measure FedShelf against the limit of this machine and against other frameworks, and train the acceptance "
    "benchmark in many ways. Interrupted measurements resume.\n\nExit codes: 0 done, 1 failed, 2 wrong usage, 77 no "
    "photos, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Runs = Annotated[int, typer.Option(min=1, help="Runs of each program.")]
Peers = Annotated[bool, typer.Option("--peers", help="Measure other frameworks, too; makes their environments.")]
PeerRounds = Annotated[int | None, typer.Option(min=1, help="The most rounds of each peer.")]
OneProcess = Annotated[bool, typer.Option("--one-process", help="Measure the plain loop in one process, too.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Measure without TLS.")]
Clients = Annotated[int, typer.Option(min=1, help="Client processes, a power of two.")]
Megabytes = Annotated[list[int] | None, typer.Option(min=1, help="Size of the model; repeatable (default: 10, 100).")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of resuming.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the main figures as one JSON object.")]
Write = Annotated[bool, typer.Option("--write", help="Write the section of RESULTS.md, its plots and its record.")]
Photos = Annotated[Path, typer.Option("--photos", help="Folder that holds the groceries packs and splits/.")]
Work = Annotated[Path, typer.Option(help="Folder for photos, samples, environments and runs.")]
Workers = Annotated[int, typer.Option(min=0, help="Worker processes of a simulation.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Seed of split and training; repeatable.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the photos and of the training.")]
Recorded = Annotated[bool, typer.Option("--recorded", help="Run nothing: print the table of what was run before.")]
Deployed = Annotated[bool, typer.Option("--deployed", help="Run processes instead of a simulation.")]
Source = Annotated[Path, typer.Option("--checkout-src", help="The 'src' folder of the version to run.")]
Short = Annotated[bool, typer.Option("--short", help="Leave out the acceptance benchmark, which takes minutes.")]


def _add_training(workload: Workload, help: str) -> None:
    @app.command(workload.name, help=help)
    def command(
        context: typer.Context,
        runs: Runs = 5,
        peers: Peers = False,
        peer_rounds: PeerRounds = None,
        one_process: OneProcess = False,
        as_json: AsJson = False,
        write: Write = False,
        fresh: Fresh = False,
        photos_folder: Photos = photos.DEFAULT_FOLDER,
        work: Work = CACHE,
    ) -> None:
        def measure(log: SampleLog) -> Outcome:
            return training.measure(
                workload, log, runs=runs, peers=peers, peer_rounds=peer_rounds, one_process=one_process,
                photos_folder=photos_folder, work=work.absolute(),
            )  # fmt: skip

        _measure(context, workload.name, work, measure, fresh=fresh, as_json=as_json, write=write)


_add_training(PILOT, "Train on 8 stores in 5 rounds, against a plain PyTorch loop.")
_add_training(CHAIN, "Train on 50 of 1,000 stores in each of 20 rounds, against a plain PyTorch loop.")


@app.command("wire")
def wire_command(
    context: typer.Context,
    runs: Runs = 5,
    peers: Peers = False,
    insecure: Insecure = False,
    clients: Clients = NUM_CLIENTS,
    megabytes: Megabytes = None,
    as_json: AsJson = False,
    write: Write = False,
    fresh: Fresh = False,
    work: Work = CACHE,
) -> None:
    """Move a model to client processes and back, without training, against plain sockets."""
    if clients & (clients - 1) or (peers and clients != NUM_CLIENTS):
        reason = "--clients must be a power of two, so that the mean is exact"
        raise typer.BadParameter(f"{reason}, and {NUM_CLIENTS} with --peers", context)
    details = ["without TLS"] * insecure + [f"{clients} clients"] * (clients != NUM_CLIENTS)
    section = ", ".join(["wire", *details])

    def measure(log: SampleLog) -> Outcome:
        return wire.measure(
            log, runs=runs, peers=peers, insecure=insecure, clients=clients, megabytes=megabytes or (10, 100),
            work=work.absolute(),
        )  # fmt: skip

    _measure(context, section, work, measure, fresh=fresh, as_json=as_json, write=write)


def _only(names: Iterable[str]) -> Any:
    return typer.Option(metavar="NAME", click_type=click.Choice(list(names)), help="Run this row only; repeatable.")


def _add_study(one: Study) -> None:
    @app.command(one.name, help=f"{one.help}\n\nIt takes hours. Finished runs are in benchmarks/studies/records.jsonl.")
    def command(
        context: typer.Context,
        seeds: Seeds = None,
        only: Annotated[list[str] | None, _only(experiment.name for experiment in one.experiments)] = None,
        recorded: Recorded = False,
        workers: Workers = 2,
        as_json: AsJson = False,
        write: Write = False,
        photos_folder: Photos = photos.DEFAULT_FOLDER,
        work: Work = Path("runs") / "studies",
    ) -> None:
        found = results_of(
            one, work, photos_folder, seeds=seeds or SEEDS, only=only or (), workers=workers, recorded=recorded
        )  # fmt: skip
        text = "\n\n".join(filter(None, [one.report(found), one.draw(found) if write else ""]))
        _report(context, one.name, Outcome(summary=one.summary(found), text=text), as_json=as_json, write=write)


for each in STUDIES:
    _add_study(each)


@app.command("acceptance")
def acceptance_command(
    context: typer.Context,
    seeds: Seeds = None,
    deployed: Deployed = False,
    workers: Workers = 2,
    write: Write = False,
    photos_folder: Photos = photos.DEFAULT_FOLDER,
    work: Work = Path("runs") / "acceptance",
) -> None:
    """Train 81 products over 8 stores in 30 rounds; exit code 1 if the accuracy is outside the band."""
    records = [acceptance.run(work, photos_folder, seed, deployed=deployed, workers=workers) for seed in seeds or [0]]
    section = "acceptance, deployed" if deployed else "acceptance"
    if write:
        results.write(section, acceptance.report(records, deployed=deployed), _command_line(context))
    if not all(record["inside_band"] for record in records):
        raise typer.Exit(1)


@app.command("demo")
def demo_command(
    context: typer.Context,
    seed: Seed = 0,
    as_json: AsJson = False,
    write: Write = False,
    work: Work = Path("runs") / "demo-check",
) -> None:
    """Train the demo's stores alone and together."""
    figures = demo.measure(work, seed)
    _report(context, "demo", Outcome(summary=figures, text=demo.report(figures)), as_json=as_json, write=write)


@app.command("drift")
def drift_command(
    context: typer.Context,
    write: Write = False,
    photos_folder: Photos = photos.DEFAULT_FOLDER,
    work: Work = Path("runs") / "studies",
) -> None:
    """Compare a store's gradient at the start of a round with those along its steps."""
    _report(context, "drift", Outcome(summary={}, text=drift.measure(work, photos_folder)), write=write)


@app.command("sales")
def sales_command(
    context: typer.Context,
    seeds: Seeds = None,
    write: Write = False,
    photos_folder: Photos = photos.DEFAULT_FOLDER,
    work: Work = Path("runs") / "sales",
) -> None:
    """Train with synthetic sales of 8 stores, against the image model with the stores' mix of products."""
    text = sales.measure(work, photos_folder, seeds or [0])
    _report(context, "sales", Outcome(summary={}, text=text), write=write)


@app.command("distillation")
def distillation_command(
    context: typer.Context,
    seeds: Seeds = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the students.")] = 48,
    only: Annotated[list[str] | None, _only(distillation.WAYS)] = None,
    flag: Annotated[list[str] | None, typer.Option(help="A flag of the taught students, KEY=VALUE.")] = None,
    write: Write = False,
    photos_folder: Photos = photos.DEFAULT_FOLDER,
    work: Work = Path("runs") / "distillation",
) -> None:
    """Train a light student with a pretrained teacher in three ways, against the same student alone."""
    flags = [f"--{each}" for each in flag or ()]
    ways = only or distillation.WAYS
    text = distillation.measure(work, photos_folder, seeds or [0], rounds=rounds, flags=flags, ways=ways)
    _report(context, "distillation", Outcome(summary={}, text=text), write=write)


@app.command("scale")
def scale_command(context: typer.Context, write: Write = False, work: Work = CACHE) -> None:
    """Simulate 10,000 stores, and measure how the cost of a round grows with the federation."""
    _report(context, "scale", Outcome(summary={}, text=scale.report(work)), write=write)


@app.command("secagg")
def secagg_command(context: typer.Context, write: Write = False) -> None:
    """Measure what secure aggregation costs a store and the server, without training and without a network."""
    _report(context, "secagg", Outcome(summary={}, text=secagg.report()), write=write)


@app.command("he")
def he_command(context: typer.Context, write: Write = False) -> None:
    """Measure what homomorphic encryption costs a store and the server, without training and without a network."""
    _report(context, "he", Outcome(summary={}, text=homomorphic.report()), write=write)


@app.command("edge")
def edge_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A model file from 'fedshelf export'.")],
    photos_folder: Annotated[Path, typer.Argument(help="Folder of photos.")],
    repetitions: Annotated[int, typer.Option(min=1, help="Photos named in each way.")] = 200,
    as_json: AsJson = False,
    write: Write = False,
) -> None:
    """Measure what serving a model in a store costs, against ONNX Runtime on the same file."""
    _report(context, "edge", edge.measure(model, photos_folder, repetitions), as_json=as_json, write=write)


@app.command("dp-step")
def dp_step_command(
    context: typer.Context,
    repetitions: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 40,
    as_json: AsJson = False,
    write: Write = False,
) -> None:
    """Measure a step with the gradient of each photo and noise, against a plain step and Opacus."""
    _report(context, "dp-step", dp_step.measure(repetitions), as_json=as_json, write=write)


@app.command("guard")
def guard_command() -> None:
    """Compare the last records of pilot, chain and wire with those before; exit code 1 if something became slower."""
    findings = guard.findings()
    for finding in findings:
        typer.echo(f"{'BAD ' if finding.bad else 'ok  '} {finding.text}")
    if any(finding.bad for finding in findings):
        raise typer.Exit(1)


@app.command("digests")
def digests_command(
    source: Source = Path("src"),
    only: Annotated[list[str] | None, _only(case.name for case in digests.CASES)] = None,
    short: Short = False,
    photos_folder: Photos = photos.DEFAULT_FOLDER,
) -> None:
    """Print digests of final models with any version of FedShelf, to compare two versions on one machine."""
    cases = [case.name for case in digests.CASES if not short or case is not digests.ACCEPTANCE]
    with tempfile.TemporaryDirectory() as work:
        for name, digest in digests.digests(source, photos_folder, Path(work), only or cases):
            typer.echo(f"{name:<30} {digest}")


def _measure(
    context: typer.Context, section: str, work: Path, measure: Callable[[SampleLog], Outcome], *, fresh: bool,
    as_json: bool, write: bool,
) -> None:  # fmt: skip
    """Measure or resume an interrupted measurement, and report the result."""
    with SampleLog(work.absolute() / "samples" / f"{section}-{code_digest()}.jsonl", fresh=fresh) as log:
        if len(log):
            typer.echo(f"{section}: resuming with {len(log)} runs from {log.path}", err=True)
        outcome = measure(log)
        log.archive()
    _report(context, section, outcome, as_json=as_json, write=write)


def _report(context: typer.Context, section: str, outcome: Outcome, *, write: bool, as_json: bool = False) -> None:
    """Print the result, and write it where that is asked for."""
    typer.echo(json.dumps(outcome.summary) if as_json else outcome.text)
    if write:
        images = plots.draw_bars(section, outcome.figures)
        results.write(section, "\n\n".join([outcome.text, *images]), _command_line(context))
        if outcome.figures:
            results.record(section, outcome)


def _command_line(context: typer.Context) -> str:
    """The command that measures the same again."""
    parts: list[Any] = ["python -m benchmarks", context.command.name]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if typed and name not in NOT_RECORDED:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                parts += [parameter.opts[0]] if each is True else [parameter.opts[0], each]
    return " ".join(map(str, parts))


def main() -> None:
    """Run the command line; an expected error is one line and an exit code, never a traceback."""
    try:
        with ending_all_children():
            app()
    except FedShelfError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
