"""Plug-ins and adapters of NeMo 2 and Lightning: callbacks, transforms, models, trainer, session.

Importing it lets NeMo run where CUDA, Apex or Transformer Engine is missing, before any module here imports NeMo.
"""

from nemo_minitron import cpu_compat

cpu_compat.prepare_nemo()
