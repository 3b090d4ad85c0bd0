"""The losses under other libraries' names, arguments, shapes and scales: change one import, keep the numbers.

    kdkernels.compat.repdistiller    its classes; ``patch()`` puts them in the place of distiller_zoo's
    kdkernels.compat.mdistiller      its functions; ``patch()`` puts them in the place of the distillers' own
    kdkernels.compat.mlld            Multi-Level-Logit-Distillation's, which is a fork of mdistiller
    kdkernels.compat.torchdistill    its mid-level losses; importing it replaces torchdistill's own in its registry
    kdkernels.compat.kd_zoo          Knowledge-Distillation-Zoo's classes
    kdkernels.compat.trl             generalized_jsd_loss
    kdkernels.compat.liger           LigerFusedLinearJSDLoss
    kdkernels.compat.torchtune       ForwardKLLoss

As in the originals: signatures, defaults, attributes, return types and shapes, scales, and the gradient of an all-zero
row of student features, which is that of its normalised row times 1 / eps = 1e12 (``kdkernels.sp_loss`` gives that row
none).

Better than the originals: float16, bfloat16 and autocast give the number of float64 (sums are kept in float32
and the loss is float32), tensors may have any strides (channels_last too), a confident student gives no NaN, and an
empty batch gives 0.

Refused: student and teacher logits of different shapes, which the originals broadcast. Missing: as in all of kdkernels,
no gradient flows to the teacher (but in ``repdistiller.Correlation``); if the teacher's tensor requires one, a
UserWarning says so.
"""
