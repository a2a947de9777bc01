"""`--slowdowns` and `--dropout`: simulations in virtual time."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedshelf.cli.app import app
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RunError, UsageError
from fedshelf.core.events import (
    ClientJoined,
    ClientLeft,
    ComparisonReceived,
    ComparisonStarted,
    RoundFinished,
    RoundStarted,
    RunStatus,
    UploadReceived,
)
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.tracking.queries import run_summary
from tests.fakes import RecordingSink
from tests.unit.simulate import slow_stores
from tests.unit.simulate.slow_stores import ROUGH, history, out_of, rounds_of, simulate, state_of

pytestmark = pytest.mark.usefixtures("home")

EPOCH = slow_stores.NUM_PHOTOS / 100  # virtual seconds


def statuses(directory: RunDirectory) -> list[dict[str, str]]:
    return [{member.client: member.status.value for member in record.clients} for record in rounds_of(directory)]


def virtual_seconds(directory: RunDirectory) -> list[float]:
    """Of each round."""
    return [record.virtual_seconds for record in rounds_of(directory) if record.virtual_seconds is not None]


@pytest.mark.parametrize(
    ("slowdowns", "slowest"), [(None, 1.0), ("1,1,5", 5.0), ("2", 2.0), ("1,3", 3.0), ("0.5", 0.5)]
)
def test_a_round_that_waits_for_all_takes_as_long_as_the_slowest_store(slowdowns: str | None, slowest: float) -> None:
    _, directory = simulate("abc", Path("r"), slowdowns=slowdowns, local_epochs=2)
    assert virtual_seconds(directory) == pytest.approx([slowest * 2 * EPOCH] * 3)
    assert state_of(directory).virtual_seconds == pytest.approx(3 * slowest * 2 * EPOCH)


def test_slowdowns_change_time_and_not_the_model_where_nobody_is_late() -> None:
    finals = [
        state_of(simulate("abc", Path(f"r{number}"), slowdowns=slowdowns)[1]).model.params
        for number, slowdowns in enumerate((None, "1,1,5", "3,2,1"))
    ]
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2])


def test_a_slow_store_is_late_at_a_deadline_and_its_next_task_begins_when_it_is_done() -> None:
    """a and b take 0.2 s, c takes 1 s; rounds end after 0.45 s."""
    given: dict[str, Any] = {"slowdowns": "1,1,5", "round_timeout": 0.45, "quorum": 2}
    ends: list[Any] = []
    for num_rounds in (1, 2, 3, 4):
        _, directory = simulate("abc", Path(f"r{num_rounds}"), rounds=num_rounds, **given)
        flights = state_of(directory).in_flight
        ends.append([(flight.client, flight.key.round, pytest.approx(flight.due)) for flight in flights])
    assert ends == [
        [("c", 1, 1.0)],
        [("c", 1, 1.0), ("c", 2, 2.0)],
        [("c", 3, 2.0)],  # at 1.0 it was done with round 1; round 2's task was closed, and it took the newest
        [("c", 3, 2.0), ("c", 4, 3.0)],
    ]
    assert statuses(directory) == [{"a": "counted", "b": "counted", "c": "late"}] * 4
    assert virtual_seconds(directory) == pytest.approx([0.45] * 4)
    assert "no answer within 0.45 s" in rounds_of(directory)[0].clients[2].reason


def test_a_deadline_that_all_keep_ends_no_round() -> None:
    _, directory = simulate("abc", Path("r"), slowdowns="1,1,5", round_timeout=1.5)
    assert statuses(directory) == [{"a": "counted", "b": "counted", "c": "counted"}] * 3
    assert virtual_seconds(directory) == pytest.approx([1.0] * 3)


def test_a_store_that_can_never_be_in_time_ends_a_run_that_needs_it() -> None:
    """b takes 0.4 s; rounds end after 0.3 s and need both. Its next task begins when it is done, too late again."""
    with pytest.raises(RunError, match="void 10 times in a row"):
        simulate("ab", Path("r"), slowdowns="1,2", round_timeout=0.3, quorum=2)


def test_void_attempts_take_virtual_time_too() -> None:
    _, directory = simulate("ab", Path("r"), rounds=4, dropout=0.4, quorum=2)
    assert history(directory)[1], "no attempt was void"
    assert sum(virtual_seconds(directory)) == pytest.approx(state_of(directory).virtual_seconds)
    assert sum(virtual_seconds(directory)) > 4 * EPOCH


def test_who_drops_out_is_offline_in_the_round_and_there_again_later() -> None:
    sink = RecordingSink()
    given: dict[str, Any] = {"slowdowns": "1,2,4,3,1.5,5", "dropout": 0.3, "quorum": 1, "rounds": 6}
    status, directory = simulate("abcdef", Path("r"), watchers=(sink,), **given)
    assert status is RunStatus.FINISHED
    found = [status for members in statuses(directory) for status in members.values()]
    assert {*found} == {"counted", "offline"}
    assert len(sink.of(ClientLeft)) > found.count("offline"), "nobody was back in time to do it again"
    assert len(sink.of(ClientJoined)) > 6
    last_seen = {event.client for event in sink.of(ClientLeft)}
    assert len(last_seen) > 1
    for client in last_seen:
        events = [type(event) for event in sink.events if getattr(event, "client", None) == client]
        joins_and_leaves = [kind for kind in events if kind in (ClientJoined, ClientLeft)]
        assert joins_and_leaves[:2] == [ClientJoined, ClientLeft]
        assert all(one is not other for one, other in pairwise(joins_and_leaves))


def test_dropout_is_the_same_for_the_same_seed() -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        _, directory = simulate("abcdef", Path(f"r{number}"), dropout=0.3, quorum=1, seed=seed)
        found.append(history(directory))
    assert found[0] == found[1]
    assert found[0] != found[2]


class StopAt:
    """Asks to stop at the `number`-th event that tells of a round."""

    def __init__(self, number: int) -> None:
        self.number, self.stop = number, threading.Event()

    def emit(self, event: Any) -> None:
        if isinstance(event, RoundStarted | RoundFinished):
            self.number -= 1
            if self.number == 0:
                self.stop.set()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The rough run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSHELF_HOME", str(folder / "home"))
        status, directory = simulate("abcde", folder / "r", **ROUGH)
    assert status is RunStatus.FINISHED
    return directory


def test_the_rough_run_is_rough(whole: RunDirectory) -> None:
    """Else equality would show little."""
    found = {status for members in statuses(whole) for status in members.values()}
    assert found == {"counted", "late", "offline"}
    assert history(whole)[1], "no attempt was void"
    assert len({frozenset(members) for members in statuses(whole)}) > 1, "everybody is drawn in every round"


@pytest.mark.parametrize("at", [2, 3, 4, 5, 7, 9, 12, 14])
def test_a_run_that_is_stopped_and_gone_on_with_comes_to_the_same_model_at_the_same_moment(
    whole: RunDirectory, at: int
) -> None:
    stopper = StopAt(at)
    status, _ = simulate("abcde", Path("r"), watchers=(stopper,), stop=stopper.stop, **ROUGH)
    assert status is RunStatus.STOPPED
    status, resumed = simulate("abcde", Path("r"), **ROUGH)
    assert status is RunStatus.FINISHED
    assert history(resumed) == history(whole)
    assert state_of(resumed).virtual_seconds == state_of(whole).virtual_seconds
    assert out_of(resumed) == out_of(whole)
    assert torch.equal(state_of(resumed).model.params, state_of(whole).model.params)


@pytest.mark.parametrize(
    "pacing",
    [{"local_work": "dynamic"}, {"straggler_factor": 1.2}, {"over_selection": 0.5}],
    ids=lambda flags: next(iter(flags)),
)
def test_what_is_made_of_slow_stores_goes_on_as_it_was(pacing: dict[str, Any]) -> None:
    given = {**ROUGH, "fraction": 0.6, "round_timeout": 3.0, "local_epochs": 3, "rounds": 5, **pacing}
    _, whole = simulate("abcde", Path("whole"), **given)
    stopper = StopAt(6)
    simulate("abcde", Path("r"), watchers=(stopper,), stop=stopper.stop, **given)
    status, resumed = simulate("abcde", Path("r"), **given)
    assert status is RunStatus.FINISHED
    assert history(resumed) == history(whole)
    assert state_of(resumed).pace == state_of(whole).pace
    assert torch.equal(state_of(resumed).model.params, state_of(whole).model.params)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_whoever_computes_and_when_the_course_of_the_run_is_the_same(whole: RunDirectory, workers: int) -> None:
    """Late stores are still at work when the model is evaluated centrally."""
    _, directory = simulate("abcde", Path("r"), workers=workers, **ROUGH)
    assert history(directory) == history(whole)
    assert torch.equal(state_of(directory).model.params, state_of(whole).model.params)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_stores_computed_together_keep_the_same_times(whole: RunDirectory, workers: int) -> None:
    finals = []
    for number in range(2):
        _, directory = simulate("abcde", Path(f"r{number}"), workers=workers, engine="vmap", **ROUGH)
        assert statuses(directory) == statuses(whole)
        assert state_of(directory).virtual_seconds == state_of(whole).virtual_seconds
        finals.append(state_of(directory).model.params)
    torch.testing.assert_close(finals[0], state_of(whole).model.params, rtol=0, atol=1e-4)
    assert torch.equal(*finals), "who is computed beside whom depends on who is first"


@pytest.mark.slow
def test_a_run_that_is_killed_and_gone_on_with_comes_to_the_same_model_at_the_same_moment(whole: RunDirectory) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", slow_stores.__name__, "killed", "2"]
    with subprocess.Popen(command, env=environment) as process:
        checkpoint = Path("killed") / "checkpoints" / "round-000003.safetensors"
        while not checkpoint.exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    status, resumed = simulate("abcde", Path("killed"), **ROUGH)
    assert status is RunStatus.FINISHED
    assert history(resumed) == history(whole)
    assert torch.equal(state_of(resumed).model.params, state_of(whole).model.params)


@pytest.mark.slow
@pytest.mark.usefixtures("with_ray")
def test_a_ray_cluster_keeps_the_same_times(whole: RunDirectory) -> None:
    _, directory = simulate("abcde", Path("r"), workers=2, engine="ray", **ROUGH)
    assert history(directory) == history(whole)
    assert torch.equal(state_of(directory).model.params, state_of(whole).model.params)


ASYNCHRONOUS: dict[str, Any] = {
    "algorithm": "fedbuff", "buffer_size": 2, "rounds": 7, "slowdowns": "1,1.5,4.5,2,1.1", "fraction": 0.8,
    "lr_schedule": "cosine", "dropout": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The asynchronous run, uninterrupted."""
    folder = tmp_path_factory.mktemp("asynchronous")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSHELF_HOME", str(folder / "home"))
        status, directory = simulate("abcde", folder / "r", **ASYNCHRONOUS)
    assert status is RunStatus.FINISHED
    return directory


def test_asynchronous_versions_are_made_when_the_buffer_is_full_and_slow_stores_are_stale() -> None:
    """a and b take 0.2 s, c takes 0.9 s; two uploads make a version."""
    given: dict[str, Any] = {"algorithm": "fedbuff", "buffer_size": 2, "slowdowns": "1,1,4.5", "rounds": 5}
    _, directory = simulate("abc", Path("r"), **given)
    made = [[(member.client, member.staleness) for member in record.clients] for record in rounds_of(directory)]
    assert made == [[("a", 0), ("b", 0)], *[[("a", 1), ("b", 0)]] * 3, [("a", 1), ("c", 4)]]  # a goes on at once
    assert virtual_seconds(directory) == pytest.approx([0.2] * 5)
    flights = {flight.client: flight.due for flight in state_of(directory).in_flight}
    assert flights == {"b": pytest.approx(1.0), "c": pytest.approx(1.8)}


def test_a_store_that_trains_twice_from_one_model_sees_its_photos_in_another_order() -> None:
    given: dict[str, Any] = {"algorithm": "fedbuff", "buffer_size": 2, "slowdowns": "1,9,9", "rounds": 1}
    seen = RecordingSink()
    simulate("abc", Path("r"), watchers=(seen,), **given)
    first, second = seen.of(RoundFinished)[0].clients
    assert (first.client, first.staleness, first.number) == ("a", 0, 0)
    assert (second.client, second.staleness, second.number) == ("a", 0, 1)
    assert first.train_loss != second.train_loss


def test_the_asynchronous_run_has_stale_uploads_and_stores_that_break_off(asynchronous: RunDirectory) -> None:
    """Else equality would show little."""
    members = [member for record in rounds_of(asynchronous) for member in record.clients]
    assert {member.status.value for member in members} == {"counted", "offline"}
    assert max(member.staleness or 0 for member in members) > 1


@pytest.mark.parametrize("at", [2, 3, 5, 6, 9, 12])
def test_an_asynchronous_run_that_is_gone_on_with_comes_to_the_same_model_at_the_same_moment(
    asynchronous: RunDirectory, at: int
) -> None:
    stopper = StopAt(at)
    status, _ = simulate("abcde", Path("r"), watchers=(stopper,), stop=stopper.stop, **ASYNCHRONOUS)
    assert status is RunStatus.STOPPED
    status, resumed = simulate("abcde", Path("r"), **ASYNCHRONOUS)
    assert status is RunStatus.FINISHED
    assert history(resumed) == history(asynchronous)
    assert out_of(resumed) == out_of(asynchronous)
    assert torch.equal(state_of(resumed).model.params, state_of(asynchronous).model.params)


def test_an_asynchronous_run_that_compresses_can_be_gone_on_with() -> None:
    """It asks for older models than the newest, from which differences do not begin."""
    given = {**ASYNCHRONOUS, "codec_down": "int8", "codec_up": "int8"}
    _, whole = simulate("abcde", Path("whole"), **given)
    stopper = StopAt(9)
    simulate("abcde", Path("r"), watchers=(stopper,), stop=stopper.stop, **given)
    status, resumed = simulate("abcde", Path("r"), **given)
    assert status is RunStatus.FINISHED
    assert history(resumed) == history(whole)
    assert torch.equal(state_of(resumed).model.params, state_of(whole).model.params)


class StopAtUpload:
    """Asks to stop when so many uploads have come in."""

    def __init__(self, number: int) -> None:
        self.number, self.stop = number, threading.Event()

    def emit(self, event: Any) -> None:
        self.number -= isinstance(event, UploadReceived)
        if self.number == 0:
            self.stop.set()


FAST: dict[str, Any] = {"algorithm": "fedbuff", "buffer_size": 4, "rounds": 3, "slowdowns": "1,30,30"}
LATE = {**ROUGH, "rounds": 6}


@pytest.mark.parametrize(
    ("names", "given", "at"),
    [("abc", FAST, 3), ("abc", FAST, 7), ("abc", FAST, 11), ("abcde", LATE, 8), ("abcde", LATE, 17)],
)
def test_what_clients_remember_is_what_it_was(names: str, given: dict[str, Any], at: int) -> None:
    """That is what compression has left out. One answers four times between two checkpoints; or some are late."""
    given = {**given, "codec_up": "topk:0.3"}
    _, whole = simulate(names, Path("whole"), **given)
    stopper = StopAtUpload(at)
    simulate(names, Path("r"), watchers=(stopper,), stop=stopper.stop, **given)
    status, resumed = simulate(names, Path("r"), **given)
    assert status is RunStatus.FINISHED
    assert history(resumed) == history(whole)
    assert torch.equal(state_of(resumed).model.params, state_of(whole).model.params)


class StopAtComparison:
    """Asks to stop at the `number`-th event that tells of the comparison: when it begins, or a store has compared."""

    def __init__(self, number: int) -> None:
        self.number, self.stop = number, threading.Event()

    def emit(self, event: Any) -> None:
        self.number -= isinstance(event, ComparisonStarted | ComparisonReceived)
        if self.number == 0:
            self.stop.set()


COMPARES: dict[str, Any] = {
    **ROUGH, "rounds": 2, "dropout": 0.6, "quorum": 1, "personalize": "finetune", "finetune_epochs": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "all_there", "at"),
    [(13, True, 2), (1, False, 2), (6, False, 1)],
    ids=["some were never counted", "one is away", "all but one are away"],
)
def test_a_comparison_that_is_stopped_and_gone_on_with_comes_to_the_same_table(
    seed: int, all_there: bool, at: int
) -> None:
    _, whole = simulate("abcde", Path("whole"), seed=seed, **COMPARES)
    end = state_of(whole).virtual_seconds
    away = [flight.client for flight in state_of(whole).in_flight if flight.leaves is not None and flight.leaves <= end]
    assert (not away) is all_there
    stopper = StopAtComparison(at)
    status, _ = simulate("abcde", Path("r"), seed=seed, watchers=(stopper,), stop=stopper.stop, **COMPARES)
    assert status is RunStatus.STOPPED
    status, resumed = simulate("abcde", Path("r"), seed=seed, **COMPARES)
    assert status is RunStatus.FINISHED
    assert run_summary(whole.path).stores
    assert run_summary(resumed.path).stores == run_summary(whole.path).stores


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_asynchronous_run_is_the_same_whoever_computes(asynchronous: RunDirectory, workers: int) -> None:
    _, directory = simulate("abcde", Path("r"), workers=workers, **ASYNCHRONOUS)
    assert history(directory) == history(asynchronous)
    assert torch.equal(state_of(directory).model.params, state_of(asynchronous).model.params)


def test_stores_that_all_diverge_end_an_asynchronous_simulation() -> None:
    with pytest.raises(RunError, match=r"no client is left.*lower --client-lr"):
        simulate("abc", Path("r"), algorithm="fedbuff", buffer_size=2, client_lr=1e30, gradient_clip=0.0)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("", "''"), ("1,", "''"), ("1,x", "'x'"), ("1;2", "'1;2'"), ("1,0", "'0'"), ("-1", "'-1'"), ("nan", "'nan'"),
     ("1,inf", "'inf'")],
)  # fmt: skip
def test_slowdowns_that_are_no_numbers_are_wrong_use(text: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=rf"--slowdowns {text}: {wrong} is not a number above 0; .* such as 1,1,5"):
        files.load(RunConfig, None, {"slowdowns": text})


def test_more_slowdowns_than_stores_are_wrong_use() -> None:
    with pytest.raises(UsageError, match=r"--slowdowns 1,1,1,5: 4 numbers for 3 stores \('a', 'b', 'c'\)"):
        simulate("abc", Path("r"), slowdowns="1,1,1,5")
    assert not Path("r").exists()


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability_below_1_is_wrong_use(dropout: float) -> None:
    with pytest.raises(UsageError, match="dropout"):
        files.parse(RunConfig, {"dropout": dropout}, where="the command line")


def test_the_same_slowdowns_written_otherwise_are_the_same_run() -> None:
    for text in ("1,2.5,5", " 1.0, 2.50 ,5e0"):
        assert files.parse(RunConfig, {"slowdowns": text}, where="a file").slowdowns == "1,2.5,5"
    assert 'slowdowns = "1,2.5,5"' in files.effective(RunConfig(slowdowns="1,2.5,5"))
    assert "slowdowns" not in files.for_clients(RunConfig(slowdowns="1,2.5,5", dropout=0.5))
    assert "dropout" not in files.for_clients(RunConfig(slowdowns="1,2.5,5", dropout=0.5))


def test_runs_show_tells_virtual_time() -> None:
    simulate("abc", Path("r"), slowdowns="1,1,500")
    shown = CliRunner().invoke(app, ["runs", "show", "r"], catch_exceptions=False)
    assert "virtual time" in shown.stdout
    assert "1 min 40 s" in shown.stdout
    as_json = CliRunner().invoke(app, ["runs", "show", "r", "--json"], catch_exceptions=False)
    assert as_json.stdout.count('"virtual_seconds": 100.0') == 3
