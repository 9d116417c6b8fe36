"""What takes the time, a folder for each operation: loops for CPUs, Triton for GPUs, and a reference in plain torch.

`absmax` and `spectral` code keys and values, `attention_scores` says which tokens matter, and `decode_attention`
attends over the slots of many requests. Each folder's `dispatch` picks an implementation. `native` and
`tier_placement` are for GPUs alone: copies of states, and tiers by the rank of scores. `logits` has what all
attention does before a softmax, `body` lays out the bytes of a segment, `tiers` has the codes of tiers, `upload`
brings small things to a GPU together, `jit` compiles the loops for CPUs. Nothing here knows of requests or of the
wire.
"""
