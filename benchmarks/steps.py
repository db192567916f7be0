"""Forward pass, training step and distillation step of a 135M model beside a plain transformers loop.

    python benchmarks/steps.py forward --tokens 512
    python benchmarks/steps.py train --tokens 512 --batch 2
    python benchmarks/steps.py distill --tokens 512 --batch 2

Sides, each in a process of its own that stays and takes turns with the other, run by run, on the same random tokens:

* ours: Megatron-core's GPTModel as the recipes run it: our norm and attention, products as `product_choice` says, and
  for `distill` our loss on hidden states;
* transformers: LlamaForCausalLM with sdpa, torch's products; `distill` is KL on both models' logits.

`train` is forward, cross-entropy, backward and AdamW (ours Megatron's choice, theirs torch's as it comes), `distill`
the same on a student of 81M (hidden 448, MLP 960) with a frozen teacher of 135M. Weights are random, of SmolLM2-135M's
sizes (--size 1b: of Llama-3.2-1B's) and the same on both sides, so that losses can be compared; --model DIR takes a
Llama's Hugging Face directory instead, for the teacher under `distill`. --bf16: parameters and activations in bfloat16.

Prints a JSON line: `tflop`, what the products of a run take; medians over runs of wall and CPU seconds (all threads of
the process), of the loss (`value`; of a forward pass the mean logit) and of the peak of memory beyond imports, weights,
gradients and optimizer; ratios are ours / transformers, medians over pairs of runs. On a shared CPU `cpu_s_ratio` under
OMP_NUM_THREADS=1 is the steady one.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import in_turn

SIDES = ("ours", "transformers")
# SmolLM2-135M's and Llama-3.2-1B's, with the widths of a student; docs/results.md makes the first.
SIZES: dict[str, dict[str, Any]] = {
    "135m": {
        "model": {"num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0},
        "layers": 30,
        "vocab_size": 49152,
        "teacher": {"hidden_size": 576, "intermediate_size": 1536},
        "student": {"hidden_size": 448, "intermediate_size": 960},
    },
    "1b": {
        "model": {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
        "layers": 16,
        "vocab_size": 128256,
        "teacher": {"hidden_size": 2048, "intermediate_size": 8192},
        "student": {"hidden_size": 1536, "intermediate_size": 5120},
    },
}


def make_model(directory: Path, a: argparse.Namespace, role: str) -> None:
    """A Llama of random weights as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES[a.size]
    torch.manual_seed(sizes[role]["hidden_size"])
    config = LlamaConfig(
        num_hidden_layers=a.layers or sizes["layers"],
        head_dim=64,
        vocab_size=a.vocab_size or sizes["vocab_size"],
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        torch_dtype=torch.float32,
        **sizes["model"],
        **sizes[role],
    )
    LlamaForCausalLM(config).save_pretrained(directory)


# ---- transformers -----------------------------------------------------------------------------------------------


def plain_model(directory: Path, dtype: Any) -> Any:
    """As users load it."""
    from transformers import AutoModelForCausalLM

    from benchmarks import models

    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype, attn_implementation="sdpa")
    return model.to(models.device())


def plain_work(a: argparse.Namespace, student: Any, teacher: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """What gives the value to differentiate, or the logits."""
    from torch.nn import functional

    def logits(model: Any) -> Any:
        return model(batch["tokens"], use_cache=False).logits

    def train() -> Any:
        return functional.cross_entropy(logits(student).float().flatten(0, 1), batch["labels"].flatten())

    def distill() -> Any:
        import torch

        with torch.no_grad():
            target = logits(teacher).float().log_softmax(-1)
        log_q = logits(student).float().log_softmax(-1)
        return functional.kl_div(log_q, target, log_target=True, reduction="none").sum(-1).mean()

    return {"forward": lambda: logits(student), "train": train, "distill": distill}[a.work]


# ---- ours -------------------------------------------------------------------------------------------------------


def our_model(directory: Path, dtype: Any) -> Any:
    """Megatron's GPTModel with a Llama's weights."""
    from safetensors.torch import load_file

    from benchmarks import models
    from nemo_minitron.checkpoints.families import architecture_of

    arch = architecture_of(json.loads((directory / "config.json").read_text()), str(directory))
    model = models.gpt(arch, dtype)
    found = load_file(str(directory / "model.safetensors"))
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    for name, value in state.items():
        value.copy_(_of_llama(name, found, arch))
    return model


def _of_llama(name: str, found: dict[str, Any], arch: Any) -> Any:
    """The weight of Megatron's name (local layer spec): q, k, v lie group by group, gate and up one after the other."""
    import torch

    whole = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in whole:
        return found[whole[name]]
    layer, _, part = name.removeprefix("decoder.layers.").partition(".")
    of = {
        "input_layernorm.weight": ["input_layernorm"],
        "pre_mlp_layernorm.weight": ["post_attention_layernorm"],
        "self_attention.linear_proj.weight": ["self_attn.o_proj"],
        "mlp.linear_fc1.weight": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.linear_fc2.weight": ["mlp.down_proj"],
        "self_attention.linear_qkv.weight": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    }[part]
    parts = [found[f"model.layers.{layer}.{each}.weight"] for each in of]
    if len(parts) == 3:
        parts = [each.view(arch.num_query_groups, -1, arch.hidden_size) for each in parts]
        return torch.cat(parts, dim=1).view(-1, arch.hidden_size)
    return torch.cat(parts)


def our_work(a: argparse.Namespace, student: Any, teacher: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """As `plain_work`."""
    import torch

    from nemo_minitron.distillation import HiddenTeacher, LossSettings, distillation_loss

    def run(model: Any, **labels: Any) -> Any:
        return model(batch["tokens"], batch["position_ids"], None, **labels)

    def hidden(model: Any) -> Any:
        model._postprocess = lambda hidden_states, *rest, **options: hidden_states
        return run(model)

    def distill() -> Any:
        with torch.no_grad():
            target = HiddenTeacher(hidden(teacher), teacher.shared_embedding_or_output_weight())
        head, mask = student.shared_embedding_or_output_weight(), batch["loss_mask"]
        sums = distillation_loss(hidden(student), head, target, mask, LossSettings(), vocab_size=head.size(0))
        return sums.loss / sums.tokens

    def train() -> Any:
        return run(student, labels=batch["labels"]).mean()

    return {"forward": lambda: run(student), "train": train, "distill": distill}[a.work]


# ---- both -------------------------------------------------------------------------------------------------------


def be_side(a: argparse.Namespace) -> None:
    """Load the models, then run whenever the parent says so."""
    from nemo_minitron import cpu_compat
    from nemo_minitron.cpu_compat import presence, product_choice

    ours = a.side == "ours"
    if ours:
        cpu_compat.take_products(product_choice.choose())
        cpu_compat.prepare_megatron()
    import torch

    from benchmarks import models

    dtype = torch.bfloat16 if a.bf16 else torch.float32
    if ours:
        models.process_group()
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

        import nemo_minitron.distillation  # noqa: F401
    else:
        import transformers.models.llama.modeling_llama  # noqa: F401
    in_turn.before_models()
    load, make = (our_model, our_work) if ours else (plain_model, plain_work)
    student = load(a.directory / "student", dtype)
    teacher = load(a.directory / "teacher", dtype).eval() if a.work == "distill" else None
    if ours and not presence.cuda_was_present():
        from nemo_minitron.cpu_compat import nemo2

        nemo2.large_buffers_fault_on_every_step()  # as `prepare_nemo` does
    torch.manual_seed(0)
    config = json.loads((a.directory / "student" / "config.json").read_text())
    batch = models.random_batch(config["vocab_size"], a.batch, a.tokens)
    run = make(a, student, teacher, batch)
    work = forward(run, student) if a.work == "forward" else step(run, student, adam(ours))
    # Weights; for a step also gradients and AdamW's two states.
    held = _bytes(student) * (1 if a.work == "forward" else 4) + (_bytes(teacher) if teacher else 0)
    in_turn.serve(work, held)


def forward(run: Callable[[], Any], model: Any) -> Callable[[], float]:
    """A pass without gradients; the mean logit."""
    import torch

    model.eval()

    def work() -> float:
        with torch.no_grad():
            return float(run().mean())

    return work


def adam(ours: bool) -> Any:
    """The class of the optimizer: Megatron's choice, or torch's as it comes."""
    if ours:
        from megatron.core.optimizer import Adam

        return Adam
    from torch.optim import AdamW

    return AdamW


def step(run: Callable[[], Any], model: Any, kind: Any) -> Callable[[], float]:
    """A whole step; its loss."""
    model.train()
    optimizer = kind(model.parameters(), lr=1e-4, weight_decay=0.01)

    def work() -> float:
        optimizer.zero_grad()
        loss = run()
        loss.backward()
        optimizer.step()
        return loss.item()

    return work


def _bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=["forward", "train", "distill"])
    for name, value in {"tokens": 512, "batch": 1, "runs": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--size", choices=list(SIZES), default="135m")
    parser.add_argument("--layers", type=int, help="instead of the size's own")
    parser.add_argument("--vocab-size", type=int, help="instead of the size's own")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--model", type=Path, help="a Llama's Hugging Face directory; else random weights")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    a = arguments().parse_args()
    if a.side:
        be_side(a)
        return
    with tempfile.TemporaryDirectory() as name:
        a.directory = Path(name)
        print(json.dumps(measure(a)))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Make the models, start the sides, let them take turns."""
    # The model that is measured is the teacher's, unless one is distilled into a smaller one.
    roles = ("student", "teacher") if a.work == "distill" else ("teacher",)
    for role in roles:
        place = a.directory / (role if a.work == "distill" else "student")
        if a.model and role == "teacher":
            place.symlink_to(a.model.resolve())
        else:
            make_model(place, a, role)
    options = [a.work, "--tokens", str(a.tokens), "--batch", str(a.batch), *(["--bf16"] if a.bf16 else [])]
    command = [sys.executable, __file__, *options, "--directory", str(a.directory), "--side"]
    found = in_turn.compare({side: in_turn.Side([*command, side]) for side in SIDES}, a.runs)

    import torch

    from benchmarks import models
    from nemo_minitron.cpu_compat import product_choice

    tokens = a.tokens * a.batch
    rates = {f"tokens_per_s_{side}": round(tokens / found[f"wall_s_{side}"], 1) for side in SIDES}
    return {
        "device": models.device_name(),
        "threads": torch.get_num_threads(),
        "products": str(product_choice.choose()),
        "dtype": "bfloat16" if a.bf16 else "float32",
        **{name: getattr(a, name) for name in ("work", "size", "tokens", "batch")},
        "tflop": round(tflop(a), 4),
        **found,
        **rates,
    }


def tflop(a: argparse.Namespace) -> float:
    """What the products of one run take, in 10^12: forward once, backward twice that, a teacher forward only."""
    from nemo_minitron.checkpoints.families import architecture_of

    def forward_of(role: str) -> float:
        file = a.directory / role / "config.json"
        arch = architecture_of(json.loads(file.read_text()), str(file))
        return arch.flops_per_token(a.tokens) * a.tokens * a.batch / 1e12

    own = forward_of("student") * (1 if a.work == "forward" else 3)
    return own + (forward_of("teacher") if a.work == "distill" else 0)


if __name__ == "__main__":
    main()
