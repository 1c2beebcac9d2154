"""The original FedA2V experiment file (JSON), accepted unchanged.

Keys with a counterpart are mapped, keys that fedsim has no use for are dropped and listed in one note. Nothing else is
tolerated: a key that is neither the original's nor fedsim's stays where it is, and validation reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedsim.config.checks import DATASETS
from fedsim.errors import ConfigError

Values = dict[str, Any]

DEFAULT_SEED = 42


MOVED = {
    "federation.diffusion_type": "model.diffusion_type",
    "federation.eval_gap": "experiment.evaluate_every",
    "feda2v.diffusion_type": "model.diffusion_type",
    "feda2v.adapter_aggregation_method": "feda2v.adapter_aggregation_mode",
    "feda2v.generator_training_epochs": "feda2v.generator_epochs",
    "feda2v.kd_training_epochs": "feda2v.kd_epochs",
    "feda2v.generator_training_sequence_length": "model.audio_encoder.segments",
    "feda2v.adapters_learning_rate": "training.learning_rate",
    "feda2v.adapters_weight_decay": "training.weight_decay",
    "feda2v.audio_model_name": "model.audio_encoder.path",
}
"""Keys of the original with a counterpart. Where the counterpart is given too, it holds and the old key is dropped."""

MODES = ("generator_training_mode", "generator_only_mode", "use_pretrained_generators")
"""Switches of section `feda2v` that mean something when they are on (see `_move_modes`); off they are dropped."""


def _names(section: str, words: str) -> Iterator[str]:
    """Dotted names of a section's keys."""
    return (f"{section}.{word}" for word in words.split())


LEGACY = frozenset(
    [
        "wandb",
        "rewind",
        "fedgfe",
        *_names(
            "experiment",
            "goal device device_id runs optimize_memory_usage use_balooning debug optimize_memory",
        ),
        *_names(
            "federation",
            "algorithm join_ratio model_aggregation use_saved_audio_embeddings generate_images_frequency "
            "model_aggregation_random model_aggregation_weighted",
        ),
        *_names("training", "learning_rate_schedule"),
        *_names(
            "model",
            "backbone backbone_model pretrained model_backbone_save_checkpoint model_backbone_load_checkpoint",
        ),
        *_names(
            "feda2v",
            # what refinement trains on, and losses
            "global_model_train_from_nodes_audio_embeddings global_model_train_from_generator train_adapters "
            "text_losses_summed optimizer_clip_gradients use_cls_token_only use_act_loss use_text_loss use_image_loss "
            "compute_global_mean_from_class_means "
            # rates per adapter
            "clip_adapter_learning_rate t5_adapter_learning_rate clip_adapter_weight_decay t5_adapter_weight_decay "
            "adapters_learning_rate_schedule clip_adapter_learning_rate_schedule t5_adapter_learning_rate_schedule "
            # images and stored embeddings
            "generate_nodes_images_frequency generate_global_images_frequency generate_low_memomy_footprint "
            "generate_global_images_average_text_embeddings images_output_dir output_image_base_name "
            "save_generated_images_splits generation_split_for_metrics nodes_train_metrics_splits "
            "server_train_metrics_splits nodes_test_metrics_splits server_test_metrics_splits "
            "generate_from_clip_text_embeddings generate_from_t5_text_embeddings generate_embeddings_only "
            "embeddings_checkpoint_dir store_audio_embeddings audio_embedding_file_name "
            # generator
            "generator_training_mode generator_only_mode use_pretrained_generators shared_generator_in_only_mode "
            "reset_generator_on_class_change generator_output_sequence_length use_learned_upsampling "
            "generator_augmentation generator_augmentation_noise generator_validation_frequency "
            "generator_save_checkpoint generator_load_checkpoint generator_checkpoint_frequency "
            "generator_checkpoint_dir generator_checkpoint_base_name generator_checkpoint_path "
            # adapters' own checkpoints
            "adapter_save_checkpoint adapter_load_checkpoint adapter_checkpoint_frequency adapter_checkpoint_dir "
            "adapter_checkpoint_base_name adapter_checkpoint_per_type "
            # model ids
            "image_model_name img_pipe_name img_lcm_lora_id audio_pipe_name "
            # injected by the original's loader, and unused there
            "global_model_train_inputs steps mode ablation_type controllability_type target_img_path img_out_path "
            "audio_out_path class_to_activate single_class checkpoint_name project entity wandb_mode "
            "test_metrics_splits train_metrics_splits",
        ),
        *(
            name
            for place in ("nodes.<id>", "dataset")
            for name in _names(
                place,
                "enable_cache cache_dir enable_ast_cache ast_cache_dir stratify splits_to_load audio_sample_rate "
                "audio_duration image_size use_folds train_folds val_folds test_folds train_ratio val_ratio "
                "test_ratio node_split_id num_nodes samples_per_node node_split_seed",
            )
        ),
        *_names(
            "nodes.<id>",
            "adapter_dropout use_cls_token_only clip_adapter_learning_rate t5_adapter_learning_rate "
            "clip_adapter_weight_decay t5_adapter_weight_decay generator_granularity generator_train_classes "
            "generator_class_group dataset_split pretext_tasks task_type class_labels class_remapping limit_samples "
            "balance_classes",
        ),
    ]
)
"""Keys of the original that fedsim has no use for; `nodes.<id>` stands for any node, a bare name for a section."""


def translate(values: Values) -> tuple[Values, list[str]]:
    """A configuration with the original's keys turned into fedsim's.

    Args:
        values: sections as read from a file; changed in place. A configuration without keys of the original comes back
            as it is, except that data sets may be spelt as the original does ("ESC50", "ESC-50").

    Returns:
        The sections, and notes for the user: one with all keys that aren't used, one for a replaced seed.

    Raises:
        ConfigError: nodes ask for different image models.
    """
    notes: list[str] = []
    nodes = _mappings_in(values.get("nodes"))
    _move_modes(values)
    dropped = [*_drop_legacy(values, nodes), *_move_dataset(values, nodes), *_move_keys(values)]
    _join_node_types(values, nodes)
    for place, name in [(values.get("data"), "name"), *((node, "dataset") for node in nodes.values())]:
        if isinstance(place, dict):
            place.update({name: _spelt(place[name])} if name in place else {})
    experiment, feda2v = values.get("experiment"), values.get("feda2v")
    if isinstance(experiment, dict) and experiment.get("seed") == -1:
        experiment["seed"] = DEFAULT_SEED
        notes.append(
            f"experiment.seed is -1 (unseeded in the original): {DEFAULT_SEED} is used, so the run can be repeated"
        )
    if isinstance(feda2v, dict):
        plain = feda2v.pop("use_conditioned_vae", True) is False
        if plain and feda2v.get("generator_type") == "vae":
            feda2v["generator_type"] = "vae_plain"
    if isinstance(feda2v, dict) and feda2v.get("synthetic_samples_per_class") == "auto":
        del feda2v["synthetic_samples_per_class"]
    if dropped:
        listed = ", ".join(sorted(dropped))
        notes.insert(0, f"keys of the original FedA2V that have no use here, {len(dropped)} in all: {listed}")
    return values, notes


def _drop_legacy(values: Values, nodes: dict[str, Values]) -> Iterator[str]:
    """Take out the keys of `LEGACY`, naming each."""
    for section in LEGACY & values.keys():
        del values[section]
        yield section
    for section, keys in _mappings_in(values).items():
        for name in [name for name in keys if f"{section}.{name}" in LEGACY]:
            del keys[name]
            yield f"{section}.{name}"
    for node_id, node in nodes.items():
        for name in [name for name in node if f"nodes.<id>.{name}" in LEGACY]:
            del node[name]
            yield f"nodes.{node_id}.{name}"


def _move_modes(values: Values) -> None:
    """Turn the switches of the original's two runs, where they are on, into keys of fedsim.

    Run 1 trains a generator for each client (`generator_training_mode`) and maybe nothing else
    (`generator_only_mode`); run 2 trains adapters from them (`use_pretrained_generators`), or goes on with them.
    """
    feda2v = values.get("feda2v")
    if not isinstance(feda2v, dict):
        return
    on = {name: feda2v.get(name) is True for name in MODES}
    for name in (name for name in MODES if on[name]):
        del feda2v[name]
    if on["generator_training_mode"] or on["generator_only_mode"]:
        feda2v.setdefault("client_generator", "own")
        feda2v.setdefault("save_generators", True)
    if on["generator_only_mode"]:
        feda2v["global_model_train"] = False
        _set(values, "federation", "local_epochs", 0)
    if on["use_pretrained_generators"]:
        feda2v.pop("generator_load_checkpoint", None)
        folder = feda2v.pop("generator_checkpoint_dir", "checkpoints/generators")
        if on["generator_training_mode"] or on["generator_only_mode"]:
            feda2v.setdefault("pretrained_generators", folder)
        else:
            _set(values, "data", "generators", folder)


def _set(values: Values, section: str, name: str, value: Any) -> None:
    """Set a key where its section is a mapping; anything else is left to validation."""
    if values.get(section) is None:
        values[section] = {}
    if isinstance(values[section], dict):
        values[section][name] = value


def _move_dataset(values: Values, nodes: dict[str, Values]) -> Iterator[str]:
    """Turn section `dataset` into `data`; the data set that the nodes name wins, as it does in the original."""
    section = values.get("dataset")
    named = [_spelt(node["dataset"]) for node in nodes.values() if "dataset" in node]
    chosen = next((name for name in named if name in DATASETS), None)
    if section is None:
        values.pop("dataset", None)
    elif isinstance(section, dict):
        del values["dataset"]
        data = values.setdefault("data", {})
        if named and _spelt(section.get("name")) != chosen:
            yield from (f"dataset.{name}" for name in ("name", "path") if section.pop(name, None) is not None)
        for name, value in section.items():  # unknown names too: validation reports them as keys of `data`
            if isinstance(data, dict) and data.setdefault(name, value) is not value:
                yield f"dataset.{name}"
    if chosen and isinstance(values.setdefault("data", {}), dict):
        values["data"].setdefault("name", chosen)


def _move_keys(values: Values) -> Iterator[str]:
    """Rename the keys of `MOVED`; yield those whose counterpart was given too."""
    for old, new in MOVED.items():
        section, _, name = old.partition(".")
        place = values.get(section)
        if not isinstance(place, dict) or name not in place:
            continue
        value = place.pop(name)
        *path, last = new.split(".")
        target: Any = values
        for part in path:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if isinstance(target, dict) and target.setdefault(last, value) is not value:
            yield old


def _join_node_types(values: Values, nodes: dict[str, Values]) -> None:
    """Turn the nodes' `diffusion_type` into the model's: clients share one set of heads."""
    for node_id, node in nodes.items():
        if "diffusion_type" not in node:
            continue
        wanted = node.pop("diffusion_type")
        model = values.setdefault("model", {})
        if isinstance(model, dict) and model.setdefault("diffusion_type", wanted) != wanted:
            raise ConfigError(
                f"nodes.{node_id}.diffusion_type is {wanted!r} but {model['diffusion_type']!r} is set elsewhere; "
                f"all clients share one, model.diffusion_type"
            )


def _mappings_in(value: Any) -> dict[str, Values]:
    """The entries of a mapping that are mappings themselves."""
    return {name: below for name, below in value.items() if isinstance(below, dict)} if isinstance(value, dict) else {}


def _spelt(name: Any) -> Any:
    """A data set's name as fedsim spells it; an unknown one as it came."""
    plain = name.lower().replace("-", "").replace("_", "") if isinstance(name, str) else None
    return plain if plain in DATASETS else name
