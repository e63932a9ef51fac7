"""refold: fold a pretrained language model into one that is cheaper to store and to run.

    import refold

    plan = refold.plan("path/to/model", "relaxed")
    refold.convert("path/to/model", "folded", "relaxed")
    refold.heal("folded", "healed", ["books.parquet=0.5", "docs.parquet=0.5"], refold.HealStage(tokens="20M"))
    refold.evaluate("healed", ["held-out.txt"], against="path/to/model")
    refold.export("healed", "dense", to="dense")

After `import refold`, transformers' Auto classes load folded models.
"""

from importlib import import_module
from typing import Any

from refold.modeling.registration import register_when_imported
from refold.version import __version__

_API = {
    "analyse": "refold.analysis.analyse",
    "plan": "refold.planning.plan",
    "convert": "refold.conversion.convert",
    "inspect": "refold.conversion.inspect",
    "heal": "refold.healing.heal",
    "quantise": "refold.conversion.quantise",
    "evaluate": "refold.evaluation.evaluate",
    "score": "refold.scorecard.score",
    "compare": "refold.scorecard.compare",
    "read_scorecard": "refold.scorecard.record",
    "calibrate": "refold.engine.calibration",
    "generate": "refold.generation.generate",
    "export": "refold.exporting.export",
    "run": "refold.studies.run",
    "fit": "refold.fitting.fit",
    "sweep": "refold.fitting.fit",
    "parse_budget": "refold.fitting.budget",
    "bench": "refold.studies.bench",
    "Recipe": "refold.recipe.recipe",
    "HealStage": "refold.recipe.heal",
    "AnalysisSettings": "refold.analysis.analyse",
    "CalibrateOptions": "refold.engine.calibration",
    "ConvertOptions": "refold.conversion.convert",
    "EvaluationSettings": "refold.evaluation.settings",
    "ScoreSettings": "refold.scorecard.settings",
    "Sampling": "refold.generation.sampling",
    "Constraint": "refold.generation.constraint",
    "Reference": "refold.evaluation.reference",
    "QuantiseOptions": "refold.conversion.quantise",
    "FitOptions": "refold.fitting.options",
    "RunSettings": "refold.studies.job",
    "RunOptions": "refold.studies.job",
    "BenchSettings": "refold.studies.bench",
    "Engine": "refold.engine.engine",
    "EngineSettings": "refold.engine.settings",
    "Drafts": "refold.engine.settings",
    "StreamingEngine": "refold.engine.streaming",
    "HealOptions": "refold.healing.run",
    "register_objective": "refold.healing.objectives.registry",
    "linear_names": "refold.modeling.adapters",
    "load_adapters": "refold.modeling.adapters",
    "load_model": "refold.modeling.load",
    "load_tokenizer": "refold.modeling.load",
    "Mixture": "refold.data.mixture",
    "from_documents": "refold.data.readers",
    "RefoldError": "refold.errors",
}

register_when_imported()

__all__ = [*_API, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for: torch takes seconds."""
    if name not in _API:
        raise AttributeError(f"module 'refold' has no attribute '{name}'")
    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
