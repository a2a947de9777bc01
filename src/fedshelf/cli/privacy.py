"""The `fedshelf privacy` commands: what differential privacy guarantees."""

from typing import Annotated, Literal

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, print_json
from fedshelf.cli.tables import Column, Table
from fedshelf.core.errors import UsageError
from fedshelf.core.text import counted
from fedshelf.tracking.terminal import make_console, wrapped

app = Commands(help="Compute what differential privacy guarantees.")

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(
    epilog="Example: fedshelf privacy epsilon --noise-multiplier 1.1 --sampling-rate 0.05 --steps 1000 --delta 1e-5"
)
def epsilon(
    steps: Annotated[int, typer.Option(help="Number of steps with noise, over all rounds.")],
    delta: Annotated[
        float, typer.Option(help="Probability with which the bound may fail; well below 1 / number of photos.")
    ],
    sampling_rate: Annotated[
        float,
        typer.Option(help="Share of the photos in a step: batch size / number of photos; 1 is all of them."),
    ] = 1.0,
    noise_multiplier: Annotated[float | None, typer.Option(help="Standard deviation of the noise / clip norm.")] = None,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Find the noise multiplier for this ε, instead of the ε.")
    ] = None,
    unit: Annotated[
        Literal["photo", "client"],
        typer.Option(help="What is protected: a photo, or a client with all its photos (then, steps are rounds)."),
    ] = "photo",
    as_json: _Json = False,
) -> None:
    """Compute the ε of training with noise, or the noise for an ε.

    Batches are Poisson samples, and the neighboring relation is adding or removing one photo (or client).
    """
    from fedshelf.privacy.accounting import SampledGaussian, compose, noise_multiplier_for

    if noise_multiplier is None and target_epsilon is not None:
        noise_multiplier = noise_multiplier_for(target_epsilon, delta, sampling_rate=sampling_rate, steps=steps)
    elif noise_multiplier is None or target_epsilon is not None:
        raise UsageError("give either --noise-multiplier or --target-epsilon")
    release = SampledGaussian(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps)
    found = compose([release], delta, unit=unit)
    if as_json:
        result = {"rdp": found.rdp, "pld": found.pld, "assumptions": found.assumptions}
        print_json(result | ({} if target_epsilon is None else {"noise_multiplier": noise_multiplier}))
        return
    table = Table(columns=[Column(name="method"), Column(name="ε", is_figure=True)])
    for method, value in (("PLD", found.pld), ("RDP", found.rdp)):
        if value is not None:
            table.add(method, f"{value:,.3f}")
    echo(
        f"Noise multiplier {noise_multiplier:.6g}, sampling rate {sampling_rate:g}, {counted(steps, 'step')}, "
        f"δ = {delta:g}:",
        table,
        "Assumptions:",
        *(line for text in found.assumptions for line in wrapped(f"- {text}", make_console().width, "  ")),
    )
