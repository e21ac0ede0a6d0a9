"""PVD: a radiance field of any kind distilled into one of any other, block by block, at shared samples, without images.

    s < feature_until:  w_f(s) d(F_s, F_t)                                   F = [clip(l), geo], l = log-density
    s < points_until:   ... + w_l d(clip(l_s), clip(l_t)) + w_c d(c_s, c_t)   c = colour of a sample
    then:               ... + w_p d(C_s, C_t) + regularisers                  C = composited pixel

Rays come from virtual poses and are marched once, in the teacher's occupancy grid, which the student takes over with
every tensor that matches in name and shape. The feature's weight decays: w_f(s) = w_f decay^s, a warm start.
"""

from distill_core.methods.radiance._volume_distillation import VolumeDistillation


class PVD(VolumeDistillation):
    """All that it shares with PVD-AL, and no more."""

    paper = "Fang et al. 2023, One is All: Progressive Volume Distillation, arXiv 2211.15977"
