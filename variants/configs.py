"""Named settings of grpo.GRPOConfig: what the papers publish, and which switches make which paper's method.

    GRPOConfig(**PUBLISHED["r1-zero"])                python grpo.py --config r1-zero ...
    GRPOConfig(**METHODS["dapo"], lr=1e-4)            python grpo.py --config dapo ...
"""

# R1 v2 3.2.1: eps 10, that is no lower clip and an upper one at 11. Not published: number of updates.
RL_1 = dict(lr=3e-6, beta=0.001, group_size=16, prompts_per_rollout=512, minibatches=16, temperature=1.0,
            max_new_tokens=32768, reference_every=25, clip_low=10.0, clip_high=10.0)
# What a paper does not publish keeps the default, in r1-rl2 RL-1's value. None publishes warm-up, gradient clip, top-p,
# the std's epsilon, or what happens to an output that runs over length.
PUBLISHED = {
    # DeepSeekMath 4.2: 1,024 outputs an update (16 questions x 64), one update a rollout; the reference is replaced
    # after each outer iteration. Not published: its length, clip, temperature, number of updates.
    "deepseekmath": dict(lr=1e-6, beta=0.04, group_size=64, prompts_per_rollout=16, minibatches=1, max_new_tokens=1024),
    # R1 v2 2.1, Nature methods: 8,192 outputs a rollout in 16 mini-batches, one inner epoch; 10,400 updates, the
    # reference replaced every 400. 65,536 tokens from update 8,200 on. Not published: clip.
    "r1-zero": dict(lr=3e-6, beta=0.001, group_size=16, prompts_per_rollout=512, minibatches=16, temperature=1.0,
                    max_new_tokens=32768, reference_every=25, rollouts=650),
    "r1-rl1": RL_1,
    # R1 v2 3.2.2: mostly as RL-1; 1,700 updates. Not published, so RL-1's: length, batch, period of the reference.
    "r1-rl2": RL_1 | dict(temperature=0.7, rollouts=106),
}

# Clips of 0 fix the ratio at 1: A log pi.
PLAIN = dict(detach_ratio=True, clip_low=0.0, clip_high=0.0, mean="constant", beta=0.0, scale="none")
# CISPO has no lower clip; its upper one here is ours. RLOO and REINFORCE ignore pi / pi_old, so they are exact for the
# first update of a rollout only.
METHODS = {
    "grpo": dict(beta=0.04),                                                                # DeepSeekMath eq. 3
    "dr_grpo": dict(scale="none", mean="constant", beta=0.0),                         # 2503.20783
    "dapo": dict(clip_high=0.28, mean="token", beta=0.0),                                   # 2503.14476, with SAMPLING
    "gspo": dict(sequence_ratio=True, clip_low=3e-4, clip_high=4e-4, beta=0.0),             # 2507.18071
    "cispo": dict(detach_ratio=True, clip_low=1.0, clip_high=4.0, mean="token", beta=0.0),  # 2506.13585
    "rloo": PLAIN | dict(leave_one_out=True),                                               # 2402.14740
    "reinforce": PLAIN,                                                                     # advantage: r - mean
}

# Settings of variants/dapo.py's DAPOConfig. A length_buffer adds DAPO's length penalty.
SAMPLING = {"dapo": dict(resample=3)}
