"""Everything that imports NeMo 2 and Lightning: models, trainer, checkpoints, callbacks, transforms, workflows."""
