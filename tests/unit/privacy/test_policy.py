"""A store's policy file, and what it allows."""

import re
import tomllib
from pathlib import Path

import pytest

from fedshelf.core.errors import PolicyError, UsageError
from fedshelf.privacy import policy as policies
from fedshelf.privacy.policy import OPEN, STANDARD, Policy, load, parse
from fedshelf.privacy.policy_tables import Limits, Metrics, Models

PAGE = Path("docs/how-to/limit-what-a-server-may-do.md")


def test_the_built_in_policies_are_loaded_by_name(tmp_path: Path) -> None:
    assert (load("standard"), load("open")) == (STANDARD, OPEN)
    assert parse("", where="x") == STANDARD, "a key that is left out has the standard's value"
    file = tmp_path / "policy.toml"
    file.write_text(
        '[limits]\nrounds-per-day = 50\nmin-epochs-per-task = 1\n[models]\nallow = ["resnet10"]\n'
        "[metrics]\nper-product = false\n"
    )
    assert load(str(file)) == Policy(
        limits=Limits(rounds_per_day=50, min_epochs_per_task=1), models=Models(allow=("resnet10",)),
        metrics=Metrics(per_product=False),
    )  # fmt: skip


def test_the_page_shows_every_key_of_the_standard_policy() -> None:
    (text,) = [block for block in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.S) if "[models]" in block]
    assert parse(text, where=str(PAGE)) == STANDARD
    shown = {name: list(table) for name, table in tomllib.loads(text).items()}
    assert shown == {name: list(policies.keys(table)) for name, table in policies.TABLES.items()}


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[limit]", ["unknown table [limit] in p.toml: did you mean 'limits'?"]),
        ("[limits]\nround-per-day = 3", ["unknown key 'round-per-day' in [limits] of p.toml: did you mean "
                                         "'rounds-per-day'?"]),
        ("limits = 3", ["limits in p.toml is a table"]),
        ("[limits]\nmax-threads = 0\nmax-image-size = true\nmin-epochs-per-task = 'x'",
         ["max-threads in [limits] of p.toml: must be at least 1", "not a whole number", "not a number"]),
        ("[limits]\nmin-epochs-per-task = nan", ["must be at least 0"]),
        ("[models]\nallow = 'resnet10'", ["not a list of texts"]),
        ("[metrics]\nper-product = 0", ["per-product in [metrics] of p.toml: neither true nor false"]),
        ("[models]\nallow = []", ["not a list of texts"]),
        ("[models]\nallow = ['nets:*', '../x:y']", ["'nets:*' is not MODULE:FUNCTION", "'../x:y' is not "]),
        ("[limits", ["p.toml is not valid TOML"]),
        ("a = " + "[" * 50_000, ["p.toml is not valid TOML"]),
    ],
)  # fmt: skip
def test_all_problems_of_a_file_are_told_at_once(text: str, problems: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, where="p.toml")
    assert all(problem in str(caught.value) for problem in problems), caught.value


@pytest.mark.parametrize("name", ["absent.toml", ".", "~nobody-of-that-name/p.toml", "a\0b"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_the_built_in_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read --policy .* standard, open"):
        load(name)


@pytest.mark.parametrize("model", ["resnet10", "resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0"])
def test_the_standard_policy_allows_the_models_of_the_documentation(model: str) -> None:
    STANDARD.check_setup(model=model, image_size=224, threads=0, epochs=10)


def test_everything_in_a_configuration_that_is_not_allowed_is_told_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        STANDARD.check_setup(model="vit_huge_patch14_224", image_size=513, threads=65, epochs=101)
    for limit in ("vit_huge", "max-image-size = 512", "max-threads = 64", "max-local-epochs = 100"):
        assert limit in str(caught.value)
    OPEN.check_setup(model="vit_huge_patch14_224", image_size=513, threads=65, epochs=101)


@pytest.mark.parametrize(
    ("num_train", "num_photos", "batch_size", "allowed"),
    [
        (100, 110, 8, True), (100, 110, 7, False), (3, 3, 3, True), (3, 4, 2, False), (3, 6, 16, True),
        (1, 110, 16, False), (7, 110, 16, False), (8, 110, 16, True), (1, 1, 1, True), (5, 10, 8, True),
    ],
)  # fmt: skip
def test_a_step_takes_eight_photos_or_all_that_there_are(
    num_train: int, num_photos: int, batch_size: int, allowed: bool
) -> None:
    if allowed:
        STANDARD.check_photos(num_train=num_train, num_photos=num_photos, batch_size=batch_size, epochs=1)
    else:
        with pytest.raises(PolicyError, match="min-photos-per-step = 8"):
            STANDARD.check_photos(num_train=num_train, num_photos=num_photos, batch_size=batch_size, epochs=1)


def check(policy: Policy, model: str) -> None:
    policy.check_setup(model=model, image_size=32, threads=1, epochs=1)


@pytest.mark.parametrize("policy", [STANDARD, OPEN, Policy(models=Models(allow=("*", "nets*", "nets.small?make")))])
def test_code_of_a_user_s_own_is_allowed_by_its_whole_name_only(policy: Policy) -> None:
    with pytest.raises(PolicyError, match=r"--allow-model nets\.small:make"):
        check(policy, "nets.small:make")
    allowing = policy.allowing(["nets.small:make", "vit_tiny*"])
    check(allowing, "nets.small:make")
    check(allowing, "vit_tiny_patch16_224")
    for other in ("nets.small:make2", "nets.smallX:make", "os:abort", "nets.small:mak?"):
        with pytest.raises(PolicyError):
            check(allowing, other)


@pytest.mark.parametrize("name", ["nets:*", "/nets:make", "nets:make()"])
def test_a_pattern_or_a_path_cannot_be_allowed_as_code(name: str) -> None:
    with pytest.raises(UsageError, match=r"--allow-model: '.*' is not MODULE:FUNCTION"):
        STANDARD.allowing([name])
