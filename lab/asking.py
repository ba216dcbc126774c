"""What a prompt does to the completion after it: the thinking that it opens, and the room that it leaves.

A prompt may end in <think> (DeepSeek-R1-Distill, cold-start models): the model goes on within the thinking, and what it
writes has no opening tag. What the prompt opened counts as written: a completion as text begins with it, wherever it is
scored, voted on, kept as a trace or shown; and where one is learned after such a prompt, it is left out again.

A prompt of as many tokens as the model's context has leaves no room for an answer.
"""

import re

OPENED = re.compile(r"<think>\s*\Z")
# A template may also begin the thinking: "<think>\nOkay, ". Where a control token or "Assistant:" follows, or text
# stands beside the tag, it was an instruction's.
BEGUN = re.compile(r"<think>(?:\s*|\n(?:(?!</?think>|[|｜]>)[\s\S])*(?<!:)(?<!:\s))\Z")


def opened_by(template, prompt):
    """What the completion of a prompt goes on from: "<think>" and what follows it at the end of a prompt; else ""."""
    after = template.partition("{prompt}")[2]
    found = BEGUN.search(after) if after.strip() else OPENED.search(prompt + after)
    return found[0] if found else ""


def decoder(tokenizer, examples):
    """decode(ids) -> a completion of one of these examples as text, with what its prompt has opened.

    Raises ValueError where only some of the prompts open the thinking: ids do not tell which prompt they follow.
    """
    opened = [opened_by(tokenizer.template, example["prompt"]) for example in examples]
    if any(opened) and not all(opened):
        raise ValueError(f"{sum(map(bool, opened))} of {len(opened)} prompts end in <think>: it must be all or none; "
                         f"this one does not: {examples[opened.index('')]['prompt'][-100:]!r}")
    before = opened[0] if opened else ""

    def decode(ids):
        return before + tokenizer.decode(ids)

    return decode


def to_learn(row, template):
    """A row {"prompt", "completion"} for SFT, its completion without what the prompt opens."""
    opened = opened_by(template, row["prompt"])
    if not opened:
        return row
    completion = row["completion"].lstrip()
    if completion.startswith(opened):
        return {**row, "completion": completion.removeprefix(opened)}
    return {**row, "completion": completion.removeprefix("<think>").lstrip("\n")}


def same_ids(tokenizer, other):
    """Whether an id is the same token to both: only then can one model judge the tokens of another."""
    return all(tokenizer.spec.get(part) == other.spec.get(part) for part in ("model", "added_tokens"))


# ------------------------------------------------------------------------------------------- the room for an answer

def with_room(examples, encode, context, max_new_tokens, name):
    """The examples whose prompt leaves room for an answer in the context. Lines tell how many leave none, and how many
    leave room for less than max_new_tokens: their answers are cut before.

    encode(example) -> ids; name: what the lines call the examples by. Raises ValueError where none is left.
    """
    lengths = [len(encode(example)) for example in examples]
    kept = [example for example, length in zip(examples, lengths) if length < context]
    of, within = f"of {len(examples)} prompts leave", f"in the context of {context} tokens"
    if len(kept) < len(examples):
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        line = (f"{name}: {len(examples) - len(kept)} {of} no room for an answer {within}, the longest, of "
                f"{lengths[longest]}, is {examples[longest]['prompt'][:60]!r}")
        if not kept:
            raise ValueError(line)
        print(f"{line}: left out", flush=True)
    short = [context - length for length in lengths if 0 < context - length < max_new_tokens]
    if short:
        print(f"{name}: {len(short)} {of} room for less than max_new_tokens {max_new_tokens} {within}, down to "
              f"{min(short)}", flush=True)
    return kept
