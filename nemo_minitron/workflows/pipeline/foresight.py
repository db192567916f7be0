"""What a later step would refuse, and is known before the first one runs: sizes, licences, families, packages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.sizes import sizes_of
from nemo_minitron.config.export import ExportRecipe
from nemo_minitron.config.recipes import PruneRecipe, merged
from nemo_minitron.errors import InputError, need_package
from nemo_minitron.export.licences import NONE
from nemo_minitron.export.lineage import Lineage, lineage
from nemo_minitron.workflows.export import check as export
from nemo_minitron.workflows.pipeline.steps import Step
from nemo_minitron.workflows.prune import plans

# What a step calls the model that it changes, or writes as a file.
_TAKES = {
    "correct_teacher": "teacher",
    "prune": "source",
    "distill": "student",
    "sft": "student",
    "preference": "student",
    "export": "source",
}


def check_ahead(
    steps: Sequence[Step], composed: Sequence[Mapping[str, Any]], source: Path, *, packages: bool
) -> None:
    """Refuse what would end a pipeline when hours of it are done.

    Args:
        composed: what `compose` gives for each step.
        source: the pipeline's.
        packages: whether this machine has to have what the steps import.

    Raises:
        InputError: names the step and the value; of a missing licence all steps that ask for it; a source that is none.
    """
    configs = [line["config"] for line in composed]
    if packages:
        check_packages(steps, configs)
    _check_sizes(steps, configs, source)
    _check_licences(steps, configs, lineage(source))


def check_packages(steps: Sequence[Step], configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a step that would end for want of a package.

    Raises:
        InputError: names the step and the package.
    """
    for step, settings in zip(steps, configs, strict=True):
        if (settings.get("instruct") or {}).get("gguf") is not None:
            need_package("xllamacpp", f"pipeline.steps.{step.name}")
        if step.recipe == "export":
            _told(step, export.check_packages, _parsed(ExportRecipe, settings))


def _check_sizes(steps: Sequence[Step], configs: Sequence[Mapping[str, Any]], source: Path) -> None:
    """Follow the source's sizes through the steps; models from elsewhere, and those of a search, are not followed."""
    known = {str(source): sizes_of(source).architecture}
    for step, settings in zip(steps, configs, strict=True):
        arch = known.get(str(settings.get(_TAKES.get(step.recipe, ""))))
        if arch is None:
            continue
        if step.recipe == "export":
            _told(step, export.check_family, _parsed(ExportRecipe, settings), arch)
        elif step.recipe == "prune":
            arch = _told(step, _pruned, settings, arch)
        known[str(step.directory)] = arch


def _pruned(settings: Mapping[str, Any], arch: Architecture) -> Architecture:
    r = _parsed(PruneRecipe, settings)
    target, keep = plans.resolve(r.prune, arch)
    return plans.targets(r, arch, target, keep)[-1]


def _check_licences(steps: Sequence[Step], configs: Sequence[Mapping[str, Any]], came_from: Lineage) -> None:
    exports = [
        (step, _parsed(ExportRecipe, settings))
        for step, settings in zip(steps, configs, strict=True)
        if step.recipe == "export"
    ]
    lacking = [step.name for step, r in exports if r.license is None]
    if lacking and came_from.base is not None and came_from.licence is None:
        keys = ", ".join(f"pipeline.steps.{name}.set.license" for name in lacking)
        raise InputError(
            f"{keys}: nothing in {came_from.base} says what it is under; must be a name such as apache-2.0, or {NONE} "
            "if it is your own"
        )
    for step, r in exports:
        _told(step, export.check_licence, r, came_from)


def _parsed(schema: Any, settings: Mapping[str, Any]) -> Any:
    """As a schema has it; it was checked where it was composed, as one of the ranks that the step will have."""
    return OmegaConf.to_object(merged(schema, settings))


def _told(step: Step, check: Any, *of: Any) -> Any:
    """What a check gives, and what it refuses under the step's name."""
    try:
        return check(*of)
    except InputError as error:
        raise InputError(f"pipeline.steps.{step.name}: {error}") from None
