"""What tells that reinforcement learning runs away, from its logged metrics: a line with the step and what usually mends it.

    for line in watch.warnings(rows): print(line)      # rows: metrics of the rollouts so far, as grpo.train logs them

Thresholds are against the run's own rollouts before, since healthy values differ by model and task. A warning is given once, where its
condition becomes true; a run on which none is given may still be a poor one.
"""

from statistics import median

# The policy's loss is no sign: its value is about 0 while it learns (the advantages of a group sum to 0), its gradient is not.
SMALLER_STEP = "a lower lr (half of it), a longer warm-up or more beta; go back to a state from before"


def signs(rows):
    """{name: what is wrong} of the last row."""
    first, now, before = rows[0], rows[-1], rows[:-1]
    def earlier(name):
        return [value for row in before if (value := row.get(name, 0)) == value] or [0]  # NaN is not itself

    def best(name):
        return max(earlier(name))

    found = {}
    if now["entropy"] < 0.05 * first["entropy"] and now.get("no_signal", 0) > 0.9:
        found["entropy"] = f"entropy fell from {first['entropy']:.2g} to {now['entropy']:.2g} and hardly a group has a signal: other prompts, or stop here"
    if now["entropy"] > 3 * first["entropy"] + 0.5:
        found["entropy"] = f"entropy rose from {first['entropy']:.2g} to {now['entropy']:.2g}: {SMALLER_STEP}"
    if now["kl"] > max(0.5, min(10 * median(earlier("kl")), 5)):  # nats a token
        found["kl"] = f"the KL to the reference rose to {now['kl']:.2g}: {SMALLER_STEP}"
    if now["unfinished"] > 0.5 and now["unfinished"] > first["unfinished"] + 0.3:
        found["length"] = f"{100 * now['unfinished']:.0f}% of the outputs run over max_new_tokens: more of them, or length_buffer"
    if now["length"] < 0.3 * first["length"]:
        found["length"] = f"outputs shrank from {first['length']:.0f} to {now['length']:.0f} tokens: read some; a rule may reward short ones"
    if now.get("format", 1) < best("format") - 0.3:
        found["format"] = f"format fell from {best('format'):.2f} to {now['format']:.2f}: {SMALLER_STEP}"
    if before and now["reward"] < best("reward") - 0.5 * abs(best("reward")) - 0.1:
        found["reward"] = f"the reward fell from {best('reward'):.2f} to {now['reward']:.2f}: {SMALLER_STEP}"
    if now["sampler_gap"] > 0.05:
        found["sampler_gap"] = f"sampler and trainer differ by {now['sampler_gap']:.2g} a token: old_logprobs trainer, importance_cap 2, or float32"
    if now.get("skipped", 0):
        found["skipped"] = f"{now['skipped']:.0f} updates were not finite and were skipped: a lower lr, or float32"
    return found


def warnings(rows):
    """The lines of what is wrong at the last row and was not at the one before."""
    known = signs(rows[:-1]) if len(rows) > 1 else {}
    return [f"step {rows[-1]['step']}: {line}" for name, line in signs(rows).items() if name not in known]
