"""The configuration: every key with its default, help text and unit, in one place.

Documentation, `fedsim config --explain KEY` and error messages are printed from here. Sections are frozen; nothing
below the builders sees a config object.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.config import JsonDict

from fedsim.errors import ConfigError


def key(default: Any, text: str, unit: str | None = None, **limits: Any) -> Any:
    """One configuration key: its default, what it means, its unit, and its limits (ge, gt, le, lt, min_length ...)."""
    extra: JsonDict | None = {"unit": unit} if unit else None
    if isinstance(default, (dict, list)):
        return Field(
            default_factory=lambda: type(default)(default), description=text, json_schema_extra=extra, **limits
        )
    return Field(default=default, description=text, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A frozen section; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Experiment(Section):
    """What is run, and where it leaves its results."""

    name: str = key("experiment", "name of the run directory and of the MLflow experiment", min_length=1)
    description: str = key("", "free text, kept with the MLflow run")
    seed: int = key(42, "every random stream is derived from it", ge=0)
    output_dir: str = key("runs", "folder that receives run directories and mlflow.db")
    checkpoint_every: int = key(5, "a checkpoint after every so many rounds (the last round always)", "rounds", ge=1)
    keep_last: int | None = key(
        5, "checkpoints that stay, the newest ones; older ones are deleted (null: all stay)", "checkpoints", ge=1
    )
    keep_best: int = key(1, "checkpoints that stay besides, the best ones by eval/top1", "checkpoints", ge=0)
    evaluate_every: int = key(1, "evaluate after every so many rounds (the last round always)", "rounds", ge=1)


class Data(Section):
    """Recordings: where they are and how they are split, once and globally, into training and held-out recordings."""

    name: Literal["synthetic", "esc10", "esc50", "csv"] = key(
        "synthetic", "data set: synthesised sounds, an ESC folder, or any CSV manifest"
    )
    path: str | None = key(
        None,
        "folder of an ESC data set or path of a manifest (path,label[,fold|split][,client][,group]); "
        "default: a folder of the data set's name under $FEDSIM_DATA",
    )
    download: bool = key(False, "fetch ESC-50 into the cache (600 MB, CC BY-NC) where data.path names no folder")
    classes: list[str] | None = key(None, "use these classes only (default: all)")
    test_fold: int = key(5, "official fold kept for evaluation, where the data set has folds", ge=0)
    test_share: float = key(0.2, "share of the recordings kept for evaluation where there are no folds", gt=0, lt=1)
    clips_per_class: int = key(40, "synthetic data: recordings per class", "recordings", ge=2, le=1_000_000)
    generators: str | None = key(
        None,
        "run directory (with feda2v.save_generators) whose clients' generators make the training rows: no audio is "
        "read and no audio encoder is loaded; evaluated on that run's held-out embeddings",
    )
    on_bad_audio: Literal["error", "skip"] = key("error", "a file that can't be decoded: stop, or count it and go on")
    cache_dir: str | None = key(
        None, "folder of the embedding cache (default: $XDG_CACHE_HOME/fedsim or ~/.cache/fedsim)"
    )


class Federation(Section):
    """Clients, rounds, and who holds which recording."""

    num_clients: int = key(10, "clients in the population", "clients", ge=1, le=2**32 - 1)
    cohort_size: int | None = key(None, "clients sampled in a round (default: all)", "clients", ge=1)
    global_rounds: int = key(10, "rounds", "rounds", ge=1)
    local_epochs: int = key(
        1,
        "passes over a client's recordings in a round; 0: clients don't train, they send class statistics alone, on "
        "which the server trains (feda2v.global_model_train)",
        "epochs",
        ge=0,
    )
    partition: Literal["iid", "dirichlet", "shards", "classes_per_client", "by_column", "drawn"] = key(
        "dirichlet",
        "how training recordings are dealt to clients (explicit `nodes` beat it); drawn: every client draws its own, "
        "for any number of clients, and only there are recordings shared between clients",
    )
    alpha: float = key(0.5, "dirichlet, drawn: concentration; small means few classes per client", gt=0)
    examples_per_client: int = key(
        40, "drawn: training recordings that each client draws, with replacement", "recordings", ge=1, le=100_000
    )
    shards_per_client: int = key(2, "shards: label-sorted shards per client", "shards", ge=1)
    classes_per_client: int = key(1, "classes_per_client: classes each client holds", "classes", ge=1)
    column: str | None = key(None, "by_column: manifest column that names the client (speaker, author)")
    quorum: float = key(1.0, "share of the cohort that must answer, or the round stops", gt=0, le=1)
    on_client_error: Literal["stop", "drop"] = key(
        "stop",
        "a client whose code raises or whose numbers aren't finite: stop the run, or drop the client from the round",
    )


class Node(Section):
    """One explicit client (`nodes.<id>`)."""

    dataset: str | None = key(None, "data set of this client (default: data.name)")
    selected_classes: list[str] | None = key(None, "classes this client holds (default: all)")
    excluded_classes: list[str] | None = key(None, "classes this client doesn't hold")
    num_samples_per_class: int | None = key(None, "at most so many recordings of each class", "recordings", ge=1)


class AudioEncoder(Section):
    """From waveform to audio embedding [segments, dim]."""

    name: Literal["ast", "tiny_ast", "yamnet", "logmel", "precomputed"] = key(
        "ast", "AST checkpoint, small random AST, YAMNet, log-mel statistics (no weights), or ready-made embeddings"
    )
    path: str | None = key(
        None,
        "ast: hub id or local folder (default MIT/ast-finetuned-audioset-10-10-0.4593); "
        "yamnet: weights file (default $FEDSIM_DATA/yamnet/yamnet.npz); precomputed: .npz or .npy file",
    )
    revision: str | None = key(None, "ast: revision of the hub checkpoint")
    trainable: str = key(
        "none", "AST layers that clients train: none, last:N, or all", pattern=r"^(none|all|last:[1-9]\d*)$"
    )
    segments: int = key(4, "S: time segments of an audio embedding", "segments", ge=1, le=4096)
    dim: int = key(512, "D: width of an audio embedding; a fixed orthogonal projection leads to it", ge=1, le=65_536)
    batch_size: int = key(8, "recordings encoded at once", "recordings", ge=1)


class TextEncoder(Section):
    """Targets: one prompt embedding per class and head."""

    name: Literal["seeded", "table", "transformers"] = key(
        "transformers", "CLIP and T5 through transformers, a table from a file, or seeded random unit vectors (offline)"
    )
    path: str | None = key(
        None, "table: .npz with names and vectors (default $FEDSIM_DATA/text_minilm/minilm_text.npz)"
    )
    clip: str = key("openai/clip-vit-large-patch14", "transformers: CLIP checkpoint, hub id or local folder")
    t5: str = key("google/t5-v1_1-xxl", "transformers: T5 checkpoint, hub id or local folder")
    revision: str | None = key(None, "transformers: revision of the hub checkpoints")
    template: str = key("{}", "prompt of a class; {} is the class name with spaces", pattern=r"\{\}")


class AdapterPreset(Section):
    """Shape of one head's adapter."""

    preset: Literal["mlp", "map", "slim"] = key("mlp", "token MLP + pooling, attention pooling (map), or slim map")
    hidden: list[Annotated[int, Field(ge=1, le=65_536)]] = key([1024], "widths of the token MLP's hidden layers")
    width: int = key(768, "slim: width of the attention pooling before the last linear map", ge=1, le=65_536)
    num_heads: int = key(8, "map, slim: attention heads", "heads", ge=1)
    norm: bool = key(True, "LayerNorm before the token MLP")


class Model(Section):
    """Encoders and adapters."""

    diffusion_type: Literal["flux", "sd"] = key(
        "flux", "image model: flux has heads clip [768] and t5 [17, 4096], sd has clip [77, 768]"
    )
    heads: dict[str, list[Annotated[int, Field(ge=1, le=1_000_000)]]] | None = key(
        None, "output shape by head, instead of those of diffusion_type (e.g. {clip: [768]})"
    )
    audio_encoder: AudioEncoder = Field(default_factory=AudioEncoder)
    text_encoder: TextEncoder = Field(default_factory=TextEncoder)
    adapters: dict[str, AdapterPreset] = key({}, "adapter by head (default: mlp for clip, slim for t5)")

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Output shape of every head, by name."""
        if self.heads is not None:
            return {head: tuple(shape) for head, shape in self.heads.items()}
        return {"clip": (768,), "t5": (17, 4096)} if self.diffusion_type == "flux" else {"clip": (77, 768)}


class Training(Section):
    """Local training on clients."""

    optimizer: Literal["AdamW", "SGD"] = key("AdamW", "optimiser of a client, fresh each round")
    learning_rate: float = key(1e-3, "client learning rate", gt=0)
    batch_size: int = key(32, "rows of a local step", "recordings", ge=1)
    weight_decay: float = key(1e-4, "AdamW: decoupled, SGD: added to the gradient", ge=0)
    momentum: float = key(0.0, "SGD: momentum", ge=0, lt=1)
    clip_norm: float = key(1.0, "gradients are clipped to this norm per client (0: never)", ge=0)
    cosine_weight: float = key(0.0, "weight of 1 - cosine to the class's own target", ge=0)
    contrastive_weight: float = key(0.0, "weight of the contrastive term (cosine to all class targets)", ge=0)
    contrastive_temperature: float = key(0.07, "temperature of the contrastive term", gt=0)
    proximal_weight: float = key(0.0, "FedProx: weight of |theta - global|^2 / 2 in a client's loss", ge=0)
    control_variates: bool = key(
        False,
        "SCAFFOLD: every client keeps a control variate between rounds, which corrects its (clipped) gradients; asks "
        "for optimizer SGD without momentum",
    )
    prototype_weight: float = key(
        0.0,
        "FedProto: weight of the error to the class's prototype (the clients' mean output in earlier rounds) in a "
        "client's loss; a client tells of classes with privacy.min_count recordings",
        ge=0,
    )
    augmentation: float = key(
        0.0,
        "synthetic rows per recording in every local step, drawn from the client's generator (feda2v.client_generator) "
        "for its own classes; each counts as one recording in the loss",
        ge=0,
        le=100,
    )
    precision: Literal["float32", "bfloat16"] = key(
        "float32", "of the matrix products in local training; bfloat16 by autocast, weights and sums stay float32"
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        names = {"adamw": "AdamW", "sgd": "SGD"}
        return names.get(value.lower(), value) if isinstance(value, str) else value


class FedA2V(Section):
    """Aggregation, generator and refinement: the server's part."""

    adapter_aggregation_mode: Literal["none", "avg", "weighted", "median", "trimmed_mean", "krum", "kd"] = key(
        "none",
        "clients keep their own adapters; mean; mean weighted by recordings; or one that withstands wrong updates: "
        "coordinate-wise median, trimmed mean, Krum; kd: the weighted mean, into which the server distils the clients "
        "on the generator's rows",
    )
    kd_epochs: int = key(10, "kd: passes over the rows that clients are distilled on", "epochs", ge=1)
    kd_learning_rate: float = key(1e-3, "kd: learning rate of the distillation (AdamW)", gt=0)
    kd_samples_per_class: int = key(
        100, "kd: rows that the generator makes for every class of a round", "rows", ge=1, le=1_000_000
    )
    trim_share: float = key(
        0.1, "trimmed_mean: share of the clients left out at each end of every coordinate", ge=0, lt=0.5
    )
    byzantine_clients: int = key(
        0, "krum: clients of a cohort that may send anything; it needs 2 x that + 3 answers", "clients", ge=0
    )
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = key(
        "none",
        "what the server does with the aggregated change: take it over, or step along it by FedAvgM (momentum), "
        "FedAdam or FedYogi (beta2 is 0.99); before the refinement",
    )
    server_learning_rate: float | None = key(
        None,
        "server_optimizer: learning rate (default: momentum 1; adam, yogi 0.01, about the largest step of a weight in "
        "a round)",
        gt=0,
    )
    server_momentum: float = key(0.9, "server_optimizer: momentum (beta1 of adam and yogi)", ge=0, lt=1)
    server_adaptivity: float = key(
        1e-3, "adam, yogi of server_optimizer: tau, added to the root of the second moment", gt=0
    )
    use_generator: bool = key(False, "build and train the generator, and refine with its samples")
    generator_type: Literal[
        "replay",
        "gaussian",
        "cof",
        "lowrank",
        "full",
        "residual_vae",
        "vae",
        "vae_plain",
        "multimodal",
        "flow",
        "gan",
        "cgan",
        "oracle",
    ] = key(
        "lowrank",
        "kind of generator; the server trains the learnt kinds: vae, vae_plain, multimodal, flow, gan, cgan; oracle "
        "draws clients' recordings themselves, which only a simulation can do: an upper bound",
    )
    generator_granularity: Literal["unified", "per_class", "per_group"] = key(
        "unified",
        "learnt kinds but multimodal: one network for all classes, one per class, or one per class group",
    )
    generator_class_groups: dict[str, list[str]] | None = key(
        None, "generator_granularity per_group: class names by group, each class in one; a list of lists will do too"
    )
    generator_rows: Literal["means", "moments", "lowrank"] = key(
        "lowrank",
        "learnt kinds: what they are trained on: the clients' class means; draws with the variances that clients "
        "send; draws with the pooled within-class covariance",
    )
    generator_rank: int = key(
        16, "axes of the pooled within-class covariance (lowrank, generator_rows: lowrank)", "axes", ge=1, le=65_536
    )
    global_model_train: bool = key(False, "server training step: fit the generator and refine the averaged adapter")
    global_model_train_from_nodes_adapters: bool = key(
        False, "use the clients' mean adapter outputs: as the generator's condition and, by text_anchor, as targets"
    )
    global_model_train_epochs: int = key(1, "epochs of the refinement, and of the generator by default", "epochs", ge=1)
    generator_epochs: int | None = key(
        None, "generator epochs per round (default: global_model_train_epochs)", "epochs", ge=1
    )
    generator_learning_rate: float | None = key(
        None,
        "learning rate of the generator (default: 0.1 x training.learning_rate, gan and cgan 1e-4, those that clients "
        "train training.learning_rate)",
        gt=0,
    )
    generator_batch_size: int = key(64, "rows of a generator step", "rows", ge=1, le=1_000_000)
    generator_rows_per_class: int = key(
        64, "training rows drawn per class and generator epoch", "rows", ge=1, le=1_000_000
    )
    generator_hidden_dim: int = key(
        512, "learnt kinds: width of the two hidden layers; residual_vae has one", ge=1, le=65_536
    )
    generator_latent_dim: int = key(256, "VAEs, gan, cgan: width of the latent vector", ge=1, le=65_536)
    discriminator: Literal["spectral", "r1"] = key(
        "spectral", "cgan: what holds the discriminator back: spectral norm, or a penalty on its slope at real rows"
    )
    mode_seeking: float = key(
        0.3, "cgan: weight of the term that keeps two draws for one class apart, itself 0 to 1", ge=0
    )
    generator_ema: float | None = key(
        None,
        "learnt kinds: share of the moving average of the weights that samples are made with, 0 is off "
        "(default: 0, cgan 0.99)",
        ge=0,
        lt=1,
    )
    novelty_weight: float = key(
        0.0,
        "VAEs, gan, cgan: weight of the penalty (0 to 1) on draws too near to a training row of their class",
        ge=0,
    )
    novelty: Literal["l2", "cosine"] = key("l2", "novelty_weight: how near is measured")
    client_generator: Literal["none", "shared", "own"] = key(
        "none",
        "a residual generator that clients train from round 2 on: shared: averaged every round (residual_vae is this); "
        "own: each client keeps its own and sends nothing of it",
    )
    save_generators: bool = key(
        False,
        "write generators/ at the end: clients' networks and class means (a client's own data), held-out embeddings",
    )
    pretrained_generators: str | None = key(
        None, "client_generator: run directory (with feda2v.save_generators) whose generators clients start from"
    )
    generator_buffer_size: int = key(
        4096, "class statistics of earlier rounds kept for the generator", "(client, class) rows", ge=0
    )
    generator_buffer_age: int | None = key(
        None, "rounds after which class statistics leave the buffer (default: when it is full)", "rounds", ge=1
    )
    statistics_rows: int = key(
        4096,
        "class statistics of a round that travel from a block and enter the server step; beyond, a sample by count",
        "(client, class) rows",
        ge=1,
        le=1_000_000,
    )
    generator_growth: float | None = key(
        None,
        "VAEs: share of the whole run over which the latent vector grows to its width, unit by unit (default: it is "
        "whole from the start)",
        gt=0,
        le=1,
    )
    beta_warmup: float = key(
        0.5, "VAEs: share of the whole run over which beta rises to 1", "share of all epochs", gt=0, le=1
    )
    loss_scaling: Literal["calibrated", "legacy"] = key(
        "calibrated", "VAEs: all parts on one scale, or the literal mean-MSE + beta KL + 0.1 similarity"
    )
    synthetic_samples_per_class: int = key(
        5, "synthetic rows per class in a refinement epoch", "rows", ge=1, le=1_000_000
    )
    synthetic_weight: float = key(0.5, "share of the refinement loss that synthetic rows carry", ge=0, le=1)
    text_anchor: float = key(
        0.5, "refinement target: share of the public text target, the rest is the clients' mean output", ge=0, le=1
    )
    refine_learning_rate: float | None = key(
        None, "learning rate of the refinement (default: 0.5 x training.learning_rate)", gt=0
    )
    refine_batch_size: int = key(32, "rows of a refinement step", "rows", ge=1)

    @field_validator("generator_class_groups", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {str(number): names for number, names in enumerate(value)} if isinstance(value, list) else value

    @property
    def clients_train(self) -> Literal["none", "shared", "own"]:
        """What generator clients train: `client_generator`, and shared where the server's generator is residual_vae."""
        used = self.use_generator and self.global_model_train
        return "shared" if used and self.generator_type == "residual_vae" else self.client_generator


class Privacy(Section):
    """What leaves a client."""

    min_count: int = key(
        3, "class statistics are sent for classes with at least so many recordings (1 warns)", "recordings", ge=1
    )
    share_variances: bool = key(True, "also send the diagonal variance of a class's audio embeddings")
    statistics: Literal["clients", "sums"] = key(
        "clients",
        "class statistics as a row per (client, class), or as sums over the cohort: messages of one length, whatever "
        "classes a client holds, and a row per class for the generator",
    )
    secure_sums: bool = key(
        False, "simulate secure sums: masked integers, of which the server can read the cohort's sum alone; slower"
    )
    noise_multiplier: float = key(
        0.0, "client-level differential privacy: noise on every sum, in units of its sensitivity (0: none)", ge=0
    )
    target_epsilon: float | None = key(
        None, "choose the noise multiplier so that the whole run ends within this epsilon", gt=0
    )
    delta: float | None = key(None, "delta that epsilon is told for (default: clients ** -1.1)", gt=0, lt=1)
    clip_update: float = key(1.0, "with noise: a client's change of the adapter is clipped to this norm", gt=0)
    clip_statistics: float = key(
        4.0, "with noise: a client's statistics are clipped to this norm, about that of so many recordings", gt=0
    )
    embedding_norm: float | None = key(
        None,
        "with noise: public length of an audio embedding, by which statistics are scaled (default: sqrt(S * D))",
        gt=0,
    )

    @property
    def adds_noise(self) -> bool:
        """Whether noise goes on the cohort's sums."""
        return self.noise_multiplier > 0 or self.target_epsilon is not None


def _fraction_or_whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a fraction of one GPU or a whole number of GPUs")
    return value


NODE_LABEL = "ray.io/node-id"
PLAIN_ACTORS = "client"
"""The kind of those that `resources.client_actors` counts."""


class ActorKind(Section):
    """Client actors of one shape."""

    actors: int = key(1, "client actors of this shape", "actors", ge=1)
    cpus: float = key(1.0, "CPUs of each", "CPUs", ge=0)
    gpus: float = key(0.0, "GPUs of each; a fraction shares one", "GPUs", ge=0)
    labels: dict[str, str] = key(
        {}, "Ray labels that their nodes must have (e.g. {ray.io/accelerator-type: H100}); default: any node"
    )

    _whole_gpus = field_validator("gpus")(_fraction_or_whole)


class Resources(Section):
    """Ray actors and what each may use."""

    client_actors: Annotated[int, Field(ge=0)] | Literal["auto"] = key(
        2,
        "client actors; 0 runs the same code in this process, without Ray; auto measures a block and chooses",
        "actors",
    )
    client_cpus: float = key(1.0, "CPUs of a client actor", "CPUs", ge=0)
    client_gpus: float = key(0.0, "GPUs of a client actor; a fraction shares one", "GPUs", ge=0)
    server_cpus: float = key(0.0, "CPUs of the server actor (it waits while clients train)", "CPUs", ge=0)
    server_gpus: float = key(0.0, "GPUs of the server actor", "GPUs", ge=0)
    more_actors: dict[str, ActorKind] = key(
        {}, "further client actors by name, for nodes that differ (e.g. {big: {actors: 2, cpus: 4}})"
    )
    block_size: Annotated[int, Field(ge=1)] | Literal["auto"] = key(
        "auto",
        "clients handed to an actor at once, a power of two; it fixes the order of summation; auto chooses by cohort, "
        "model and predicted memory",
        "clients",
    )
    max_attempts: int = key(3, "times a block is tried when its actor dies", "attempts", ge=1)
    block_timeout: Annotated[float, Field(gt=0)] | Literal["auto"] | None = key(
        "auto",
        "a block without an answer for so long is given to another actor too; auto: ten times what blocks of its size "
        "took, at least 30 s; null: never",
        "seconds",
    )
    placement: Literal["pack", "spread"] = key(
        "pack",
        "client actors on the nodes of a cluster; pack: near the server, each node half full before the next "
        "(Ray's default); spread: evenly over all nodes",
    )
    address: str | None = key(None, "Ray cluster to join (default: a private Ray on this machine)")
    num_cpus: int | None = key(
        None, "CPUs for training in this process, or for the private Ray (default: what there is)", "CPUs", ge=1
    )
    num_gpus: int | None = key(None, "GPUs the private Ray is told of (default: what it finds)", "GPUs", ge=0)

    @property
    def num_actors(self) -> int:
        """`client_actors` as a number.

        Raises:
            ConfigError: it is still auto.
        """
        return _settled("client_actors", self.client_actors)

    def actor_kinds(self) -> dict[str, ActorKind]:
        """All client actors by the name of their kind, those of `client_actors` first, as `client`."""
        if not self.num_actors:
            return {}
        plain = ActorKind(actors=self.num_actors, cpus=self.client_cpus, gpus=self.client_gpus)
        return {PLAIN_ACTORS: plain, **self.more_actors}

    @property
    def clients_per_block(self) -> int:
        """`block_size` as a number.

        Raises:
            ConfigError: it is still auto.
        """
        return _settled("block_size", self.block_size)

    @field_validator("client_actors", "block_size", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        # One phrase instead of one per type.
        try:
            return check(value)
        except ValidationError:
            least = 0 if info.field_name == "client_actors" else 1
            raise ValueError(f"expected a whole number, at least {least}, or auto") from None

    @field_validator("block_timeout", mode="wrap")
    @classmethod
    def _seconds_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError("expected a number of seconds above 0, auto, or null") from None

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value & (value - 1):
            raise ValueError("must be a power of two (1, 2, 4, 8, ...), or auto")
        return value

    _whole_gpus = field_validator("client_gpus", "server_gpus")(_fraction_or_whole)


def _settled(name: str, value: int | str) -> int:
    if isinstance(value, str):
        raise ConfigError(f"resources.{name} is {value}: a run settles it before it starts; here it must be a number")
    return value


class Tracking(Section):
    """MLflow."""

    enabled: bool = key(True, "log to MLflow; metrics.jsonl is written either way")
    uri: str | None = key(None, "tracking store (default: $MLFLOW_TRACKING_URI, else SQLite mlflow.db in output_dir)")
    experiment: str | None = key(None, "MLflow experiment (default: experiment.name)")
    plots: bool = key(
        True, "draw pictures after the last round (about two seconds: a study of many short runs can do without)"
    )


class SearchRange(Section):
    """One searched key: a range or a list of choices."""

    low: float | None = key(None, "lower end of the range")
    high: float | None = key(None, "upper end of the range")
    log: bool = key(False, "sample the logarithm")
    integer: bool = key(False, "whole numbers only")
    choices: list[Any] | None = key(None, "values to choose from, instead of a range")


class Search(Section):
    """Hyper-parameter search by Ray Tune: ASHA stops trials early, Optuna proposes them."""

    space: dict[str, SearchRange] = key(
        {}, "searched keys, e.g. {training.learning_rate: {low: 1e-4, high: 1e-2, log: true}}"
    )
    metric: str = key("eval/top1", "metric to optimise")
    mode: Literal["max", "min"] = key("max", "direction")
    num_trials: int = key(8, "trials", "trials", ge=1)
    max_concurrent: int = key(1, "trials at a time", "trials", ge=1)
    grace_period: int = key(2, "ASHA: rounds before a trial may be stopped", "rounds", ge=1)
    reduction_factor: int = key(2, "ASHA: one trial in so many goes on at each rung", ge=2)


class Config(Section):
    """A whole experiment."""

    experiment: Experiment = Field(default_factory=Experiment)
    data: Data = Field(default_factory=Data)
    federation: Federation = Field(default_factory=Federation)
    nodes: dict[str, Node] = key({}, "explicit clients by id, instead of a partition")
    model: Model = Field(default_factory=Model)
    training: Training = Field(default_factory=Training)
    feda2v: FedA2V = Field(default_factory=FedA2V)
    privacy: Privacy = Field(default_factory=Privacy)
    resources: Resources = Field(default_factory=Resources)
    tracking: Tracking = Field(default_factory=Tracking)
    search: Search = Field(default_factory=Search)
