"""Typed configuration of a run: the schema behind the YAML files in ``configs/``.

The defaults here are ours. ``configs/alg/pwm.yaml`` has PWM's published single-task values;
``docs/published.md`` says where the two differ. Every class checks its own values, so a wrong
number is named before any work starts: :mod:`pwm_fast.config.checks`.
"""

from pwm_fast.config.agent import (
    WORLD_MODELS,
    ActorConfig,
    AlgConfig,
    CriticConfig,
    ModelLearningConfig,
    WorldModelConfig,
    world_model_kinds,
)
from pwm_fast.config.checks import (
    MAX_THREADS,
    MISSING,
    Checked,
    ConfigError,
    allotted_threads,
    at_most,
)
from pwm_fast.config.loading import (
    check_choices,
    compose,
    from_dict,
    from_hydra,
    from_saved,
    hydra_schema,
    lacks_variant,
    open_overrides,
    read_yaml,
    structured,
    to_dict,
    typed,
    with_variant,
)
from pwm_fast.config.planning import PlanningConfig
from pwm_fast.config.training import (
    OFFLINE,
    OLDEST_VARIANT,
    CheckpointConfig,
    DataConfig,
    EnvConfig,
    EsnrConfig,
    EvalConfig,
    TensorboardConfig,
    TrainConfig,
    WandbConfig,
    check_trainable,
)

__all__ = [
    "MAX_THREADS",
    "MISSING",
    "OFFLINE",
    "OLDEST_VARIANT",
    "WORLD_MODELS",
    "ActorConfig",
    "AlgConfig",
    "Checked",
    "CheckpointConfig",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "EnvConfig",
    "EsnrConfig",
    "EvalConfig",
    "ModelLearningConfig",
    "PlanningConfig",
    "TensorboardConfig",
    "TrainConfig",
    "WandbConfig",
    "WorldModelConfig",
    "allotted_threads",
    "at_most",
    "check_choices",
    "check_trainable",
    "compose",
    "from_dict",
    "from_hydra",
    "from_saved",
    "hydra_schema",
    "lacks_variant",
    "open_overrides",
    "read_yaml",
    "structured",
    "to_dict",
    "typed",
    "with_variant",
    "world_model_kinds",
]
