"""Every setting of a run, the packaged recipes, and how both are read."""

from robustfpd.config.reading import RECIPES, load_run, parse, recipe, recipe_names
from robustfpd.config.run import (
    CUSTOM_BACKBONE,
    NORMS,
    AdversarialConfig,
    AugmentConfig,
    Config,
    DataConfig,
    Denoise,
    EvaluationConfig,
    Head,
    Middle,
    ModelConfig,
    Norm,
    OptimizerConfig,
    ProcedureConfig,
    Protocol,
    RunConfig,
    ScheduleConfig,
    StageName,
    TaskConfig,
    TrainingConfig,
)  # fmt: skip

__all__ = [
    "CUSTOM_BACKBONE", "NORMS", "RECIPES", "AdversarialConfig", "AugmentConfig", "Config", "DataConfig", "Denoise",
    "EvaluationConfig", "Head", "Middle", "ModelConfig", "Norm", "OptimizerConfig", "ProcedureConfig", "Protocol",
    "RunConfig", "ScheduleConfig", "StageName", "TaskConfig", "TrainingConfig", "load_run", "parse", "recipe",
    "recipe_names",
]  # fmt: skip
