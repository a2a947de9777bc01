"""A store's policy file, and what it allows."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedshelf.core.errors import PolicyError, UsageError
from fedshelf.core.messages import Broadcast, Purpose, TaskKey
from fedshelf.privacy import policy as policies
from fedshelf.privacy.policy import OPEN, STANDARD, STRICT, Policy, load, parse
from fedshelf.privacy.policy_tables import (
    Limits,
    Metrics,
    Models,
    Protection,
    ProtectionOffer,
    Purposes,
    Server,
)

PAGE = Path("docs/how-to/limit-what-a-server-may-do.md")


def check(policy: Policy, model: str = "resnet10", **run: Any) -> None:
    given = {"image_size": 32, "threads": 1, "epochs": 1, "sums": False, "weighs_examples": True} | run
    policy.check_setup(model=model, **{"offer": ProtectionOffer(), **given})


def test_the_built_in_policies_are_loaded_by_name(tmp_path: Path) -> None:
    assert (load("standard"), load("open"), load("strict")) == (STANDARD, OPEN, STRICT)
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
        ("[limits]\nmin-epochs-per-task = nan", ["must be a finite number, such as 0.25"]),
        ("[limits]\nmin-epochs-per-task = inf", ["must be a finite number, such as 0.25"]),
        ("[protection]\nrequired = 'sample-dp'\nepsilon = inf", ["must be a finite number, such as 8.0"]),
        ("[protection]\nepsilon = 3\ndelta = 1e-6",
         ["[protection] of p.toml sets epsilon and delta to no effect, because it lacks required",
          'required = "sample-dp"']),
        ("[server]\naddresses = ['foo', 'foo:99999', 'foo:0', '*:1', 'a::1:8', 'http://a:1', '']",
         [f"the address {text!r} is not HOST:PORT: write, for example, \"192" for text in
          ("foo", "foo:99999", "foo:0", "*:1", "a::1:8", "http://a:1", "")]),
        ("[models]\nallow = 'resnet10'", ["not a list of texts"]),
        ("[metrics]\nper-product = 0", ["per-product in [metrics] of p.toml: neither true nor false"]),
        ("[models]\nallow = []", ["not a list of texts"]),
        ("[models]\nallow = ['nets:*', '../x:y']", ["'nets:*' is not MODULE:FUNCTION", "'../x:y' is not "]),
        ("[limits", ["p.toml is not valid TOML"]),
        ("[models]\nown-code = false\nallow = ['nets:make']",
         ["'nets:make' is code of a user's own, and own-code = false"]),
        ("[purposes]\nevaluation = true", ["did you mean 'evaluate'?"]),
        ("[protection]\nrequired = 'sample-pd'",
         ["must be one of none, sample-dp, secagg, he: did you mean 'sample-dp'?"]),
        ("[protection]\nepsilon = 0\ndelta = 1\nmin-cohort = 0",
         ["epsilon in [protection] of p.toml: must be above 0", "must be above 0 and below 1", "must be at least 1"]),
        ("[protection]\nepsilon = nan\ndelta = true",
         ["must be a finite number", "delta in [protection] of p.toml: not a number"]),
        ("[protection]\nrequired = ['he']", ["must be one of none, sample-dp"]),
        ("[server]\nauthorities = ['AB:CD']", ["'AB:CD' is not a fingerprint of 64 hexadecimal digits"]),
        ("[server]\naddresses = 'a:1'", ["addresses in [server] of p.toml: not a list of texts"]),
        ("a = " + "[" * 50_000, ["p.toml is not valid TOML"]),
    ],
)  # fmt: skip
def test_all_problems_of_a_file_are_told_at_once(text: str, problems: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, where="p.toml")
    assert all(problem in str(caught.value) for problem in problems), caught.value


@pytest.mark.parametrize("name", ["absent.toml", ".", "~nobody-of-that-name/p.toml", "a\0b"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_the_built_in_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot read --policy .* standard, open, strict"):
        load(name)


def test_an_empty_name_and_a_file_in_another_encoding_are_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read --policy '': the name is empty; give a TOML file"):
        load("")
    file = tmp_path / "policy.toml"
    file.write_bytes("# für Lyon\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"it is not UTF-8 text\. Save it as UTF-8; give a TOML file"):
        load(str(file))


def test_addresses_are_hosts_with_ports_and_no_budget_can_be_chosen_in_words() -> None:
    addresses = "[server]\naddresses = ['a.b:1', '192.168.1.1:65535', '[2001:db8::1]:8080', 'köln-1:8080']"
    assert len(parse(addresses, where="p.toml").server.addresses) == 4
    assert parse("[protection]\nrequired = 'none'\nepsilon = 3", where="p.toml").protection.required == "none"


@pytest.mark.parametrize("model", ["resnet10", "resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0"])
def test_the_standard_policy_allows_the_models_of_the_documentation(model: str) -> None:
    check(STANDARD, model, image_size=224, threads=0, epochs=10)


def test_everything_in_a_configuration_that_is_not_allowed_is_told_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        check(STANDARD, "vit_huge_patch14_224", image_size=513, threads=65, epochs=101)
    for limit in ("vit_huge", "max-image-size = 512", "max-threads = 64", "max-local-epochs = 100"):
        assert limit in str(caught.value)
    check(OPEN, "vit_huge_patch14_224", image_size=513, threads=65, epochs=101)


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


def refusal(policy: Policy, **run: Any) -> str:
    """Why a policy refuses a run; empty if it does not."""
    try:
        check(policy, **run)
    except PolicyError as error:
        return str(error)
    return ""


NOISY = ProtectionOffer(kind="sample-dp", delta=1e-5)


@pytest.mark.parametrize("offer", [ProtectionOffer(), NOISY, ProtectionOffer(kind="secagg")])
def test_encryption_that_a_store_requires_is_in_the_run_or_it_takes_no_part(offer: ProtectionOffer) -> None:
    policy = Policy(protection=Protection(required="he"))
    assert refusal(policy, offer=ProtectionOffer(kind="he")) == ""
    assert "required = 'he', and this run does not encrypt updates (--he)" in refusal(policy, offer=offer)


@pytest.mark.parametrize("offer", [ProtectionOffer(), NOISY])
def test_masks_that_a_store_requires_are_in_the_run_or_it_takes_no_part(offer: ProtectionOffer) -> None:
    policy = Policy(protection=Protection(required="secagg"))
    assert refusal(policy, offer=ProtectionOffer(kind="secagg")) == ""
    assert "required = 'secagg', and this run does not mask updates (--secagg)" in refusal(policy, offer=offer)


@pytest.mark.parametrize(
    ("offer", "told"),
    [
        (NOISY, ""),
        (ProtectionOffer(), "this run adds no noise at the stores (--dp sample)"),
        (replace(NOISY, delta=1e-3), "this run's delta of 0.001 is not in 0 to delta = 1e-05"),
        (replace(NOISY, delta=0.0), "this run's delta of 0 is not in 0 to"),
    ],
)  # fmt: skip
def test_noise_must_be_there_and_suffice(offer: ProtectionOffer, told: str) -> None:
    found = refusal(Policy(protection=Protection(required="sample-dp")), offer=offer)
    assert told in found
    assert bool(found) == bool(told)
    assert refusal(STANDARD, offer=offer) == "", "noise that is not required is no matter"


def test_numbers_of_photos_are_withheld_only_where_nothing_needs_them() -> None:
    secret = Policy(metrics=Metrics(example_counts=False))
    assert "--weights equal" in refusal(secret)
    assert "sums over photos contain it" in refusal(secret, sums=True, weighs_examples=False)
    assert refusal(secret, weighs_examples=False) == ""


def task(purpose: Purpose, **fields: Any) -> Broadcast:
    return Broadcast(key=TaskKey(run_id="r", round=1, attempt=0), purpose=purpose, client_lr=0.1, **fields)


@pytest.mark.parametrize(
    ("policy", "sums", "refused"),
    [
        (Policy(), False, []),
        (Policy(purposes=Purposes(train=False)), False, ["train"]),
        (Policy(purposes=Purposes(closed_form=False)), False, ["closed form"]),
        (Policy(purposes=Purposes(closed_form=False)), True, ["train", "closed form"]),
        (Policy(purposes=Purposes(evaluate=False)), False, ["evaluate"]),
        (Policy(purposes=Purposes(compare=False)), False, ["compare"]),
        (Policy(metrics=Metrics(example_counts=False)), False, ["closed form", "evaluate"]),
        (Policy(protection=Protection(min_cohort=3)), False, []),
        (Policy(protection=Protection(min_cohort=4)), False, ["train", "closed form"]),
    ],
)  # fmt: skip
def test_each_purpose_can_be_refused(policy: Policy, sums: bool, refused: list[str]) -> None:
    tasks = {
        "train": task(Purpose.TRAIN, quorum=3), "closed form": task(Purpose.TRAIN, quorum=3, closed_form=True),
        "evaluate": task(Purpose.EVALUATE), "compare": task(Purpose.COMPARE),
    }  # fmt: skip
    found = []
    for name, broadcast in tasks.items():
        try:
            policy.check_task(broadcast, sums=sums)
        except PolicyError:
            found.append(name)
    assert found == refused


def test_a_server_that_tells_no_quorum_is_taken_to_use_an_update_alone() -> None:
    with pytest.raises(PolicyError, match="the updates of 1 store: min-cohort = 2"):
        Policy(protection=Protection(min_cohort=2)).check_task(task(Purpose.TRAIN), sums=False)


def test_a_server_is_known_by_its_address_and_its_authority() -> None:
    first, second = "ab" * 32, "cd" * 32
    server = Server(addresses=("HQ.example:8080",), authorities=(first.upper(), ":".join(["cd"] * 32)))
    assert server.problems() == []
    server.check("hq.example:8080", first)
    server.check("hq.example:8080", second)
    Server().check("anywhere:1", "")
    for address, authority in (("hq.example:8081", first), ("hq.example:8080", "ef" * 32), ("hq.example:8080", "")):
        with pytest.raises(PolicyError):
            server.check(address, authority)


def test_the_strict_policy_refuses_what_it_promises_to() -> None:
    assert "sample-dp" in refusal(STRICT)
    assert refusal(STRICT, offer=NOISY) == ""
    assert "closed-form = false" in refusal(STRICT, offer=NOISY, sums=True)
    with pytest.raises(UsageError, match="own-code = false"):
        STRICT.allowing(["nets.small:make"])
    assert (STRICT.purposes.compare, STRICT.metrics.losses, STRICT.metrics.per_product) == (False, False, False)
    with pytest.raises(PolicyError, match="its local epochs have more steps than max-local-steps = 2,000"):
        STRICT.check_photos(num_train=1601, num_photos=1601, batch_size=8, epochs=10)


def test_a_reason_does_not_tell_the_number_of_photos() -> None:
    for num_train, epochs in ((7, 1), (1601, 10)):
        with pytest.raises(PolicyError) as caught:
            STRICT.check_photos(num_train=num_train, num_photos=1977, batch_size=8, epochs=epochs)
        assert not {"1601", "1,601", "1977", "1,977", "201", "2,010", "7"} & set(str(caught.value).split())
