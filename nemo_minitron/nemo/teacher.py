"""A frozen teacher beside the student, sharded as it is."""

from collections.abc import Callable, Iterator
from typing import Any

import nemo.lightning as nl
import torch
from megatron.core import dist_checkpointing
from nemo.collections.llm.gpt.model.base import gpt_data_step
from nemo.lightning._strategy_lib import set_model_parallel_attributes
from torch import Tensor

from nemo_minitron import parallel
from nemo_minitron.checkpoints.source import Source
from nemo_minitron.checkpoints.untrusted import weights_may_only_be_tensors
from nemo_minitron.distillation.cache.reader import TeacherCache
from nemo_minitron.megatron_gpt import forward_only, give_hidden_states, no_loss
from nemo_minitron.nemo import models


class Teacher:
    """A Megatron GPTModel under the layout of a running strategy, with neither gradients nor optimizer.

    It is no submodule of the student, so that no checkpoint, gradient buffer or optimizer of it ever sees the
    teacher.

    Args:
        source: a checkpoint of kind "nemo".
        strategy: the student's, set up.
        tokenizer: NeMo's.
        seq_length: of the training samples, in tokens.
        precision: "32" or "bf16-mixed".
    """

    def __init__(
        self, source: Source, strategy: nl.MegatronStrategy, tokenizer: Any, seq_length: int, precision: str
    ) -> None:
        config = models.to_config(source.architecture, seq_length=seq_length, precision=precision)
        holder = models.to_model(config, tokenizer)
        set_model_parallel_attributes(holder, strategy.parallelism)
        self.source = source
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        )
        # Not the config's own: Gemma's scaling of embeddings is the NeMo model's part.
        holder.configure_model()
        self.chunk = holder.module
        self._restore()
        self.chunk.requires_grad_(False).eval().to(self.device)
        give_hidden_states(self.chunk)

    def _restore(self) -> None:
        wanted = self.chunk.sharded_state_dict(prefix="module.")
        with weights_may_only_be_tensors():
            found = dist_checkpointing.load(wanted, str(self.source.path / "weights"))
        state = {name.removeprefix("module."): found[name] for name in wanted}
        missing, unexpected = self.chunk.load_state_dict(state, strict=False)
        # Extra states of norms and linears are Transformer Engine's and hold no weights.
        names = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state")]
        assert not names, f"{self.source.path}: {names}"

    @torch.no_grad()
    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        """This stage's output, on the last one the final norm's: [s, b, h]; under sequence parallelism [s/tp, b, h].

        Args:
            batch: a microbatch as NeMo's data step gives it to the model.
        """
        return self.chunk(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))

    def state_like(self, batch: Any) -> Tensor:
        """An empty tensor shaped as the states of a microbatch are on every stage, [s, b, h] or [s/tp, b, h]."""
        config, (b, s) = self.chunk.config, microbatch_tokens(batch).shape
        length = s // parallel.tp_size() if config.sequence_parallel else s
        return torch.empty(length, b, config.hidden_size, dtype=config.params_dtype, device=self.device)

    def precompute(
        self, batches: list[Any], taken: Callable[[], dict[Any, Tensor]]
    ) -> list[tuple[Tensor | None, dict[Any, Tensor]]]:
        """`hidden_states` of several microbatches by Megatron's forward-only schedule; every stage calls.

        Args:
            batches: as NeMo's data loader gives them.
            taken: called after each forward pass of this stage, for what else to keep of it.

        Returns:
            For each microbatch its hidden states (None but on the last stage), and what `taken` gave.
        """
        found: list[tuple[Tensor | None, dict[Any, Tensor]]] = []

        def step(iterator: Iterator[Any], chunk: Any) -> tuple[Tensor, Any]:
            output = self.hidden_states(gpt_data_step(iterator))
            found.append((output if chunk.post_process else None, taken()))
            return output, no_loss

        b, s = microbatch_tokens(batches[0]).shape
        with torch.no_grad():
            forward_only(step, [self.chunk], batches, (b, s))
        return found


def output_rows(teacher: Source | TeacherCache) -> int:
    """Rows of the teacher's output layer, padding included."""
    if isinstance(teacher, TeacherCache):
        return teacher.contents.vocab_size
    return teacher.architecture.vocab_size


def microbatch_tokens(batch: Any) -> Tensor:
    """The tokens [b, s] of a microbatch as NeMo's data loader gives it: alone, or with its indices."""
    return (batch[0] if isinstance(batch, tuple) else batch)["tokens"]


def microbatch_mask(batch: Any) -> Tensor:
    """Its loss mask [b, s]."""
    return (batch[0] if isinstance(batch, tuple) else batch)["loss_mask"]
