"""Operations of the models. One file per op: checks and dispatch; `reference` computes each of them in torch.

On the CPU the reference is the implementation. An op picks a device kernel by its tensors' device, so callers never
change. Device kernels are Triton's and stand in modules named `*_triton`, which are imported where a GPU first needs
them: without one Triton need not be installed.
"""
