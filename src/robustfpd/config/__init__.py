"""Every setting of a run, the packaged recipes, and how both are read."""

from robustfpd.config.base import (
    CUSTOM_BACKBONE,
    DATASETS,
    DEVICES,
    NORMS,
    PRECISIONS,
    STAGES,
    SUITES,
    Config,
    Denoise,
    Head,
    Middle,
    Norm,
    Precision,
    Protocol,
    StageName,
)
from robustfpd.config.procedure import (
    AdversarialConfig,
    OptimizerConfig,
    ProcedureConfig,
    ScheduleConfig,
    TrainingConfig,
)
from robustfpd.config.reading import RECIPES, load_run, parse, recipe, recipe_names
from robustfpd.config.run import AugmentConfig, DataConfig, EvaluationConfig, ModelConfig, RunConfig, TaskConfig

__all__ = [
    "CUSTOM_BACKBONE", "DATASETS", "DEVICES", "NORMS", "PRECISIONS", "RECIPES", "STAGES", "SUITES",
    "AdversarialConfig", "AugmentConfig", "Config", "DataConfig", "Denoise", "EvaluationConfig", "Head", "Middle",
    "ModelConfig", "Norm", "OptimizerConfig", "Precision", "ProcedureConfig", "Protocol", "RunConfig",
    "ScheduleConfig", "StageName", "TaskConfig", "TrainingConfig", "load_run", "parse", "recipe", "recipe_names",
]  # fmt: skip
