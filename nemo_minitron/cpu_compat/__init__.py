"""Lets NeMo, Megatron-core and NeMo-Aligner run where there is no CUDA or no Transformer Engine.

Tried with nemo_toolkit 2.4.1, megatron-core 0.13.1, nemo-aligner 0.7.0 and torch 2.13.0. Every gap is one small named
function in this package whose docstring says what breaks and where. They are applied in layers, since importing NeMo
takes 15 s that work on Megatron alone need not pay:

* `prepare_megatron()`: torch.cuda names, megatron-core;
* `prepare_nemo()`: the above and NeMo 2;
* `prepare_aligner()`: the above, NeMo 1 and NeMo-Aligner.
"""

import functools
import importlib.util
import logging

from nemo_minitron.cpu_compat import imports
from nemo_minitron.cpu_compat.presence import cuda_was_present
from nemo_minitron.cpu_compat.product_choice import Choice

logger = logging.getLogger("nemo_minitron")
_choices: list[Choice] = []


@functools.cache
def has_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: it imports, and there is CUDA."""
    if not cuda_was_present():
        return False
    from nemo_minitron.cpu_compat import local_spec

    return local_spec.transformer_engine_imports()


@functools.cache
def prepare_megatron() -> bool:
    """Close the gaps of torch and megatron-core.

    Returns:
        True when stand-ins for CUDA are active; False on a machine with CUDA. There nothing is touched with
        Transformer Engine, and without it only the local layer spec's norm and attention.
    """
    imports.defer()
    if cuda_was_present():
        if has_transformer_engine():
            logger.info("CUDA with Transformer Engine: its layers")
            return False
        from nemo_minitron.cpu_compat import local_spec

        local_spec.close_megatrons()
        logger.info("CUDA without Transformer Engine: the local layers, with torch's norm and attention")
        return False
    from nemo_minitron.cpu_compat import cuda_names

    cuda_names.close_gaps()
    with imports.without_collections():
        from nemo_minitron.cpu_compat import local_spec, megatron

        megatron.close_gaps()
        local_spec.close_megatrons()
    logger.info("no CUDA here: CPU stand-ins are active (nemo_minitron.cpu_compat), ranks talk over gloo")
    _use_products()
    return True


def take_products(choice: Choice) -> None:
    """Let this process make its products so: at once where `prepare_megatron` has run, else when it does."""
    _choices[:] = [choice]
    if prepare_megatron.cache_info().currsize:
        _use_products()


def _use_products() -> None:
    from nemo_minitron.cpu_compat import products

    for choice in _choices:
        products.use(choice)


@functools.cache
def prepare_nemo() -> bool:
    """`prepare_megatron` and the gaps of NeMo 2. Returns as `prepare_megatron`."""
    without_cuda = prepare_megatron()
    if not without_cuda and has_transformer_engine():
        return False
    with imports.without_collections():
        from nemo_minitron.cpu_compat import local_spec, nemo2

        if without_cuda:
            nemo2.close_gaps()
        else:
            nemo2.container_version_is_asked_for()
        local_spec.steps_want_a_mask()
    return without_cuda


@functools.cache
def prepare_aligner() -> bool:
    """`prepare_nemo` and the gaps of NeMo 1 and NeMo-Aligner. Returns as `prepare_megatron`."""
    without_cuda = prepare_nemo()
    if has_transformer_engine():  # where it is, Apex is: NVIDIA's containers
        return False
    with imports.without_collections():
        from nemo_minitron.cpu_compat import aligner

        if without_cuda:
            aligner.close_gaps()
            return True
        aligner.close_transformer_engines()
        if importlib.util.find_spec("apex") is None:
            aligner.close_apexs()
    return False
