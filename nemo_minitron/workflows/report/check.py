"""What `recipes/report.py` refuses before it writes."""

from dataclasses import dataclass

from nemo_minitron.config.report import ReportRecipe
from nemo_minitron.errors import InputError
from nemo_minitron.export.lineage import changed_by
from nemo_minitron.report.chain import Chain, read_chain
from nemo_minitron.workflows.one_process import OneProcess, check_one_process


@dataclass(frozen=True)
class Prepared(OneProcess):
    """The runs, and which checkpoints answer prompts: (title, checkpoint)."""

    chain: Chain
    speakers: list[tuple[str, str]]


def check(r: ReportRecipe) -> Prepared:
    """Find the runs.

    Raises:
        InputError: no finished run is there; more samples than prompts.
    """
    check_one_process(r.trainer, "report")
    if r.report.samples > len(r.report.prompts):
        raise InputError(
            f"report.samples={r.report.samples}: there are {len(r.report.prompts)} report.prompts"
        )
    chain = read_chain(r.source, r.report.runs)
    return Prepared(chain, _speakers(chain) if r.report.samples else [])


def _speakers(chain: Chain) -> list[tuple[str, str]]:
    """The teacher or base model, the student before the last run, the student after it."""
    if not chain.runs:
        raise InputError("report.samples: the run is a measurement; give the run that made the model")
    last = chain.runs[-1]
    teachers = [run.result["teacher"] for run in chain.runs if isinstance(run.result.get("teacher"), str)]
    before = changed_by(last.result)
    first = teachers[0] if teachers else chain.base
    named = [
        ("teacher" if teachers else "base model", first),
        (f"before {last.recipe}", before if before != first else None),
        (f"after {last.recipe}", str(last.directory)),
    ]
    return [(title, str(path)) for title, path in named if path]
