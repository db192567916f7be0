"""Log-likelihoods on the sharded model beside lm-evaluation-harness's `hf` backend, on the same weights and requests:
python benchmarks/likelihoods.py --source DIR

DIR: a Hugging Face directory. The requests are the first ones of hellaswag_100 (`make eval-data`), four of a question.
Both sides are in one process, take turns in batches of the same size, and are timed without making the model. Prints a
JSON line: seconds of each side (medians over runs), `ratio` = ours / the backend's, `ratio_cpu_time` which leaves out
the time that other processes had the CPU for, and

* `largest_difference`: of two log-likelihoods, in nats, the backend with its own option softmax_dtype=float64,
* `largest_difference_float32`: with its default, whose float32 log_softmax is farther from float64 than the models are.

The goals are a ratio of 1.1 and a difference of 1e-4.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import models
from nemo_minitron import cpu_compat
from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.evaluation.benchmarks import catalogue

TASK = "hellaswag_100"


def requests(count: int) -> list[Any]:
    """The first of the benchmark's."""
    (benchmark,) = catalogue.load(catalogue.parse_names([TASK]), DataConfig())
    benchmark.task.build_all_requests(limit=-(-count // 4))
    return benchmark.task.instances[:count]


def sides(source: Path, batch_size: int) -> tuple[Any, Any]:
    """Our language model, and the harness's own."""
    cpu_compat.prepare_nemo()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from nemo_minitron.evaluation.benchmarks.adapter import ShardedLM
    from nemo_minitron.evaluation.benchmarks.answers import Answers
    from nemo_minitron.nemo.session import Session
    from nemo_minitron.workflows.evaluate.model import ShardedModel
    from nemo_minitron.workflows.preflight import converted

    tokenizer = load_tokenizer(source)
    session = Session(converted(find_source(source), DataConfig()), TrainerConfig())
    ours = ShardedLM(ShardedModel(session, tokenizer, [], batch_size), tokenizer, Answers(None))
    loaded = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    other = HFLM(
        pretrained=loaded.eval(), tokenizer=tokenizer, batch_size=batch_size, device=str(loaded.device)
    )
    return ours, other


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the JSON line."""
    from nemo_minitron.evaluation.benchmarks.answers import Answers

    asked = requests(a.requests)
    ours, other = sides(a.source, a.batch_size)
    found: dict[str, Any] = {}

    def one(name: str, lm: Any) -> None:
        if name == "ours":
            lm.answers = Answers(None)
        found[name] = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]

    times: dict[str, list[Any]] = {"ours": [], "hf": []}
    for run in range(a.runs + 1):  # the first warms up
        for name, lm in (("ours", ours), ("hf", other)):
            taken = models.seconds(lambda name=name, lm=lm: one(name, lm))
            if run:
                times[name].append(taken)
    default = found["hf"]
    other.softmax_dtype = torch.float64
    one("hf", other)
    medians = {
        name: [statistics.median(kind) for kind in zip(*runs, strict=True)] for name, runs in times.items()
    }
    return {
        "requests": len(asked),
        "runs": a.runs,
        "threads": torch.get_num_threads(),
        "seconds_ours": round(medians["ours"][0], 2),
        "seconds_hf": round(medians["hf"][0], 2),
        "ratio": round(medians["ours"][0] / medians["hf"][0], 3),
        "ratio_cpu_time": round(medians["ours"][1] / medians["hf"][1], 3),
        "largest_difference": largest(found["ours"], found["hf"]),
        "largest_difference_float32": largest(found["ours"], default),
    }


def largest(ours: list[float], other: list[float]) -> float:
    """Of the differences."""
    return max(abs(x - y) for x, y in zip(ours, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(json.dumps(measure(a)))


if __name__ == "__main__":
    main()
