"""The work of `recipes/export.py`: write, compare with the Megatron model, give the final name."""

import time
from pathlib import Path
from typing import Any

from nemo_minitron.config.export import ExportRecipe
from nemo_minitron.environment import peak_rss_gib
from nemo_minitron.export import generation, hub, huggingface
from nemo_minitron.export.target import under_another_name
from nemo_minitron.progress import progress_bar
from nemo_minitron.workflows.export import fp8, gguf, papers, verification
from nemo_minitron.workflows.export.check import FP8, GGUF, Prepared


def run(r: ExportRecipe, prepared: Prepared, directory: Path) -> dict[str, Any]:
    """Write the export; it gets its name once it has given the Megatron model's logits.

    Returns:
        The fields of `result.json`.
    """
    with under_another_name(prepared.target) as temporary:
        temporary.mkdir()
        begin = time.monotonic()
        if r.format == GGUF:
            fields = gguf.write(r, prepared, temporary)
        else:
            fields = _write_directory(prepared, temporary)
        fields["write_s"] = round(time.monotonic() - begin, 2)
        fields["peak_rss_gib_after_writing"] = peak_rss_gib()
        begin = time.monotonic()
        if r.format == GGUF:
            fields |= gguf.verify(r, prepared, temporary)
        else:
            fields |= verification.of_directory(prepared, temporary, r.export.verify_tokens)
        fields["verify_s"] = round(time.monotonic() - begin, 2)
        if r.export.dtype == FP8:
            fields |= fp8.quantise(temporary, min(prepared.source.seq_length, 512))
        papers.write(r, prepared, fields, temporary)
    fields |= _published(r, prepared.target)
    return {
        "recipe": "export",
        "format": r.format,
        "source": str(r.source),
        "source_sha256": prepared.source_sha256,
        "params": prepared.source.architecture.parameters(),
        "license": None if prepared.licence is None else prepared.licence.name,
        **fields,
        "peak_rss_gib": peak_rss_gib(),
        "exported": str(prepared.target),
    }


def _write_directory(prepared: Prepared, place: Path) -> dict[str, Any]:
    model = prepared.model
    show = progress_bar("written", model.bytes)
    files = huggingface.write(model, place, prepared.shard_bytes, show)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "stop_token_ids": generation.ids_of(generation.carried(place), "eos_token_id", place),
        "weight_files": len(files),
        "weight_bytes": sum(file.stat().st_size for file in files),
    }


def _published(r: ExportRecipe, directory: Path) -> dict[str, Any]:
    """What was, or would be, sent to the hub."""
    if r.publish is None:
        return {}
    print(hub.listing(directory, r.publish), flush=True)
    if not r.push:
        print("nothing was sent; push=true sends it", flush=True)
    commit = hub.push(directory, r.publish) if r.push else None
    return {"published": r.publish if r.push else None, "commit": commit}
