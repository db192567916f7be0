"""What a pipeline has made: RUN/steps.json, which says of what each step's directory was begun, and how it ended."""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.environment import RESULT
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, remove, write_text

FILE = "steps.json"


class State:
    """Of one pipeline's run directory.

    Args:
        run_dir: of the pipeline.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.file = run_dir, run_dir / FILE
        found = self._read()
        self.source_sha256: str | None = found.get("source_sha256")
        self.pipeline: str | None = found.get("pipeline")
        self.steps: dict[str, dict[str, Any]] = found.get("steps", {})

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(read_text(self.file))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("steps", {}), dict) else {}

    def check_source(self, source: str, sha256: str, *, overwrite: bool) -> None:
        """Refuse another teacher where steps of the first are finished.

        Raises:
            InputError: names the source.
        """
        finished = [name for name in self.steps if (self.run_dir / name / RESULT).exists()]
        if self.source_sha256 not in (None, sha256) and finished and not overwrite:
            raise InputError(
                f"source={source}: is not what {', '.join(finished)} in {self.run_dir} were made of; "
                "choose another run_dir, or say overwrite=true"
            )

    def check_pipeline(self, name: str | None, *, overwrite: bool) -> None:
        """Refuse another pipeline where steps of the first are finished.

        Args:
            name: of the file of the group `pipeline`; None where it is not known.

        Raises:
            InputError: names both.
        """
        finished = [step for step in self.steps if (self.run_dir / step / RESULT).exists()]
        if None not in (name, self.pipeline) and name != self.pipeline and finished and not overwrite:
            raise InputError(
                f"pipeline={name}: {self.run_dir} has {', '.join(finished)} of pipeline={self.pipeline}; choose "
                "another run_dir, or say overwrite=true"
            )

    def is_done(self, name: str, key: str) -> bool:
        """Whether the step was made of just this."""
        return self._key(name) == key and (self.run_dir / name / RESULT).exists()

    def begin(self, name: str, key: str, source_sha256: str, pipeline: str | None = None) -> None:
        """Say what a step's directory will be made of; what was made there of something else goes."""
        if self._key(name) != key:
            remove(self.run_dir / name)
            self.steps[name] = {"key": key}
        self.source_sha256, self.pipeline = source_sha256, pipeline
        self._write()

    def end(self, name: str, said: str, seconds: float) -> None:
        """Keep how long a step took, over all its starts, and its closing line."""
        before = float(self.steps[name].get("seconds", 0))
        self.steps[name] |= {"said": said, "seconds": round(before + seconds, 1)}
        self._write()

    def _key(self, name: str) -> str | None:
        step = self.steps.get(name)
        return step.get("key") if isinstance(step, dict) else None

    def _write(self) -> None:
        fields = {"source_sha256": self.source_sha256, "pipeline": self.pipeline, "steps": self.steps}
        write_text(self.file, json.dumps(fields, indent=2) + "\n")
