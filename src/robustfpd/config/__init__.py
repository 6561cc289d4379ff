"""Every setting of a run, the packaged recipes, and how both are read."""

from robustfpd.config.base import NORMS, Config, Norm, check_eps
from robustfpd.config.load import EARLIER_DEFAULTS, RECIPES, load_run, parse, protocol_defaults, recipe, recipe_names
from robustfpd.config.schema import (
    CUSTOM_BACKBONE,
    DATASETS,
    DEVICES,
    PRECISIONS,
    STAGES,
    SUITES,
    AugmentConfig,
    DataConfig,
    Denoise,
    EvaluationConfig,
    Head,
    Middle,
    ModelConfig,
    Precision,
    Protocol,
    RunConfig,
    StageName,
    TaskConfig,
)
from robustfpd.config.training import (
    AdversarialConfig,
    Objective,
    OptimizerConfig,
    ProcedureConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "CUSTOM_BACKBONE", "DATASETS", "DEVICES", "EARLIER_DEFAULTS", "NORMS", "PRECISIONS", "RECIPES", "STAGES", "SUITES",
    "AdversarialConfig", "AugmentConfig", "Config", "DataConfig", "Denoise", "EvaluationConfig", "Head", "Middle",
    "ModelConfig", "Norm", "Objective", "OptimizerConfig", "Precision", "ProcedureConfig", "Protocol", "RunConfig",
    "ScheduleConfig", "StageName", "TaskConfig", "TrainingConfig", "check_eps", "load_run", "parse",
    "protocol_defaults", "recipe", "recipe_names",
]  # fmt: skip
