"""Pruning as a NeMo model transform."""

from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning.pytorch.callbacks import ModelTransform
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from nemo_minitron.errors import InputError
from nemo_minitron.nemo import models
from nemo_minitron.pruning import PrunePlan, prune


def prune_model(model: Any, chunks: list[Any], plan: PrunePlan) -> None:
    """Prune a NeMo 2 GPT in place, sharded as it is, and let the context that NeMo saves carry the new sizes.

    Raises:
        InputError: the plan is for another model, or its target does not fit the layout.
    """
    prune(chunks, plan)
    fresh = models.to_config(
        plan.target,
        seq_length=model.config.seq_length,
        precision="bf16" if model.config.bf16 else "32",
    )
    # NeMo writes a checkpoint's context from the arguments that it recorded when the model was made.
    model.__io__.config = fresh.__io__


class PruneTransform(ModelTransform):
    """Makes a student of the restored model when fitting, validating or testing begins; give it to the Trainer.

    The optimizer and DDP's gradient buffers must see the pruned parameters only. So, as NeMo's PEFT does, `setup` keeps
    the strategy from making them, and they are made after pruning. A resumed run builds the student from its own
    context and needs no transform.

    Args:
        plan: the plan, or the path of a plan.json.
    """

    def __init__(self, plan: PrunePlan | str | Path) -> None:
        super().__init__()
        self.plan = plan if isinstance(plan, PrunePlan) else PrunePlan.load(plan)
        self.done = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning's hook: keep buffers and optimizer back until the model is pruned.

        Raises:
            InputError: a resumed run whose model was not built from the student's context.
        """
        if trainer.ckpt_path and not self.done:
            if (
                found := models.from_config(pl_module.config, self.plan.target.vocab_size)
            ) != self.plan.target:
                raise InputError(
                    f"{trainer.ckpt_path}: is the pruned model's; build the model from its context/, "
                    f"not with hidden_size={found.hidden_size}, ffn_hidden_size={found.ffn_hidden_size}, "
                    f"num_layers={found.num_layers}"
                )
            self.done = True
        if not self.done:
            trainer.strategy._init_model_parallel = False
            trainer.strategy._setup_optimizers = False

    def _maybe_apply_transform(self, trainer: Any) -> None:
        if not self.done:
            self.apply_transform(trainer)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook; NeMo's base class has those of training and validation."""
        self._maybe_apply_transform(trainer)

    def apply_transform(self, trainer: Any) -> None:
        """Prune, then let the strategy make what `setup` kept back."""
        module = trainer.lightning_module
        prune_model(module, list(trainer.strategy.megatron_parallel), self.plan)
        self.done = True
        trainer.strategy.init_model_parallel()
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.strategy.setup_optimizers(trainer)
            for callback in trainer.callbacks:
                if isinstance(callback, MegatronOptimizerModule):
                    callback.on_fit_start(trainer, module)
