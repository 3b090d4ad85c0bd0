"""``Distillation`` in other trainers: ``hf`` (transformers' Trainer) and ``lightning``.

Each needs its extra, pip install '.[hf]' or '.[lightning]'. A loop of your own, with Accelerate or
without, needs neither: see examples/.
"""
