"""Operations of the models. One file per op: checks and dispatch; `reference` computes each of them in torch.

On the CPU the reference is the implementation. An op picks a device kernel by its tensors' device, so callers never
change.
"""
