"""Rejection sampling, and distillation: a student trained on a teacher's verified traces.

Rejection sampling [R1 v1 2.3.3, v2 B.3.3]: many samples a prompt; the correct, one-language, readable, distinct ones
stay. They are the data of R1's second SFT (from the base again) and of the students [v2 B.4.3]:

  1. sample n completions of each prompt from the teacher
  2. drop each completion at the first filter that it fails; keep at most `keep` per prompt
  3. mix with general examples, 3 : 1 [R1: 600k : 200k]
  4. next-token training on the completions

On-policy distillation [Thinking Machines 2025]: the student learns from its own samples, by how much likelier each
token is to the teacher than to itself. It needs the teacher at each step, but no reward and no verifier.

    python distill.py --teacher DIR --student DIR --data FILE.jsonl --out DIR
    python distill.py --on-policy --teacher DIR --student DIR --data FILE.jsonl --out DIR
"""

import random
import re

FILTERS = ("correct", "one_language", "readable", "distinct", "enough")  # in this order


def repeats(text, shortest=12, longest=100, times=3):
    """Whether it loops: `shortest` to `longest` characters, `times` times in a row. 25 ms for 10,000 characters."""
    return re.search(rf"(.{{{shortest},{longest}}}?)\1{{{times - 1}}}", text, re.DOTALL) is not None


def readable(completion, longest=10_000):
    """No code block, no loop, at most `longest` characters [R1 v2 B.3.3: no long paragraphs, no code blocks]."""
    return len(completion) <= longest and "```" not in completion and not repeats(completion)


def rejection_sample(examples, texts, correct, one_language, keep=4, readable=readable):
    """Choose among the teacher's completions texts[i][j] of examples[i].

    correct, one_language: (completion, example) -> whether it passes. keep: at most this many per prompt ("enough").
    Returns rows {"prompt", "completion", ...the example's fields} and counts: how many were sampled and kept, and
    under each filter's name how many failed it: counts["correct"] were wrong.
    """
    counts = dict.fromkeys(("sampled", *FILTERS, "kept"), 0)
    rows = []
    for example, completions in zip(examples, texts):
        kept = set()
        for text in completions:
            normal = " ".join(text.split())
            if not correct(text, example):
                fate = "correct"
            elif not one_language(text, example):
                fate = "one_language"
            elif not readable(text):
                fate = "readable"
            elif normal in kept:
                fate = "distinct"
            elif len(kept) >= keep:
                fate = "enough"
            else:
                fate = "kept"
                kept.add(normal)
                rows.append({**example, "completion": text})
            counts["sampled"] += 1
            counts[fate] += 1
    return rows, counts


def explain(counts):
    """As in: sampled 6000, fell to: correct 622, ...; kept 2020."""
    fell = ", ".join(f"{name} {counts[name]}" for name in FILTERS)
    return f"sampled {counts['sampled']}, fell to: {fell}; kept {counts['kept']}"


def mix(traces, general, ratio=3, seed=0):
    """Traces and general examples, `ratio` to 1, shuffled; the general ones are repeated or cut to fit."""
    if not traces or not general:
        raise ValueError(f"{len(traces)} traces and {len(general)} general examples: there must be some of both")
    rng, wanted = random.Random(seed), round(len(traces) / ratio)
    general = rng.sample(general, len(general))  # a file may be sorted by kind
    rows = traces + (general * (wanted // len(general) + 1))[:wanted]
    return rng.sample(rows, len(rows))


def distill(student, traces, general, encode, train, ratio=3, seed=0):
    """Train `student` in place by SFT alone, as R1 does: on the mixture, or on the traces if `general` is empty.

    encode(row) -> what train takes as an example; train(model, examples) -> its result, which is returned.
    """
    rows = mix(traces, general, ratio, seed) if general else traces
    return train(student, [encode(row) for row in rows])


class OnPolicy:
    """Replaces grpo.train's group advantages by A_t = log pi_teacher - log pi_student of each sampled token.

    Its expected policy gradient is minus the gradient of KL(student || teacher) at each sampled prefix: no token is
    credited for what comes after it. Teacher and student share a tokenizer.
    logprobs_of(model, rollout) -> (B, T) of the rollout's tokens, without gradients (grpo.all_logprobs).
    """

    def __init__(self, teacher, logprobs_of):
        self.teacher, self.logprobs_of = teacher, logprobs_of

    def advantages(self, rollout):
        gap = self.logprobs_of(self.teacher, rollout) - rollout.old_logprobs
        gap = gap.masked_fill(~rollout.mask, 0)                     # (B, T); padding may hold anything
        self.reverse_kl = -(gap.sum() / rollout.mask.sum()).item()  # nats a token, at the student's prefixes
        return gap

    def learn(self, rollout, rows):
        return {"reverse_kl": self.reverse_kl}  # logged; there is no critic to train


def main():
    from lab.distill_script import run  # here, so that the rest imports without the project
    run(rejection_sample, explain, distill, OnPolicy)


if __name__ == "__main__":
    main()
