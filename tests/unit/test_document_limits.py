"""Documents of a packed sequence that shall not see each other: where that cannot be, one line says why."""

import importlib.machinery
import importlib.util
from typing import Any

import pytest

from nemo_minitron.config.document_limits import check_ends, check_limits, refuse_limits
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.errors import InputError

APART = DataConfig(reset_attention_mask=True)


def test_the_default_is_that_they_see_each_other() -> None:
    check_limits(DataConfig(), 2)
    check_ends(DataConfig(), [0], 0)
    refuse_limits(DataConfig(), "a cache")


def test_positions_alone_keep_nothing_apart() -> None:
    with pytest.raises(
        InputError, match=r"data\.reset_position_ids=true: .*needs data\.reset_attention_mask=true"
    ):
        check_limits(DataConfig(reset_position_ids=True), 1)


def test_context_parallel_ranks_have_no_mask() -> None:
    check_limits(APART, 1)
    with pytest.raises(InputError, match="must be false under trainer.context_parallel_size=2"):
        check_limits(APART, 2)


def test_transformer_engine_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        spec = importlib.machinery.ModuleSpec(name, None)
        return spec if name == "transformer_engine" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(InputError, match="reset_attention_mask=true: Transformer Engine is installed"):
        check_limits(APART, 1)


def test_a_token_that_ends_and_begins_documents_would_be_a_document() -> None:
    check_ends(APART, [1], 0)
    with pytest.raises(
        InputError, match=r"the token that ends them, id 0; must be false, or data\.bos=false"
    ):
        check_ends(APART, [0], 0)
