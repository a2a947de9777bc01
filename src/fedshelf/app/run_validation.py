"""Finds what is wrong with a run's configuration before the run is created and clients wait for it."""

import logging

from torch import nn

from fedshelf.algorithms.base import Asynchronous
from fedshelf.app.components import (
    aggregator_of,
    algorithm_of,
    component_of,
    encryption_of,
    given_names,
    mask_of,
    optional_components,
    personalization_of,
    summed_codec_of,
    uploads_of,
    weighs_by_examples,
)
from fedshelf.app.differential_privacy import problem_with_model, problems_with_configuration
from fedshelf.app.model import ModuleFactory, bound_model_of, module_of, trainable_module_of
from fedshelf.app.photos import scan_test_photos
from fedshelf.app.teacher import problems_with_teacher
from fedshelf.compression.chain import parse
from fedshelf.compression.modular import Modular
from fedshelf.compression.sum_stage import EncodeSummand
from fedshelf.config.families import FAMILIES, OPTIONAL
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import Candidate
from fedshelf.core.errors import ModelError, UsageError
from fedshelf.core.text import counted, some
from fedshelf.data.catalogue import Catalogue
from fedshelf.data.filesystem import file_problem, folder_problem
from fedshelf.models.build import find_problem
from fedshelf.models.head import linear_head
from fedshelf.models.initial_weights import check_fit, extra_tensors, read_initial_weights
from fedshelf.models.registry import is_own
from fedshelf.privacy.homomorphic.packing import MOST_WEIGHT
from fedshelf.privacy.homomorphic.settings import Encryption
from fedshelf.privacy.secure_aggregation.context import LEAST_MEMBERS
from fedshelf.privacy.secure_aggregation.settings import Mask
from fedshelf.rounds import pipeline
from fedshelf.storage.model_files import has_model
from fedshelf.storage.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def check_run(config: RunConfig, make_module: ModuleFactory | None, existing: RunDirectory | None) -> None:
    """Detect later failures before the run is created and clients wait for it.

    Args:
        config: the run's configuration.
        make_module: creates the caller's own model, if there is one.
        existing: the run to resume, if any. It keeps its catalogue and the weights that it started from: the files may
            be gone.

    Raises:
        UsageError: settings are invalid (all are listed).
        DataError: a configured file cannot be used.
    """
    components = [component_of(config, family) for family in FAMILIES]
    components += [component for registry in OPTIONAL.values() for component in optional_components(config, registry)]
    has_weights = existing is not None and has_model(existing.initial_model)
    has_catalogue = existing is not None and existing.catalogue.exists()
    problems = [
        find_problem(config.model, pretrained=config.pretrained)
        or (None if make_module else _problem_with_own_model(config))
        or (None if has_weights else _problem_with_weights(config, make_module)),
        *_problems_with_codecs(config), *_problems_with_asynchrony(config), *_problems_with_sums(config),
        *_problems_with_sales(config), *problems_with_teacher(config), *_problems_with_ensemble(config),
        *_problems_with_summed_codes(config),
        *problems_with_configuration(config),
        *(problem for component in components for problem in getattr(component, "problems", list)()),
    ]  # fmt: skip
    for key, path, find in (
        ("catalogue", None if has_catalogue else config.catalogue, file_problem),
        ("aliases", None if has_catalogue else config.aliases, file_problem),
        ("data-dir", config.data_dir, folder_problem), ("test-dir", config.test_dir, folder_problem),
        ("unlabelled-dir", config.unlabelled_dir, folder_problem),
    ):  # fmt: skip
        if path is not None and (problem := find(path)):
            problems.append(f"--{key} {path}: {problem}")
    if config.data_dir is not None and config.test_dir is not None and config.test_dir.parent == config.data_dir:
        problems.append(f"--test-dir {config.test_dir} lies in --data-dir, and would be trained on as a store")
    if config.dynamic_batch and config.engine in ("vmap", "auto"):
        problems.append(
            f"--dynamic-batch with --engine {config.engine}: clients that are trained in one computation share one "
            "batch size. Use --engine local (with --workers) or ray, or leave --dynamic-batch out"
        )
    if not any(problems):
        problems.append(_problem_with_training(config, make_module))
        stages = uploads_of(config).stages
        problems += pipeline.problems(stages)
        problems += [
            f"--norm-bound {config.norm_bound} with {stage.declares.setting}: the server sees no single upload that it "
            "could bound. Use auto or off"
            for stage in stages
            if stage.declares.masks and config.norm_bound not in ("auto", "off")
        ]
    found = [problem for problem in problems if problem]
    if found:
        raise UsageError(*found)
    if not has_catalogue:
        given_names(config)
    for finding in scan_test_photos(config.test_dir).findings if config.test_dir else ():
        logger.warning("--test-dir: %s", finding)


def _problems_with_summed_codes(config: RunConfig) -> list[str]:
    """What uploads that are decoded as a sum only cannot be combined with."""
    try:
        codec = summed_codec_of(config)
    except UsageError:  # reported with the codecs
        return []
    hiding = [stage.declares.setting for stage in (mask_of(config), encryption_of(config)) if stage.is_on]
    found: list[str] = []
    if len(hiding) > 1:
        found.append("--secagg with --he: each hides all uploads but their sum. Leave one of the two out")
    if codec is None:
        if hiding:
            what = "masks" if mask_of(config).is_on else "encrypts"
            found.append(
                f"{hiding[0]} {what} integers: use --codec-up modular:16 or modular:32, or leave --codec-up out"
            )
        return found
    how = hiding[0] if hiding else f"--codec-up {config.codec_up}"
    wrong = {
        f"--aggregator {config.aggregator}": config.aggregator != "mean",
        f"--norm-bound {config.norm_bound}": config.norm_bound not in ("auto", "off") and not hiding,
        f"--algorithm {config.algorithm}": config.algorithm == "fedasync"
        or (config.algorithm == "fedbuff" and mask_of(config).is_on),
        f"--local-work {config.local_work}": config.local_work != "fixed",
    }
    found += [
        f"{flag} with {how}: the server decodes the sum of a round's uploads, and none by itself. Leave it out"
        for flag, is_set in wrong.items()
        if is_set
    ]
    if weighs_by_examples(config) and codec.bits < 32:
        found.append(
            f"--codec-up {config.codec_up} has no room for weights by photos: use modular:32, or --weights equal"
        )
    exact = {
        f"--algorithm {config.algorithm}": algorithm_of(config).counts_photos,
        f"--warm-start {config.warm_start}": config.warm_start != "none",
        "--refit-head": config.refit_head,
        f"--dp {config.dp}": config.dp == "client",
    }
    if encryption_of(config).is_on:
        found += [f"{flag} with --he: it is not encrypted. Use --secagg" for flag, is_set in exact.items() if is_set]
    if mask_of(config).is_on and algorithm_of(config).counts_photos and config.rounds + config.extend > 1:
        rounds = counted(config.rounds + config.extend, "round")
        found.append(
            f"{rounds} of --algorithm {config.algorithm} with --secagg: in each round after the first, stores "
            "send what has changed, and a sum of changes is that of the one store whose photos did. Use --rounds 1"
        )
    if hiding and config.sampling == "size":
        found.append(f"--sampling size with {how}: who is drawn would depend on numbers that it hides")
    if hiding and config.min_clients < LEAST_MEMBERS:
        found.append(
            f"--min-clients {config.min_clients} with {how}: a sum of fewer than {LEAST_MEMBERS} stores hides "
            f"nothing. Use {LEAST_MEMBERS} or more"
        )
    return found + _problems_with_buffered_sums(config, codec, how)


def _problems_with_buffered_sums(config: RunConfig, codec: Modular, how: str) -> list[str]:
    """What asynchronous rounds need, if uploads are decoded as a sum only."""
    algorithm = algorithm_of(config)
    if not isinstance(algorithm, Asynchronous) or config.algorithm != "fedbuff":
        return []
    found, size = [], algorithm.buffer_size
    if codec.summands < size * MOST_WEIGHT:
        found.append(
            f"--codec-up {config.codec_up} has no room for {counted(size, 'upload')} with weights up to {MOST_WEIGHT}: "
            f"use modular:{codec.bits}:{codec.range:g}:{size * MOST_WEIGHT}"
        )
    if encryption_of(config).is_on and size < LEAST_MEMBERS:
        found.append(
            f"--buffer-size {size} with {how}: a sum of fewer than {LEAST_MEMBERS} uploads hides nothing. Use "
            f"{LEAST_MEMBERS} or more"
        )
    if size > config.min_clients:
        found.append(
            f"--buffer-size {size} with {how} and --min-clients {config.min_clients}: a store has one upload in a "
            f"sum, so there would not be enough. Use --min-clients {size} or more, or a smaller buffer"
        )
    return found


def _problem_with_own_model(config: RunConfig) -> str | None:
    try:
        if is_own(config.model):
            module_of(config, 2)
    except ModelError as error:
        return str(error)
    return None


def _problem_with_training(config: RunConfig, make_module: ModuleFactory | None) -> str | None:
    try:
        fresh = config.model_copy(update={"pretrained": False})
        if config.dp == "sample":
            two_classes = Catalogue(("one", "other"), (("one",), ("other",)))
            return problem_with_model(config, bound_model_of(fresh, two_classes, device="cpu", make_module=make_module))
        if config.train != "all":
            trainable_module_of(fresh, 2, make_module)
        if encryption_of(config).scope == "head":
            linear_head(module_of(fresh, 2, make_module))
    except ModelError as error:
        return str(error)
    return None


def _problem_with_weights(config: RunConfig, make_module: ModuleFactory | None) -> str | None:
    """Explain why no run can start from --init or --pretrained, whatever its catalogue; logs what will start fresh."""
    if config.init is None and not config.pretrained:
        return None
    try:
        weights = read_initial_weights(config.init) if config.init else None
        labels = weights.labels if weights else None
        module = module_of(config, len(labels or ()) or 2, make_module)
        given = weights.tensors if weights else module.state_dict()
        reason = check_fit(module, weights) if weights else ""
        extra = extra_tensors(module, weights) if weights else []
        personal = personalization_of(config).personal_names(module) & given.keys()
    except ModelError as error:
        return str(error)
    source = f"--init {config.init}" if config.init else "--pretrained"
    if reason:
        logger.warning("%s: the head will start fresh: %s", source, reason)
    if extra:
        logger.warning("%s: the model lacks the parts of %d of its tensors, which are left out: %s",
            source, len(extra), some(extra))  # fmt: skip
    if personal:
        logger.warning("%s: %d of its tensors stay at the stores with --personalize %s, and start fresh there",
            source, len(personal), config.personalize)  # fmt: skip
    if config.pretrained and any(isinstance(layer, nn.GroupNorm) for layer in module.modules()):
        logger.warning("--pretrained: with --norm group, the normalization layers start fresh")
    return None


def _problems_with_codecs(config: RunConfig) -> list[str]:
    found = []
    for key, text in (("codec-up", config.codec_up), ("codec-down", config.codec_down)):
        try:
            parse(text)
        except UsageError as error:
            found += [f"--{key} {text}: {problem}" for problem in error.args]
        if config.byte_budget is not None and text != "none":
            found.append(f"--{key} with --byte-budget: a budget chooses the codecs by itself. Leave one of the two out")
    return found


def _problems_with_asynchrony(config: RunConfig) -> list[str]:
    if not isinstance(algorithm_of(config), Asynchronous):
        return []
    found = []
    if aggregator_of(config).leaves_out:
        found.append(
            f"--aggregator {config.aggregator} with --algorithm {config.algorithm}: a client that it leaves out may "
            "have begun its next task from a state that must be undone. Use median or trimmed-mean"
        )
    if config.refit_head:
        found.append(f"--refit-head with --algorithm {config.algorithm}: clients may still be at work. Leave it out")
    if config.quorum is not None:
        found.append(f"--quorum with --algorithm {config.algorithm}: a round ends when --buffer-size uploads are in")
    if config.sampling == "size":
        found.append(
            f"--sampling size with --algorithm {config.algorithm}: all clients work all the time, and uploads count "
            "alike. Use uniform or availability"
        )
    pacing = {
        "straggler-factor": config.straggler_factor is not None, "over-selection": config.over_selection > 0,
        "local-work": config.local_work != "fixed",
    }  # fmt: skip
    found += [
        f"--{key} with --algorithm {config.algorithm}: asynchronous rounds do not wait for slow clients. Leave it out"
        for key, is_set in pacing.items()
        if is_set
    ]
    return found


def _problems_with_sales(config: RunConfig) -> list[str]:
    """What sales cannot be combined with, and what needs them."""
    if not config.sales:
        needing = {"--train sales": config.train == "sales", "--personalize gate": config.personalize == "gate"}
        return [f"{flag} needs sales: add --sales" for flag, is_set in needing.items() if is_set]
    why = {
        f"--train {config.train}": (
            config.train not in ("head", "sales"),
            "photos enter as features, so that the image part stays as it is. Use --train head, or sales",
        ),
        f"--algorithm {config.algorithm}": (
            algorithm_of(config).sums, "it trains nothing in steps. Compute the head with --warm-start ridge",
        ),
        "--refit-head": (
            config.refit_head, "the output layer would be computed as if there were no sales. Leave it out",
        ),
        f"--dp {config.dp}": (
            config.dp == "sample",
            "its noise protects photos, and a day of sales is in many of them. Use --dp client",
        ),
        f"--personalize {config.personalize}": (
            config.personalize == "finetune",
            "both add the store's mix of products. Use --personalize gate, or leave it out",
        ),
    }  # fmt: skip
    found = [f"{flag} with --sales: {reason}" for flag, (is_set, reason) in why.items() if is_set]
    if config.train == "sales":
        if config.warm_start != "none":
            found.append("--warm-start ridge with --train sales: the output layer stays as it is. Use --train head")
        if config.init is None:
            found.append("--train sales needs an image model that is trained already: add --init FILE")
    return found


def _problems_with_ensemble(config: RunConfig) -> list[str]:
    """What learning from the stores' models at the server cannot be combined with."""
    if config.unlabelled_dir is None:
        return []
    needs = "the server asks each store's own model about its photos"
    hiding = [stage.declares.setting for stage in (mask_of(config), encryption_of(config)) if stage.is_on]
    why = dict.fromkeys(hiding, f"{needs}, and sees none of them")
    if not hiding and uploads_of(config).summand is not None:
        why[f"--codec-up {config.codec_up}"] = f"{needs}, and sees only their sum"
    algorithm, globally = algorithm_of(config), Candidate.GLOBAL in personalization_of(config).candidates
    others = {
        f"--dp {config.dp}": (config.dp == "client", f"{needs}, to which no noise is added"),
        f"--algorithm {config.algorithm}": (
            algorithm.sums or isinstance(algorithm, Asynchronous), f"{needs} after each round",
        ),
        f"--train {config.train}": (config.train in ("head", "sales"), "stores train on features, not on photos"),
        f"--local-work {config.local_work}": (config.local_work != "fixed", "uploads of unequal work are scaled"),
        f"--personalize {config.personalize}": (not globally, "a part of each model stays in its store"),
    }  # fmt: skip
    why |= {flag: reason for flag, (is_set, reason) in others.items() if is_set}
    return [f"{flag} with --unlabelled-dir: {reason}. Leave one of the two out" for flag, reason in why.items()]


def _problems_with_sums(config: RunConfig) -> list[str]:
    """What an algorithm of exact sums cannot be combined with."""
    if not algorithm_of(config).sums:
        return []
    wrong = {
        f"--train {config.train}": config.train != "head",
        f"--aggregator {config.aggregator}": config.aggregator != "mean",
        f"--norm-bound {config.norm_bound}": config.norm_bound not in ("auto", "off"),
        f"--personalize {config.personalize}": config.personalize not in ("none", "finetune"),
        f"--codec-up {config.codec_up}": config.codec_up != "none" and summed_codec_of(config) is None,
        "--byte-budget": config.byte_budget is not None,
        f"--local-work {config.local_work}": config.local_work != "fixed",
        "--attack": config.attack in ("sign-flip", "scale"),
        **{
            stage.declares.setting: True
            for stage in uploads_of(config).stages
            if not isinstance(stage, EncodeSummand | Mask | Encryption)  # which says so itself
        },
    }
    return [
        f"{flag} with --algorithm {config.algorithm}: stores send exact sums over their photos' features. Leave it out"
        for flag, is_set in wrong.items()
        if is_set
    ]
