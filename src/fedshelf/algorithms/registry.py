"""Registry of algorithms and aggregators by name."""

ALGORITHMS: dict[str, str] = {
    "fedavg": "fedshelf.algorithms.fedavg:FedAvg",
    "fedprox": "fedshelf.algorithms.fedprox:FedProx",
    "fedavgm": "fedshelf.algorithms.fedavgm:FedAvgM",
    "fedadagrad": "fedshelf.algorithms.fedopt:fedadagrad",
    "fedadam": "fedshelf.algorithms.fedopt:fedadam",
    "fedyogi": "fedshelf.algorithms.fedopt:fedyogi",
    "scaffold": "fedshelf.algorithms.scaffold:Scaffold",
    "fedbuff": "fedshelf.algorithms.fedbuff:FedBuff",
    "fedasync": "fedshelf.algorithms.fedasync:FedAsync",
    "ridge": "fedshelf.algorithms.ridge:Ridge",
}
"""Components (`core.settings`) that make an `Algorithm`."""

AGGREGATORS: dict[str, str] = {
    "mean": "fedshelf.algorithms.reduce:MEAN",
    "median": "fedshelf.algorithms.robust:MEDIAN",
    "trimmed-mean": "fedshelf.algorithms.robust:trimmed_mean",
    "multi-krum": "fedshelf.algorithms.robust:multi_krum",
}
"""Components that make an `Aggregator`."""
