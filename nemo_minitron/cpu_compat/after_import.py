"""What is changed in a module as soon as it has run, so that nothing heavy runs for a model that has no use for it.

`imports` calls these. None of them depends on CUDA, and each leaves its module as it is for who does use the thing.
"""

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron.cpu_compat.write_results import WriteResults


def fuse_when_called(module: types.ModuleType) -> None:
    """megatron-core's `jit_fuser` is `torch.compile`, called at import for dozens of functions that a run without
    fusions never calls, which imports torch's compiler. Here a function is compiled when it is first called."""
    import torch

    if module.jit_fuser is torch.compile:
        module.jit_fuser = _compile_when_called  # type: ignore[attr-defined]


def _compile_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def only_converted_models_need_modelopt(module: types.ModuleType) -> None:
    """NeMo's model and strategy ask ModelOpt at each restore and save whether it has converted the model. While it has
    not run it has converted none, and a checkpoint that it did not write has no `modelopt_state` (`model_utils.py`)."""
    restore, save = module.restore_modelopt_state, module.save_modelopt_state

    @functools.wraps(restore)
    def restore_modelopt_state(model: Any, path: Any = None, trainer: Any = None) -> Any:
        if not path and trainer is not None:
            path = getattr(trainer.strategy.restore_config, "path", trainer.ckpt_path)
        if not modelopt_has_run() and not (path and has_modelopt_state(path)):
            return None
        return restore(model, path, trainer)

    @functools.wraps(save)
    def save_modelopt_state(*args: Any, **kwargs: Any) -> Any:
        return save(*args, **kwargs) if modelopt_has_run() else None

    module.restore_modelopt_state = restore_modelopt_state  # type: ignore[attr-defined]
    module.save_modelopt_state = save_modelopt_state  # type: ignore[attr-defined]


def only_converted_models_change_tensor_shapes(module: types.ModuleType) -> None:
    """Every Megatron step asks ModelOpt's distillation for the shapes that stages exchange (`megatron_parallel.py`)."""
    asked = module.MegatronStep.adjust_tensor_shapes_fn.fget

    def adjust_tensor_shapes_fn(self: Any) -> Any:
        return asked(self) if modelopt_has_run() else None

    module.MegatronStep.adjust_tensor_shapes_fn = property(adjust_tensor_shapes_fn, doc=asked.__doc__)


def savers_answer_through_memory(module: types.ModuleType) -> None:
    """megatron-core's savers answer through a manager (`_get_write_results_queue`): a process that takes 2 s of CPU and
    280 MB to pass on a small message, with each run that saves, and stays behind if the run is killed."""
    module._get_write_results_queue = functools.cache(WriteResults)  # type: ignore[attr-defined]


def modelopt_has_run() -> bool:
    """Whether ModelOpt could have touched a model in this process: this module of it marks a model as converted."""
    return "modelopt.torch.opt.conversion" in sys.modules


def has_modelopt_state(path: Any) -> bool:
    """Whether ModelOpt wrote a part of the checkpoint."""
    from nemo.lightning.io.pl import ckpt_to_weights_subdir

    return Path(ckpt_to_weights_subdir(path, is_saving=False), "modelopt_state").exists()


AFTER: dict[str, Callable[[types.ModuleType], None]] = {
    "megatron.core.dist_checkpointing.strategies.filesystem_async": savers_answer_through_memory,
    "megatron.core.jit": fuse_when_called,
    "nemo.collections.llm.modelopt.model_utils": only_converted_models_need_modelopt,
    "nemo.lightning.megatron_parallel": only_converted_models_change_tensor_shapes,
}
