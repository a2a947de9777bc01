"""Opens a server's setup: the objects that all clients of a process share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fedshelf.algorithms.base import Algorithm, Asynchronous
from fedshelf.app.components import (
    algorithm_of,
    closed_form_of,
    encryption_of,
    mask_of,
    personalization_of,
    uploads_of,
)
from fedshelf.app.differential_privacy import noisy_mean_of
from fedshelf.app.model import ModuleFactory, bound_model_of
from fedshelf.app.teacher import TeacherModel
from fedshelf.compression.download import name_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import DeviceName
from fedshelf.core.errors import ModelError, RefusedError
from fedshelf.core.messages import Setup
from fedshelf.data.catalogue import Catalogue
from fedshelf.personalization.base import Personalization
from fedshelf.privacy.distributed_dp import NoiseShares
from fedshelf.privacy.homomorphic.upload_form import EncryptedForm
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.rounds.sums.encrypting_client import EncryptionTerms
from fedshelf.rounds.sums.masking_client import MaskingTerms
from fedshelf.training.batch_size import BatchSizes
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.compiled import compile_forward
from fedshelf.training.distillation import Teacher

MAX_RUN_ID_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedSetup:
    """The objects of a setup, shared by all clients of a process.

    Attributes:
        setup: the setup.
        config: the run's configuration.
        catalogue: the classes.
        algorithm: the federated algorithm.
        bound_model: the model.
        uploads: the stages that an upload passes through.
        personalization: what stays at the stores.
        closed_form: computes the output layer in closed form, if the run does that before or after its rounds.
        batch_sizes: measures the fastest batch size if each client has its own, else None.
        sent_teacher: what the server has sent to learn from; None: nothing.
        teacher: the same, ready to be asked.
    """

    setup: Setup
    config: RunConfig
    catalogue: Catalogue
    algorithm: Algorithm
    bound_model: BoundModel
    uploads: UploadPipeline
    personalization: Personalization
    closed_form: Algorithm | None = None
    batch_sizes: BatchSizes | None = None
    sent_teacher: TeacherModel | None = None
    teacher: Teacher | None = None

    @cached_property
    def encryption(self) -> EncryptionTerms | None:
        """What a client knows of the encryption of its run; None if there is none."""
        encode, encryption = self.uploads.summand, encryption_of(self.config)
        if encode is None or not self.uploads.is_encrypted:
            return None
        form = EncryptedForm.of(encryption, encode, self.bound_model.params.layout, self.bound_model.output_layer)
        return EncryptionTerms(
            run_id=self.setup.run_id, config=files.digest(self.setup.config), encryption=encryption, form=form,
            is_buffered=isinstance(self.algorithm, Asynchronous),
        )  # fmt: skip


def open_setup(
    setup: Setup, *, device: DeviceName, make_module: ModuleFactory | None = None,
    accept: Callable[[RunConfig], None] = lambda config: None,
) -> OpenedSetup:  # fmt: skip
    """Build the objects that a setup describes.

    Args:
        setup: the setup.
        device: the device to compute on.
        make_module: creates the caller's own model, if there is one.
        accept: called with the configuration before anything is built; may refuse it.

    Returns:
        The objects.

    Raises:
        RefusedError: the server's configuration cannot be read, or is refused.
    """
    if len(setup.run_id) > MAX_RUN_ID_CHARACTERS:
        raise RefusedError(f"the run's id has {len(setup.run_id):,} characters; {MAX_RUN_ID_CHARACTERS} is the most")
    config = files.from_a_server(setup.config)
    accept(config)
    catalogue = Catalogue.from_json(setup.catalogue)
    bound_model = bound_model_of(config, catalogue, device=device, make_module=make_module)
    _load_frozen(bound_model, setup)
    sent = TeacherModel.of_setup(setup, config)
    if config.compile == "on":
        bound_model = compile_forward(bound_model, config.image_size)
    layout, closed_form = bound_model.params.layout, closed_form_of(config)
    algorithm = algorithm_of(config).for_model(layout, bound_model.output_layer)
    return OpenedSetup(
        setup=setup, config=config, catalogue=catalogue, bound_model=bound_model,
        algorithm=algorithm,
        closed_form=None if closed_form is None else closed_form.for_model(layout, bound_model.output_layer),
        uploads=uploads_of(config).of(algorithm, layout), personalization=personalization_of(config),
        batch_sizes=BatchSizes(bound_model) if config.dynamic_batch else None, sent_teacher=sent,
        teacher=None if sent is None else _opened_teacher(sent, catalogue, bound_model),
    )  # fmt: skip


def masking_terms(opened: OpenedSetup) -> MaskingTerms | None:
    """What a client knows of the masks of its run; None if there are none."""
    encode = opened.uploads.summand
    if encode is None or not opened.uploads.is_masked or opened.uploads.is_encrypted:
        return None
    layout, closed_form = opened.bound_model.params.layout, opened.closed_form
    noisy = noisy_mean_of(opened.config)
    return MaskingTerms(
        noise=NoiseShares(noisy) if noisy is not None and noisy.noise_at == "stores" else None,
        run_id=opened.setup.run_id, config=files.digest(opened.setup.config), encode=encode,
        threshold=mask_of(opened.config).threshold, layout=layout, tree=opened.catalogue.tree,
        sends_sums=opened.algorithm.counts_photos,
        closed_form=None if closed_form is None else opened.uploads.of(closed_form, layout).summand,
    )  # fmt: skip


def _opened_teacher(sent: TeacherModel, catalogue: Catalogue, bound: BoundModel) -> Teacher:
    try:
        return sent.open(catalogue.names, bound.compute.device)
    except ModelError as error:
        raise RefusedError(str(error)) from None


def _load_frozen(bound: BoundModel, setup: Setup) -> None:
    """Load the values that never change.

    Raises:
        RefusedError: they are not those that the setup names, or do not fit the model.
    """
    given, wanted = setup.frozen_values, len(bound.params.frozen)
    if given is None:
        if wanted:
            raise RefusedError(f"the setup comes without the {wanted:,} frozen values of this model")
        return
    if len(given) != wanted or name_of(given) != setup.frozen:
        raise RefusedError(f"the setup's {len(given):,} frozen values are not the {wanted:,} that it names")
    bound.params.frozen.copy_(given)
