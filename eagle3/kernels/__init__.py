"""Kernels of the draft's step: each behind one function, with the torch twin that defines it beside it.

The function picks by the device of its tensors: Triton on a GPU, the twin everywhere else. The twins run in any
floating dtype, float64 included, which is how the whole step is checked against autograd.
"""
