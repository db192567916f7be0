"""What lies beside merged weights for people: the card with the recipe of the merge, and the models' legal files."""

import shutil
from pathlib import Path

import yaml

from nemo_minitron.arch import Architecture
from nemo_minitron.checkpoints.untrusted import read_json
from nemo_minitron.data.chat.template import CONFIG
from nemo_minitron.export import card
from nemo_minitron.merging.settings import Merge
from nemo_minitron.workflows.merge.check import Prepared


def recipe_text(merge: Merge) -> str:
    """The merge as YAML of mergekit's form, each model by its own name, without the directories above it."""
    named = merge.with_models(
        [Path(model).name for model in merge.models], merge.base and Path(merge.base).name
    )
    return yaml.safe_dump(named.plain(), sort_keys=False, allow_unicode=True)


def write(
    prepared: Prepared, merge: Merge, recipe: str, arch: Architecture, place: Path, note: str = ""
) -> None:
    """Write the card and the legal files into the model's directory.

    Args:
        merge: that made it.
        recipe: as the card has it.
        arch: of the result.
        note: lines of Markdown that tell how the recipe was found.
    """
    for found in prepared.lineages:
        for legal in found.legal:
            if not (place / legal.name).exists():
                shutil.copyfile(legal, place / legal.name)
    first = prepared.lineages[0]
    names = [
        found.base_name or Path(path).name
        for found, path in zip(prepared.lineages, prepared.merge.paths, strict=True)
    ]
    settings = read_json(prepared.tokenizer / CONFIG, str(prepared.tokenizer))
    facts = card.Facts(
        name=f"{first.base_name.split('/')[-1] if first.base_name else names[0]}-merged",
        lineage=first,
        licence=prepared.licence,
        architecture=arch,
        result={},
        repository=None,
        file=None,
        has_template=bool(settings.get("chat_template")),
        picture=False,
        merge=card.MergeFacts(merge.method, tuple(names), recipe, note),
    )
    (place / card.FILE).write_text(card.card(facts), encoding="utf-8")
