"""What lies beside exported weights for people: the card, the importance picture, licences, an Ollama Modelfile."""

import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.untrusted import read_json
from nemo_minitron.config.export import ExportRecipe
from nemo_minitron.data.chat.template import CONFIG
from nemo_minitron.export import card, modelfile
from nemo_minitron.export.gguf_tokenizer import STOPS
from nemo_minitron.export.lineage import Lineage
from nemo_minitron.workflows.export.check import GGUF, Prepared
from nemo_minitron.workflows.export.gguf import file_name

_NOTICE = "NOTICE"


def write(r: ExportRecipe, prepared: Prepared, fields: dict[str, Any], place: Path) -> None:
    """Write them into the export's directory.

    Args:
        fields: of `result.json`, as far as they are known.
    """
    licence, file = prepared.licence, file_name(r.export.quantization) if r.format == GGUF else None
    for legal in prepared.lineage.legal:
        shutil.copyfile(legal, place / legal.name)
    if licence and licence.notice:
        with open(place / _NOTICE, "a", encoding="utf-8") as opened:
            opened.write(f"{licence.notice}\n")
    facts = card.Facts(
        name=_name(r, prepared),
        lineage=prepared.lineage,
        licence=licence,
        architecture=prepared.source.architecture,
        result=fields,
        repository=r.publish,
        file=file,
        has_template=_has_template(prepared),
        picture=_picture(prepared.lineage, place),
    )
    (place / card.FILE).write_text(card.card(facts), encoding="utf-8")
    if file is not None:
        (place / modelfile.NAME).write_text(_modelfile(prepared, file), encoding="utf-8")


def _name(r: ExportRecipe, prepared: Prepared) -> str:
    """By which the card calls it: on the hub, or after its base model, with what the licence asks for."""
    if r.publish:
        return r.publish.split("/")[1]
    base = prepared.lineage.base_name or (prepared.lineage.base.stem if prepared.lineage.base else None)
    name = f"{base.split('/')[-1]}-minitron" if base else prepared.target.name
    begins = prepared.licence.name_begins if prepared.licence else None
    return name if begins is None or name.startswith(begins) else f"{begins}-{name}"


def _has_template(prepared: Prepared) -> bool:
    if prepared.vocabulary is not None:
        return prepared.vocabulary.template is not None
    tokenizer = Path(prepared.source.tokenizer)
    return bool(read_json(tokenizer / CONFIG, str(tokenizer)).get("chat_template"))


def _picture(lineage: Lineage, place: Path) -> bool:
    for step in lineage.steps:
        if (picture := step.directory / card.PICTURE).is_file():
            shutil.copyfile(picture, place / card.PICTURE)
            return True
    return False


def _modelfile(prepared: Prepared, file: str) -> str:
    vocabulary, licence = prepared.vocabulary, prepared.licence
    assert vocabulary is not None
    stops = [vocabulary.texts[vocabulary.ids[role]] for role in STOPS if role in vocabulary.ids]
    said = " ".join(part for part in (licence.title, licence.link) if part) if licence else None
    return modelfile.modelfile(file, stops, prepared.source.seq_length, said)
