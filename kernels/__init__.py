"""What takes the time, a folder for each operation: loops for CPUs, Triton for GPUs, and a reference in plain torch.

`absmax` and `spectral` code keys and values, `attention_scores` says which tokens matter, and `decode_attention`
attends over the slots of many requests. Each folder's `dispatch` picks an implementation. `logits` has what all
attention does before a softmax, `body` lays out the bytes of a segment, `tiers` has the codes of tiers, `jit`
compiles the loops for CPUs. Nothing here knows of requests or of the wire.
"""
