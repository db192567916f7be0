"""Licences of base models: what a model made of one must carry.

Names are the hub's (https://huggingface.co/docs/hub/repositories-licenses). The obligations are those that the licences
name for copies and derivatives; a card is no legal advice.
"""

from dataclasses import dataclass

from nemo_minitron.errors import InputError

NONE = "none"
_META = "Meta Platforms, Inc. All Rights Reserved."
_LLAMA = "is licensed under the {0} Community License, Copyright © " + _META


@dataclass(frozen=True)
class Licence:
    """A licence.

    Attributes:
        name: the hub's identifier, or that of a licence which the hub lists under "other".
        title: in words.
        link: to its text.
        notice: what a NOTICE file with each copy must say.
        built_with: what must be shown wherever the model is.
        name_begins: what the name of a model made of it must begin with.
        derivatives: whether changed copies may be passed on.
        listed: whether the hub knows the name.
    """

    name: str
    title: str
    link: str | None = None
    notice: str | None = None
    built_with: str | None = None
    name_begins: str | None = None
    derivatives: bool = True
    listed: bool = True


def _llama(version: str) -> Licence:
    title = f"Llama {version}"
    return Licence(
        f"llama{version}",
        f"{title} Community License Agreement",
        f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
        f"{title} {_LLAMA.format(title)}",
        "Built with Llama",
        "Llama",
    )


_META_LLAMA_3 = Licence(
    "llama3",
    "Meta Llama 3 Community License Agreement",
    "https://www.llama.com/llama3/license/",
    f"Meta Llama 3 {_LLAMA.format('Meta Llama 3')}",
    "Built with Meta Llama 3",
    "Llama 3",
)
_NVIDIA = Licence(
    "nvidia-open-model-license",
    "NVIDIA Open Model License",
    "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
    "Licensed by NVIDIA Corporation under the NVIDIA Open Model License",
    listed=False,
)
_GEMMA = Licence(
    "gemma",
    "Gemma Terms of Use",
    "https://ai.google.dev/gemma/terms",
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
_LLAMA_2 = Licence(
    "llama2",
    "LLAMA 2 Community License Agreement",
    "https://www.llama.com/llama2/license/",
    f"Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) {_META}",
)
_PLAIN = {
    "apache-2.0": "Apache License 2.0",
    "mit": "MIT License",
    "bsd-2-clause": "BSD 2-Clause License",
    "bsd-3-clause": "BSD 3-Clause License",
    "isc": "ISC License",
    "cc0-1.0": "Creative Commons Zero 1.0",
    "cc-by-4.0": "Creative Commons Attribution 4.0",
    "cc-by-sa-4.0": "Creative Commons Attribution ShareAlike 4.0",
    "cc-by-nc-4.0": "Creative Commons Attribution NonCommercial 4.0",
    "cc-by-nc-sa-4.0": "Creative Commons Attribution NonCommercial ShareAlike 4.0",
    "openrail": "OpenRAIL",
    "bigscience-openrail-m": "BigScience OpenRAIL-M",
    "bigcode-openrail-m": "BigCode OpenRAIL-M",
    "gpl-3.0": "GNU General Public License 3.0",
    "unlicense": "The Unlicense",
}
_WITHOUT_DERIVATIVES = {
    "cc-by-nd-4.0": "Creative Commons Attribution NoDerivatives 4.0",
    "cc-by-nc-nd-4.0": "Creative Commons Attribution NonCommercial NoDerivatives 4.0",
}
KNOWN = {
    licence.name: licence
    for licence in (
        *(Licence(name, title) for name, title in _PLAIN.items()),
        *(Licence(name, title, derivatives=False) for name, title in _WITHOUT_DERIVATIVES.items()),
        _LLAMA_2,
        _META_LLAMA_3,
        *map(_llama, ("3.1", "3.2", "3.3")),
        _GEMMA,
        _NVIDIA,
    )
}


def of_name(said: str, where: str) -> Licence:
    """A licence by the hub's name, or by its title.

    Args:
        where: what a refusal begins with, such as "license=...".

    Raises:
        InputError: a name that is not known, or a licence without derivatives.
    """
    wanted = said.strip().lower()
    titles = {licence.title.lower(): licence for licence in KNOWN.values()}
    found = KNOWN.get(wanted) or KNOWN.get(wanted.replace(" ", "-")) or titles.get(wanted)
    if found is None:
        raise InputError(
            f"{where}: is not known; known are {', '.join(KNOWN)}, and {NONE} for a model of your own"
        )
    if not found.derivatives:
        raise InputError(
            f"{where}: {found.title} forbids changed copies, which a student is; it is not exported"
        )
    return found
