"""The configuration: one YAML file and `key=value` overrides in, frozen dataclasses out.

    config = load_config("config.yaml", ["train.lora_lr=2e-4"])

A wrong key, a wrong type or a contradiction is an InputError that names the key, raised before anything is loaded. This
package imports nothing else of the project, and no torch.
"""

from config.errors import (
    InputError,
    choose,
    explain_imports,
    how_to_convert,
    is_hub_name,
    is_text,
    nearest,
    nearest_path,
    printable,
    run_script,
    shortened,
)

with explain_imports():  # every script imports this package first
    from config.load import (
        DEFAULT_CONFIG,
        changed_keys,
        is_extendable,
        is_moved,
        load_config,
        moved_parts,
        refuse_options,
        start_differences,
        to_yaml,
    )
    from config.rules import CAPTION_FORMATS, RATE_KEYS, frozen_error, trained_parts
    from config.schema import (
        IGNORE_INDEX,
        STAGES_FOLDER,
        AugmentConfig,
        ColumnsConfig,
        Config,
        DataConfig,
        LoraConfig,
        ModelConfig,
        ScratchConfig,
        SourceConfig,
        StageConfig,
        TestConfig,
        TrainableConfig,
        TrainConfig,
    )
    from config.typed_yaml import Switch, Trainable

__all__ = [
    "CAPTION_FORMATS",
    "DEFAULT_CONFIG",
    "IGNORE_INDEX",
    "RATE_KEYS",
    "STAGES_FOLDER",
    "AugmentConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "InputError",
    "LoraConfig",
    "ModelConfig",
    "ScratchConfig",
    "SourceConfig",
    "StageConfig",
    "Switch",
    "TestConfig",
    "TrainConfig",
    "Trainable",
    "TrainableConfig",
    "changed_keys",
    "choose",
    "frozen_error",
    "how_to_convert",
    "is_extendable",
    "is_hub_name",
    "is_moved",
    "is_text",
    "load_config",
    "moved_parts",
    "nearest",
    "nearest_path",
    "printable",
    "refuse_options",
    "run_script",
    "start_differences",
    "shortened",
    "to_yaml",
    "trained_parts",
]
