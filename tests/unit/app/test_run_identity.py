"""A run directory belongs to one configuration; runs are resumed, extended, and not mixed up."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fedshelf.app.run import open_run
from fedshelf.config import files, places
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import ClientStatus, RoundStarted, RunStarted, RunStatus
from fedshelf.data.catalogue import Catalogue
from fedshelf.simulate.engine import simulate_in_memory
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.fakes import RecordingSink
from tests.worlds import CLASSES, linear, photos

STORES = {name: photos(i, 6) for i, name in enumerate(("a", "b", "c"))}


class StopAt:
    """Asks the run to stop when the given round starts."""

    def __init__(self, round: int) -> None:
        self.round = round
        self.stop = threading.Event()

    def emit(self, event: Any) -> None:
        if isinstance(event, RoundStarted) and event.round == self.round:
            self.stop.set()


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"image_size": 8, "rounds": 2, "batch_size": 4, "augment": False, "device": "cpu", **values})


def run(given: RunConfig, *, stop_at: int = 0, sink: RecordingSink | None = None) -> tuple[RunStatus, RunDirectory]:
    stopper = StopAt(stop_at)
    return simulate_in_memory(
        given, stores=STORES, test=photos(9, 5), class_names=CLASSES, model=linear, stop=stopper.stop,
        watchers=(stopper, *([sink] if sink else [])),
    )  # fmt: skip


def final(directory: RunDirectory) -> torch.Tensor:
    state = FileCheckpoints(directory.checkpoints).load()
    assert state is not None
    return state.model.params


@pytest.mark.usefixtures("home")
def test_an_existing_run_with_other_values_lists_every_difference() -> None:
    run(config(run_dir=Path("r")))
    with pytest.raises(RunError) as caught:
        run(config(run_dir=Path("r"), rounds=3, client_lr=0.5, mu=0.9))
    for part in ("rounds: 2 → 3", "client-lr: 0.05 → 0.5", "mu: 0.01 → 0.9", "--extend", "another --run-dir"):
        assert part in str(caught.value)
    with pytest.raises(RunError) as caught:
        run(config(run_dir=Path("r"), seed=3))
    assert "seed: 0 → 3" in str(caught.value)
    assert "--extend" not in str(caught.value)


@pytest.mark.usefixtures("home")
def test_address_timeouts_and_workers_may_differ() -> None:
    _, first = run(config(run_dir=Path("r")), stop_at=2)
    status, again = run(
        config(run_dir=Path("r"), address="h:1", round_timeout=9.0, heartbeat_timeout=99.0, insecure=True)
    )
    assert (status, again.run_id) == (RunStatus.FINISHED, first.run_id)


@pytest.mark.usefixtures("home")
def test_a_deadline_in_virtual_time_decides_the_result_and_may_not_differ() -> None:
    timed = {"slowdowns": "1,1,5", "quorum": 2}
    _, first = run(config(run_dir=Path("r"), round_timeout=0.2, **timed), stop_at=2)
    with pytest.raises(RunError, match=r"other settings \(round-timeout: 0\.2 → 1800\.0\)\."):
        run(config(run_dir=Path("r"), **timed))
    status, again = run(config(run_dir=Path("r"), round_timeout=0.2, **timed))
    assert (status, again.run_id) == (RunStatus.FINISHED, first.run_id)
    (_, _, late), *_ = [record.clients for record in run_summary(again.path).rounds]
    assert late.status is ClientStatus.LATE, "else the deadline decides nothing here"


@pytest.mark.usefixtures("home")
def test_without_a_directory_the_newest_unfinished_run_of_the_configuration_goes_on() -> None:
    status, stopped = run(config(), stop_at=2)
    assert status is RunStatus.STOPPED
    assert run_summary(stopped.path).status is RunStatus.STOPPED
    _, other = run(config(seed=1), stop_at=2)
    assert other.run_id != stopped.run_id, "another configuration is another run"
    status, resumed = run(config())
    assert (status, resumed.run_id) == (RunStatus.FINISHED, stopped.run_id)
    _, fresh = run(config())
    assert fresh.run_id != stopped.run_id, "a finished run is not resumed"
    assert resumed.path.parent == places.RUNS
    assert torch.equal(final(fresh), final(resumed)), "the interruption shows nowhere"


@pytest.mark.usefixtures("home")
def test_a_finished_run_run_again_stays_as_it_is() -> None:
    _, first = run(config(run_dir=Path("r")))
    before = final(first)
    sink = RecordingSink()
    status, again = run(config(run_dir=Path("r")), sink=sink)
    assert (status, again.run_id) == (RunStatus.FINISHED, first.run_id)
    assert not sink.of(RoundStarted)
    assert torch.equal(final(again), before)
    assert run_summary(again.path).status is RunStatus.FINISHED


@pytest.mark.usefixtures("home")
def test_an_extension_adds_rounds_with_all_clients() -> None:
    run(config(run_dir=Path("r")))
    sink = RecordingSink()
    status, directory = run(config(run_dir=Path("r"), extend=2), sink=sink)
    assert status is RunStatus.FINISHED
    assert [s.first_round for s in sink.of(RunStarted)] == [3]
    assert [(e.round, e.cohort) for e in sink.of(RoundStarted)] == [(3, ("a", "b", "c")), (4, ("a", "b", "c"))]
    assert [r.round for r in run_summary(directory.path).rounds] == [1, 2, 3, 4]
    assert (directory.model / "model.safetensors").exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("run_dir", [None, Path("nothing-here")])
def test_an_extension_needs_a_run_to_extend(run_dir: Path | None) -> None:
    with pytest.raises(UsageError, match="--extend adds rounds to a run"):
        run(config(extend=1, run_dir=run_dir))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_that_lost_its_checkpoints_does_not_start_over_in_silence(rounds: int) -> None:
    _, directory = run(config(run_dir=Path("r"), rounds=rounds))
    shutil.rmtree(directory.checkpoints)
    with pytest.raises(RunError, match=rf"finished {rounds} rounds?, but '.*checkpoints' has no checkpoint"):
        run(config(run_dir=Path("r"), rounds=rounds))
    assert run_summary(directory.path).status is RunStatus.FINISHED


@pytest.mark.usefixtures("home")
def test_a_run_that_crashed_before_its_first_checkpoint_resumes() -> None:
    _, directory = run(config(run_dir=Path("r")), stop_at=2)  # round 1 is recorded before its checkpoint
    shutil.rmtree(directory.checkpoints)
    assert run(config(run_dir=Path("r")))[0] is RunStatus.FINISHED


@pytest.mark.usefixtures("home")
def test_a_run_that_lost_its_database_resumes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    _, directory = run(config(run_dir=Path("r"), rounds=3), stop_at=3)
    directory.database.unlink()
    assert run(config(run_dir=Path("r"), rounds=3))[0] is RunStatus.FINISHED
    assert "its database run.db is missing" in caplog.text
    assert [record.round for record in run_summary(directory.path).rounds] == [3]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("run_dir", [None, Path("r")])
def test_a_setting_that_an_older_version_did_not_have_is_no_difference_at_its_default(run_dir: Path | None) -> None:
    _, first = run(config(run_dir=run_dir), stop_at=2)
    older = "".join(line for line in first.config_toml.splitlines(keepends=True) if not line.startswith("test-every"))
    first.replace_config(older, files.digest(older))
    if run_dir is not None:
        with pytest.raises(RunError, match=r"other settings \(test-every: not set → 2\)"):
            run(config(run_dir=run_dir, test_every=2))
    status, again = run(config(run_dir=run_dir))
    assert (status, again.run_id) == (RunStatus.FINISHED, first.run_id)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not the configuration that .* was started with: it is damaged"),
        ("rounds = 3\n", "is not the configuration that .* was started with: it is damaged"),
        ("rounds = ", "is not valid TOML: .* Restore it from a copy"),
    ],
)
def test_a_damaged_configuration_is_one_short_sentence(
    content: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = run(config(run_dir=places.RUNS / "r"), stop_at=2)
    first.config.write_text(content)
    with pytest.raises(RunError, match=rf"config\.toml' {said}"):
        run(config(run_dir=first.path))
    _, other = run(config())
    assert other.run_id != first.run_id
    assert "this run is not resumed" in caplog.text


@pytest.mark.usefixtures("home")
def test_of_many_differences_the_first_few_are_listed() -> None:
    run(config(run_dir=Path("r")))
    others = {
        "seed": 1, "image_size": 16, "width": 8, "client_lr": 0.5, "local_epochs": 1, "momentum": 0.5, "rounds": 3,
        "weight_decay": 0.0, "label_smoothing": 0.0, "gradient_clip": 0.0,
    }  # fmt: skip
    with pytest.raises(RunError, match=r"\(client-lr: 0\.05 → 0\.5, .* and 2 more\)\. .* \(more rounds: --extend N\)"):
        run(config(run_dir=Path("r"), **others))


@pytest.mark.usefixtures("home")
def test_a_run_in_use_is_not_started_twice() -> None:
    with (
        open_run(config(run_dir=Path("r")), watchers=()),
        pytest.raises(RunError),
        open_run(config(run_dir=Path("r")), watchers=()),
    ):
        pass


@pytest.mark.usefixtures("home")
def test_a_folder_of_other_things_is_not_taken_for_a_run() -> None:
    Path("r").mkdir()
    (Path("r") / "thesis.doc").write_text("precious")
    with pytest.raises(RunError, match=r"thesis\.doc"):
        run(config(run_dir=Path("r")))


@pytest.mark.usefixtures("home")
def test_the_catalogue_is_frozen_into_the_run() -> None:
    _, directory = run(config(run_dir=Path("r")), stop_at=2)
    assert Catalogue.load(directory.catalogue).names == tuple(sorted(CLASSES))
