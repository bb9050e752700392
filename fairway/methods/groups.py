"""Headings of the comparison table, in order, with what the numbers under each cannot say."""

from __future__ import annotations

GROUPS = {
    "baselines": "They cannot say what a type costs on a GPU, where bfloat16 is the fast one.",
    "weight-only": "They cannot say how a larger model takes the same bits: large matrices have "
    "more weights a row, and lose less.",
    "error-correcting": "They cannot say what a longer calibration gains, and all of it was read "
    "before the scored text was opened.",
    "activations": "They cannot say how fast int8 products are elsewhere: here PyTorch multiplies "
    "them on a CPU, between roundings that no kernel fuses.",
    "fewer weights": "They cannot say what a model gains that was trained small from the start.",
    "few bits with training": "They cannot say what training from scratch at few bits gives; "
    "bench/low_bits.py compares that at equal bytes.",
    "runtimes": "They cannot say anything about a GPU, nor about batches: one sequence at a time.",
    "averaging": "They cannot say what an average is worth after a long warmdown, because this run "
    "was short.",
    "codecs": "They cannot say how codecs rank above three megabytes, where the entropy coder's "
    "tables cost less.",
    "cache": "They cannot say anything about contexts longer than those that were measured.",
    "attention kernels": "They cannot say which kernel a GPU would take.",
    "speculation": "They cannot say what a draft gains on other kinds of text, or on a model whose "
    "passes cost more than their overhead.",
}
