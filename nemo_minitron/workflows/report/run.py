"""The work of `recipes/report.py`: let models answer where that was asked for, write the page."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config.report import ReportRecipe
from nemo_minitron.environment import peak_rss_gib, with_package
from nemo_minitron.errors import FailedRun
from nemo_minitron.files import write_text
from nemo_minitron.report.page import write_page
from nemo_minitron.workflows.report.check import Prepared

PAGE = "report.html"


def run(r: ReportRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write RUN/report.html.

    Returns:
        The fields of `result.json`.

    Raises:
        FailedRun: a model could not answer.
    """
    prompts = r.report.prompts[: r.report.samples]
    said: list[dict[str, str]] = [{"prompt": prompt} for prompt in prompts]
    titles = [title for title, _ in prepared.speakers]
    for title, checkpoint in prepared.speakers:
        for row, answer in zip(said, _answers(r, checkpoint, prompts), strict=True):
            row[title] = answer
    page = write_text(directory / PAGE, write_page(prepared.chain, said, titles))
    return {
        "recipe": "report",
        "source": str(r.source),
        "runs": [str(found.directory) for found in prepared.chain.runs],
        "report": str(page.resolve()),
        "bytes": page.stat().st_size,
        "peak_rss_gib": peak_rss_gib(),
    }


def _answers(r: ReportRecipe, checkpoint: str, prompts: Sequence[str]) -> list[str]:
    """In a process of its own: only this needs NeMo, and its memory goes back before the next model is loaded."""
    asked = {
        "checkpoint": checkpoint,
        "prompts": list(prompts),
        "max_new_tokens": r.report.max_new_tokens,
        "cache_dir": r.data.cache_dir,
    }
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron.workflows.report.answering"],
        input=json.dumps(asked),
        env=with_package(),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise FailedRun(f"report.samples: {checkpoint} did not answer (exit code {done.returncode})")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found
