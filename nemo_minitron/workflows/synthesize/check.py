"""What `recipes/synthesize.py` refuses, and prepares, before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.recipes import SynthesizeRecipe
from nemo_minitron.config.synthesize import MEGATRON, check_settings, sampling
from nemo_minitron.data.blend import BLEND
from nemo_minitron.data.indexed import IndexedCorpus
from nemo_minitron.data.prepare import PreparedData, prepare_data
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import InputError
from nemo_minitron.synthesis.prompts import Prompts, openings, read_prompts
from nemo_minitron.synthesis.store import Store
from nemo_minitron.workflows.preflight import check_source, check_vocabulary, converted


@dataclass(frozen=True)
class Prepared:
    """What is known and made before a model is loaded. `data`: None where prompts come from a file."""

    teacher: Source
    tokenizer: Any
    prompts: Prompts
    data: PreparedData | None
    store: Store

    def to_config(self) -> dict[str, Any]:
        """For the launcher's ranks."""
        return {
            "teacher": str(self.teacher.path),
            "teacher_sha256": self.store.manifest["teacher_sha256"],
            "data": self.data.to_config() if self.data else None,
        }


def check(r: SynthesizeRecipe) -> Prepared:
    """Refuse what cannot work; read the prompts, and for sharded writing convert the checkpoint once.

    Raises:
        InputError: settings that no backend has; no prompts, or prompts that do not fit the teacher's context; a run
            directory with samples of other settings.
    """
    s, ready = r.synthesize, r.prepared or {}
    check_settings(s, r.trainer)
    teacher = find_source(ready.get("teacher", r.teacher), "teacher", r.data)
    # Prompts of a file are not packed.
    check_source("teacher", teacher, r.trainer, r.data.seq_length if s.prompts is None else 1)
    tokenizer, data = load_tokenizer(teacher.tokenizer), None
    if s.prompts is None:
        if r.data.name == BLEND:
            raise InputError(
                "data.name=blend: the teacher goes on with openings of one corpus; must be another, or give "
                "synthesize.prompts"
            )
        data = prepare_data(r.data, str(teacher.tokenizer), ready.get("data"))
        check_vocabulary(teacher, data)
        assert isinstance(data.indexed, IndexedCorpus)
        prompts = openings(
            data.indexed,
            of=s.openings,
            length=s.opening_tokens,
            seq_length=r.data.seq_length,
            samples=s.samples,
            seed=r.seed,
        )
    else:
        prompts = read_prompts(s.prompts, s.prompt_key, tokenizer, bos=r.data.bos)
    prompts.check_room(s.max_new_tokens, teacher.seq_length)
    store = _store(r, prompts, ready.get("teacher_sha256") or teacher.sha256())
    if not r.overwrite:
        store.check()
    if s.backend == MEGATRON:
        teacher = converted(teacher, r.data)
    return Prepared(teacher, tokenizer, prompts, data, store)


def _store(r: SynthesizeRecipe, prompts: Prompts, teacher_sha256: str) -> Store:
    manifest = {
        **sampling(r.synthesize),
        "seed": r.seed,
        "precision": r.trainer.precision,
        "prompts_sha256": prompts.sha256,
        "teacher_sha256": teacher_sha256,
    }
    batches = -(-r.synthesize.samples // r.synthesize.batch_size)
    return Store(Path(r.run_dir) / "samples", manifest, batches)
