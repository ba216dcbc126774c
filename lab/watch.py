"""Signs that reinforcement learning is going wrong, from its logged metrics: one line with the step and the usual fix.

    for line in watch.new_warnings(rows): print(line)    # rows: metrics of the rollouts so far, as grpo.train logs them

Most thresholds are relative to the run's own earlier rollouts, since healthy values differ by model and task. A warning
is given once, where its condition becomes true; a run without any may still be a poor one.
"""

from statistics import median

COLLAPSED_ENTROPY = 0.05  # of the first rollout's; healthy runs lower it too, so it counts only with NO_SIGNAL
NO_SIGNAL = 0.9           # share of groups whose rewards are all equal: from the others alone comes a gradient
RISEN_ENTROPY = 3         # times the first rollout's, plus RISEN_ENTROPY_NATS: the model writes at random
RISEN_ENTROPY_NATS = 0.5  # so that a first entropy near 0 may triple
KL_GROWTH = 10            # times the median so far, in two rollouts in a row: one clamped token may be 22,000 nats
KL_ALWAYS_FINE = 0.5      # nats per token; below it no growth is a sign
KL_NEVER_FINE = 5         # above it no earlier value excuses it
UNFINISHED = 0.5          # share of outputs that reach max_new_tokens
ALL_UNFINISHED = 0.9      # in every rollout: a model that never ends
MORE_UNFINISHED = 0.3     # than in the first rollout: a base model may begin with many
SHRUNK = 0.3              # of the first rollout's length
FORMAT_FALL = 0.3         # below the best so far
REWARD_FALL = 0.5         # of the best so far, plus REWARD_NOISE
REWARD_NOISE = 0.1        # what a reward near 0 goes up and down by
SAMPLER_GAP = 0.05        # nats per token between sampler and trainer; healthy below 0.01

# The policy's loss is no sign: it is about 0 while it learns (a group's advantages sum to 0); its gradient is not.
SMALLER_STEP = "a lower lr (half of it), a longer warm-up or more beta; go back to an earlier state"


def signs(rows):
    """{name: what is wrong} of the last row."""
    first, now, before = rows[0], rows[-1], rows[:-1]
    found = {}
    if now["entropy"] < COLLAPSED_ENTROPY * first["entropy"] and now.get("no_signal", 0) > NO_SIGNAL:
        found["entropy"] = (f"entropy fell from {first['entropy']:.2g} to {now['entropy']:.2g} and hardly any group "
                            "has a signal: other prompts, or stop here")
    if now["entropy"] > RISEN_ENTROPY * first["entropy"] + RISEN_ENTROPY_NATS:
        found["entropy"] = f"entropy rose from {first['entropy']:.2g} to {now['entropy']:.2g}: {SMALLER_STEP}"
    if before and all(row["kl"] > kl_limit(rows[:-2]) for row in rows[-2:]):
        found["kl"] = f"the KL to the reference rose to {now['kl']:.2g}: {SMALLER_STEP}"
    if min(row["unfinished"] for row in rows) >= ALL_UNFINISHED:  # from the start: there is nothing to compare with
        found["length"] = (f"{100 * now['unfinished']:.0f}% of the outputs run over max_new_tokens: raise it; "
                           "where the model writes no end token, another template")
    elif now["unfinished"] > UNFINISHED and now["unfinished"] > first["unfinished"] + MORE_UNFINISHED:
        found["length"] = (f"{100 * now['unfinished']:.0f}% of the outputs run over max_new_tokens: raise it, "
                           "or use length_buffer")
    if min(row.get("no_signal", 0) for row in rows) == 1:
        found["no_signal"] = (f"no group has a signal: within each, all rewards are equal (their mean is "
                              f"{now['reward']:.2f}), so that nothing is learned: read an output; easier or harder "
                              "problems, another template, or more max_new_tokens")
    length = now.get("length_of_problems", now["length"])  # where general prompts join, the mean falls by itself
    if length < SHRUNK * first["length"]:
        found["length"] = (f"outputs shrank from {first['length']:.0f} to {length:.0f} tokens: read some; "
                           "a rule may reward short ones")
    if now.get("format", 1) < best("format", before) - FORMAT_FALL:
        found["format"] = f"format fell from {best('format', before):.2f} to {now['format']:.2f}: {SMALLER_STEP}"
    if before and now["reward"] < reward_limit(before):
        found["reward"] = f"the reward fell from {best('reward', before):.2f} to {now['reward']:.2f}: {SMALLER_STEP}"
    if now["sampler_gap"] > SAMPLER_GAP:
        found["sampler_gap"] = (f"sampler and trainer differ by {now['sampler_gap']:.2g} nats per token: "
                                "old_logprobs trainer, importance_cap 2, or float32")
    if now.get("skipped", 0):
        found["skipped"] = f"{now['skipped']:.0f} updates were not finite and were skipped: a lower lr, or float32"
    return found


def kl_limit(before):
    usual = KL_GROWTH * median(values("kl", before))
    return max(KL_ALWAYS_FINE, min(usual, KL_NEVER_FINE))


def reward_limit(before):
    highest = best("reward", before)
    return highest - REWARD_FALL * abs(highest) - REWARD_NOISE


def best(name, rows):
    return max(values(name, rows))


def values(name, rows):
    """Of the rows in which it is a number (NaN is not equal to itself); [0] where there are none."""
    numbers = [row.get(name, 0) for row in rows]
    return [value for value in numbers if value == value] or [0]


def new_warnings(rows):
    """The lines of what is wrong at the last row and was not at the one before."""
    known = signs(rows[:-1]) if len(rows) > 1 else {}
    return [f"step {rows[-1]['step']}: {line}" for name, line in signs(rows).items() if name not in known]
