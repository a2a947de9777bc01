"""The client's script on NVIDIA FLARE (Client API): site number i trains the store in the i-th place of the cohort.

    nvflare_client.py JOB
"""

import sys
from pathlib import Path

import nvflare.client as flare
import torch

from benchmarks.peers.job import Job, Store


def main() -> None:
    torch.set_num_threads(1)  # one process per client, more of them than cores
    store = Store(Job.load(Path(sys.argv[1])))
    flare.init()
    slot = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        store.module.load_state_dict(model.params)
        loss = store.fit(model.current_round + 1, slot)
        flare.send(
            flare.FLModel(
                params=store.module.state_dict(), metrics={"train_loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": 1},  # equal weights: all stores hold as many photos
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
