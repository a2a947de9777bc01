"""The stage of the how-to page, added as the page says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.core.events import RunStatus
from fedshelf.core.messages import ServerMessage, Upload
from fedshelf.rounds.pipeline import UploadPipeline
from tests.fakes import Answer
from tests.howto import Addition, run_with
from tests.unit.data.samples import write_pack
from tests.worlds import World

PAGE = "add-a-pipeline-stage.md"
PROGRAM = """
wrong = simulate("--run-dir", "run", "--grid", "0")
torch_at_start = "torch" in sys.modules
right = simulate("--run-dir", "run", "--grid", "0.01", "--clip-norm", "100")

import tomllib
from pathlib import Path
from fedshelf.app.components import uploads_of
from fedshelf.app.model import bound_model_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.data.catalogue import Catalogue
from fedshelf.storage.checkpoints import FileCheckpoints

config = files.parse(RunConfig, tomllib.loads(Path("run/config.toml").read_text()), where="the run")
first = bound_model_of(config, Catalogue.load(Path("run/catalogue.json")), device="cpu").params.shared
steps = (FileCheckpoints(Path("run/checkpoints")).load().model.params - first) / 0.01
order = [stage.declares.name for stage in uploads_of(config.model_copy(update={"codec_up": "fp16"})).stages]
none = [stage.declares.name for stage in uploads_of(RunConfig()).stages]
off_grid = (steps - steps.round()).abs().max().item()
print(json.dumps([wrong, torch_at_start, right, order, none, off_grid, steps.abs().max().item()]))
"""


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Any:
    return Addition.of(PAGE).install(monkeypatch)


def test_the_stage_of_the_page_works_with_its_flag_between_the_built_in_ones(tmp_path: Path) -> None:
    write_pack(tmp_path / "stores" / "lyon", {"apple": 4, "milk": 4})
    ended = run_with(PAGE, PROGRAM, tmp_path)
    assert "--grid 0: must be more than 0" in ended.stderr
    wrong, torch_at_start, right, order, none, off_grid, longest = ended.result
    assert (wrong, torch_at_start, right) == (2, False, 0)
    assert order == ["clip", "grid", "codec"]
    assert none == [], "a stage whose flag is not given is left out"
    assert off_grid < 0.001
    assert longest > 0.99


def test_what_it_rounds_off_is_kept_and_sent_later(grid: Any) -> None:
    sent: list[torch.Tensor] = []

    def watch(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload):
            sent.append(honest.delta)
        return honest

    world = World(num_rounds=4, plan={"uploads": UploadPipeline(stages=(grid(0.1),))}, tampers={"a": watch})
    assert world.run() is RunStatus.FINISHED
    assert len(sent) == 4
    for delta in sent:
        torch.testing.assert_close(delta, torch.round(delta / 0.1) * 0.1, rtol=0, atol=1e-6)
    kept = world.states["a"].peek(world.transport.broadcasts("line-to-a")[-1].key).pipeline
    assert set(kept) == {"grid"}
    assert 0 < kept["grid"].abs().max() <= 0.05 + 1e-6
