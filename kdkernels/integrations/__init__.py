"""``Distillation`` in other trainers: ``hf`` (transformers' Trainer) and ``lightning``.

Each needs its extra, pip install 'kdkernels[hf]' or 'kdkernels[lightning]'. A loop of your own, with Accelerate or
without, needs neither: see examples/.
"""
