"""An instruct set of the project's own: generated, checkable, with held-out template families."""

from nemo_minitron.data.instruct.generate import (
    CATEGORIES,
    InstructFiles,
    Sizes,
    cached_instruct_set,
    write_instruct_set,
)

__all__ = ["CATEGORIES", "InstructFiles", "Sizes", "cached_instruct_set", "write_instruct_set"]
