"""The recipes by name, and where the package's conf/ and assets/ are. Imports nothing."""

from __future__ import annotations

from pathlib import Path

# name: the module of its schema in config/, and the schema; its work is in workflows/NAME/{check,run}.py
RECIPES = {
    "pretrain": "recipes:PretrainRecipe",
    "prune": "recipes:PruneRecipe",
    "search": "recipes:SearchRecipe",
    "correct_teacher": "recipes:CorrectTeacherRecipe",
    "cache_teacher": "recipes:CacheTeacherRecipe",
    "synthesize": "recipes:SynthesizeRecipe",
    "distill": "recipes:DistillRecipe",
    "sft": "align:SftRecipe",
    "preference": "align:PreferenceRecipe",
    "export": "export:ExportRecipe",
    "merge": "merge:MergeRecipe",
    "evolve": "evolve:EvolveRecipe",
    "pipeline": "pipeline:PipelineRecipe",
    "plan_run": "plan:PlanRecipe",
    "chat": "chat:ChatRecipe",
    "report": "report:ReportRecipe",
    "instruct_data": "instruct:InstructDataRecipe",
    "evaluate_instruct": "instruct:EvaluateInstructRecipe",
    "evaluate": "evaluate:EvaluateRecipe",
    "compare": "compare:CompareRecipe",
}
PACKAGE = Path(__file__).resolve().parents[1]


def resources() -> Path:
    """Where conf/ and assets/ are: the clone, or the package where it is installed."""
    return PACKAGE.parent if (PACKAGE.parent / "conf" / "common.yaml").is_file() else PACKAGE
