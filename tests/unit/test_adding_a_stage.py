"""The how-to's stage is real: it is put together from the page and run."""

import re
from pathlib import Path
from typing import Any

import torch

from fedshelf.compression.chain import parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.codec_stage import Encode
from fedshelf.core.events import RunStatus
from fedshelf.core.messages import ServerMessage, Upload
from fedshelf.privacy.clipping import Clip
from fedshelf.rounds.pipeline import UploadPipeline, problems
from tests.fakes import Answer
from tests.worlds import World

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "add-a-pipeline-stage.md"


def stage(step: float) -> Any:
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    found: dict[str, Any] = {"__name__": "grid"}
    exec(compile(code, str(PAGE), "exec"), found)
    return found["Grid"](step=step)


def test_the_stage_of_the_how_to_runs_between_the_two_built_in_ones() -> None:
    stages = (Clip(max_norm=1.0), stage(0.01), Encode(policy=CodecPolicy(codec=parse("fp16"))))
    assert problems(stages) == []
    world = World(num_rounds=3, plan={"uploads": UploadPipeline(stages=stages)})
    assert world.run() is RunStatus.FINISHED
    kept = world.states["a"].peek(world.transport.broadcasts("line-to-a")[-1].key).pipeline
    assert set(kept) == {"grid"}, "the codec fp16 keeps nothing"
    assert 0 < kept["grid"].abs().max() <= 0.005 + 1e-6


def test_what_it_rounds_off_is_sent_later() -> None:
    sent: list[torch.Tensor] = []

    def watch(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload):
            sent.append(honest.delta)
        return honest

    world = World(num_rounds=4, plan={"uploads": UploadPipeline(stages=(stage(0.1),))}, tampers={"a": watch})
    world.run()
    assert len(sent) == 4
    for delta in sent:
        torch.testing.assert_close(delta, torch.round(delta / 0.1) * 0.1, rtol=0, atol=1e-6)


def test_a_stage_that_works_on_plain_vectors_is_refused_behind_the_codec() -> None:
    codec = Encode(policy=CodecPolicy(codec=parse("int8")))
    (problem,) = problems((codec, Clip(max_norm=1.0)))
    assert "put it first" in problem
