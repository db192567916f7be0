"""Runs the recipes' commands of README.md and docs/ one after the other, each page from an empty directory, shortened:

    python -m tests.docs_campaign --home DIR [--page docs/] [--only TEXT] [--real-model FILE.gguf]

From the repository's root. `SHORTER` is what makes them end in seconds; the words in capitals stand for what `inputs`
makes first. A command has to end with exit code 0. What is not run is printed with its reason.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tests.unit.test_docs import PAGES, ROOT, Command, commands_of, kind_of, recipes_in

_TRAINING = {
    "distill.max_steps": "2",
    "distill.global_batch_size": "16",
    "distill.optim.warmup_steps": "1",
    "distill.val_check_interval": "2",
    "distill.limit_val_batches": "1",
}
_ALIGNMENT = {
    "align.max_steps": "2",
    "align.global_batch_size": "16",
    "align.optim.warmup_steps": "1",
    "align.limit_val_batches": "1",
}
_SCORING = {"prune.calibration_samples": "8", "eval.samples": "4", "prune.control_seeds": "1"}
_SIZES = {f"sizes.{name}": "20" for name in ("train", "seen", "valid", "test")}
SHORTER = {
    "prune": _SCORING,
    "search": {
        **{key: value for key, value in _SCORING.items() if "control" not in key},
        "search.max_candidates": "2",
        "search.trials": "2",
        "search.distill_candidates": "1",
        **_TRAINING,
        "distill.max_steps": "4",
    },
    "distill": {**_TRAINING, "eval.samples": "4"},
    "correct_teacher": {**_TRAINING, "eval.samples": "4"},
    "cache_teacher": {**_TRAINING, "eval.samples": "4"},
    "synthesize": {
        "synthesize.samples": "8",
        "synthesize.batch_size": "4",
        "synthesize.max_new_tokens": "64",
    },
    "sft": {**_ALIGNMENT, "eval.samples": "4"},
    "preference": {**_ALIGNMENT, "eval.samples": "4"},
    "pretrain": {"trainer.max_steps": "2", "trainer.val_check_interval": "2", "optim.warmup_steps": "1"},
    "evaluate": {"eval.samples": "4", "eval.limit": "2", "eval.max_new_tokens": "8"},
    "compare": {
        "eval.samples": "4",
        "eval.limit": "2",
        "eval.max_new_tokens": "8",
        "compare.rounds": "1",
        "compare.new_tokens": "4",
    },
    "evaluate_instruct": {
        "instruct.sizes.test": "4",
        "instruct.sizes.seen": "4",
        "instruct.max_new_tokens": "8",
    },
    "instruct_data": {f"instruct_data.{name}": value for name, value in _SIZES.items()},
}
# Keys that only take effect where the command has them.
_IF_TYPED = ("prune.control_seeds", "search.trials", "search.distill_candidates", "search.distill_steps")
_NOT_RUN = {
    "llama31_8b": "an 8B model",
    "prune.hidden_size=3072": "an 8B model",
    "slurm": "a cluster; functional/test_slurm.py",
    "pipeline.py": "functional/test_pipeline.py",
    "docker": "an engine; functional/test_docker.py",
    "...": "a part of a command",
    "push=true": "the hub",
    "eval=base": "the hub",
    "eval=instruct": "a judge",
    "eval=local": "data out of PyPI",
    "hellaswag_100": "data out of PyPI",
    "=FILE.jsonl]": "items of a benchmark; unit/test_benchmark_files.py",
    "--cfg": "only shows; unit/test_docs.py",
    "--nproc 8": "eight ranks",
}


def inputs(home: Path, environment: dict[str, str]) -> dict[str, str]:
    """What the pages' words in capitals stand for: runs, files, directories."""
    made = home / "inputs"
    made.mkdir(parents=True)
    questions = [{"question": "def", "choices": [" a", " b c"], "answer": 0}] * 4
    (made / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for name in ("train", "valid"):
        rows = [_conversation(f"{name} {number}") for number in range(40)]
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "prompts.txt").write_text("".join(f"def f{number}(\n" for number in range(8)))
    asked = [{"question": f"def f{number}("} for number in range(8)]
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    teacher, run = ROOT / "assets" / "demo-teacher", made / "run"
    for recipe, *typed in (
        ("prune", "+conf=width", f"run_dir={run}"),
        ("synthesize", f"run_dir={made / 'text'}"),
        ("cache_teacher", "+conf=width", f"run_dir={made / 'cache'}"),
        ("cache_teacher", "+conf=width", "cache=top_k", "distill.top_k=64", f"run_dir={made / 'top_k'}"),
        ("sft", "+conf=instruct", f"student={run}", f"run_dir={made / 'sft'}"),
        ("export", f"source={run}", "format=gguf", f"to={made / 'gguf'}"),
    ):
        code, said = _run(
            [sys.executable, f"{ROOT}/recipes/{recipe}.py", *_shorter(recipe, typed)], made, environment
        )
        assert code == 0, said
    (file,) = (made / "gguf").glob("*.gguf")
    words = {"RUN": run, "WIDTH": run, "STUDENT": run, "SFT": made / "sft", "TEXT": made / "text"}
    words |= {"CACHE": made / "cache", "DIR": teacher, "FILE.gguf": file, "FILE.txt": made / "prompts.txt"}
    words |= {"TRAIN.jsonl": made / "train.jsonl", "VALID.jsonl": made / "valid.jsonl"}
    library = Path(os.__file__).parent
    return {name: str(path) for name, path in words.items()} | {
        "FILES": f"{library}/*.py",
        "S": "1",
        "N": "2",
    }


def _conversation(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}!"}]}


def _stands_for(recipe: str, word: str, words: dict[str, str], number: int) -> str:
    key, equals, value = word.partition("=")
    made = Path(words["FILE.txt"]).parent
    if key in ("run_dir", "to", "export_dir"):
        return word if value.startswith("runs/") else f"{key}=made/{number}-{key}"
    if key == "sdg" and value == "RUN":
        return f"sdg={words['TEXT']}"
    if key == "teacher_cache" and recipe == "distill":
        return f"{key}={value}"
    if value.startswith("FILE"):
        name = {
            "prune.task_file": "task.jsonl",
            "align.valid": "valid.jsonl",
            "synthesize.prompts": f"prompts{Path(value).suffix}",
        }
        return f"{key}={words.get(value) if value in ('FILES', 'FILE.gguf') else made / name.get(key, 'train.jsonl')}"
    if key == "models":  # a list of them
        value = re.sub(
            r"(?<=[\[,])[A-Z]+(\.\w+)?(?=[,\]])", lambda m: words.get(m.group(0), m.group(0)), value
        )
    return (
        key + equals + re.sub(r"^[A-Z]+(\.\w+)?(?=$|/)", lambda m: words.get(m.group(0), m.group(0)), value)
    )


def _shorter(recipe: str, typed: list[str]) -> list[str]:
    short = dict(SHORTER.get(recipe, {}))
    keys = {word.partition("=")[0] for word in typed}
    short = {key: value for key, value in short.items() if key in keys or key not in _IF_TYPED}
    if any(word.startswith("search.distill_steps") for word in typed):
        short["search.distill_steps"] = "4"
    return [*(word for word in typed if word.partition("=")[0] not in short), *map("=".join, short.items())]


def _reason(command: Command, real_model: str | None) -> str | None:
    if kind_of(command) != "recipe":
        return "no recipe"
    if "$M" in command.text and real_model is None:
        return "--real-model was not given"
    return next((why for part, why in _NOT_RUN.items() if part in command.text), None)


def _line(command: Command, words: dict[str, str], number: int, real_model: str | None) -> list[str]:
    typed = command.words()
    ((recipe, after, _),) = recipes_in(typed)
    after = [_stands_for(recipe, word.replace("$M", real_model or ""), words, number) for word in after]
    if any("distill.top_k=64" in word for word in after):
        after = [word.replace("=CACHE", f"={Path(words['FILE.txt']).parent / 'top_k'}") for word in after]
    after = [word.replace("teacher_cache=CACHE", f"teacher_cache={words['CACHE']}") for word in after]
    script = [f"{ROOT}/recipes/{recipe}.py", *_shorter(recipe, after)]
    nproc = ["--nproc", "2"] if "--nproc" in typed else []
    return [*([f"{ROOT}/launchers/local.sh", *nproc] if nproc else [sys.executable]), *script]


def _run(line: list[str], where: Path, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        line, cwd=where, env=environment, capture_output=True, text=True, input="", timeout=1800
    )
    return done.returncode, done.stderr[-1500:]


def main() -> int:
    """Run them, and say what failed; 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="a directory of the campaign's own")
    parser.add_argument("--only", default="", help="those with this in them")
    parser.add_argument("--page", default="", help="of pages with this in their path, such as docs/")
    parser.add_argument("--real-model")
    options = parser.parse_args()
    home = options.home.resolve()
    environment = {
        **os.environ,
        "NEMO_MINITRON_HOME": str(home / "cache"),
        "NEMO_MINITRON_PYTHON": sys.executable,
    }
    words, seen, failed, ran = inputs(home, environment), set(), [], 0
    for page in PAGES:
        where = home / page.relative_to(ROOT).with_suffix("")  # two pages are called README
        if options.page not in str(where.relative_to(home)):
            continue
        where.mkdir(parents=True)
        for number, command in enumerate(commands_of(page)):
            if command.text in seen or options.only not in command.text:
                continue
            seen.add(command.text)
            if (why := _reason(command, options.real_model)) is not None:
                print(f"not run ({why}): {command.text}", flush=True)
                continue
            line, begin = _line(command, words, number, options.real_model), time.monotonic()
            code, said = _run(line, where, environment)
            ran += 1
            print(f"{code} after {time.monotonic() - begin:.0f} s: {shlex.join(line)}", flush=True)
            if code:
                failed.append(command.text)
                print(said, flush=True)
    print(f"{ran} commands, {len(failed)} failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
