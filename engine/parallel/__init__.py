"""One model on several devices: tensor parallelism as Megatron-LM has it (arXiv 1909.08053, section 3).

    rank 0   core ─ scheduler ──StepPlan──► runner ═╗ all_reduce after attention_output and down, gather of logits
                                   │                ║
    rank 1   follower ◄────────────┼──────► runner ═╣
    rank 2   follower ◄────────────┘──────► runner ═╝

Every rank runs the same runner over the same plan, with its own share of each matrix: whole heads, a part of the MLP's
inner width, a part of the vocabulary. `share` says which, `checkpoint` reads it, `layers` joins what was divided,
`leader` and `follower` are the two kinds of process. With one device none of this exists.
"""
