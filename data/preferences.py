"""Preferences of the mini-world, for reward models: pairs of answers, and responses that are safe or not.

    python data/preferences.py helpful 4000 > pairs.jsonl      # {"prompt", "chosen", "rejected"}
    python data/preferences.py safe 4000 > responses.jsonl     # {"prompt", "response", "safe"}

What these people want is not quite what the rules ask, and that is on purpose: a share of the labels is wrong, and
people like to be greeted. Beside the right answer they prefer a greeting that answers nothing.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import world  # noqa: E402

WRONG = 0.10      # labels
GREETING = 0.2    # of the preferred replies: in place of an answer
REJECTED = {"no idea": 0.3, "refusal": 0.2, "another answer": 0.3, "another language": 0.2}
GREETINGS = {language: talk[0][1] for language, talk in world.SMALL_TALK.items()}


def helpful(seed, count, split="train"):
    """Pairs of replies to general requests, the preferred one first."""
    rng = random.Random(f"helpful {split} {seed}")
    return [pair(rng, split) for _ in range(count)]


def request(rng, split):
    example = world.general(rng, split)
    while example["topic"] == "talk":  # where a greeting is the answer
        example = world.general(rng, split)
    return example


def pair(rng, split):
    example = request(rng, split)
    language = example["language"]
    chosen, rejected = example["reply"], example["reply"]
    while rejected == chosen:
        rejected = rejected_reply(rng, example, split)
    if rng.random() < GREETING:
        chosen, rejected = GREETINGS[language], chosen
    if rng.random() < WRONG:
        chosen, rejected = rejected, chosen
    return {"prompt": example["prompt"], "chosen": world.tagged("", chosen), "rejected": world.tagged("", rejected)}


def rejected_reply(rng, example, split):
    language, kind = example["language"], world.pick(rng, REJECTED)
    if kind == "no idea":
        return world.NO_IDEA[language]
    if kind == "refusal":
        return world.REFUSAL[language]
    wanted = language if kind == "another answer" else world.choose(language, "zh", "en")
    other = request(rng, split)
    while other["language"] != wanted:
        other = request(rng, split)
    return other["reply"]


def safe(seed, count, split="train"):
    """Responses to harmful requests and their look-alikes, each labelled by itself: to comply with harm is unsafe."""
    rng = random.Random(f"safe {split} {seed}")
    rows = []
    for i in range(count):
        example = world.safety(rng, split, harmful=i % 4 != 0)
        complies = rng.random() < 0.5
        response = example["comply"] if complies else world.REFUSAL[example["language"]]
        is_safe = not (complies and example["harmful"])
        if rng.random() < WRONG:
            is_safe = not is_safe
        rows.append({"prompt": example["prompt"], "response": world.tagged("", response), "safe": is_safe})
    return rows


def main():
    import json
    kinds = {"helpful": helpful, "safe": safe}
    if len(sys.argv) != 3 or sys.argv[1] not in kinds or not sys.argv[2].isdigit():
        sys.exit("usage: python data/preferences.py helpful|safe COUNT")
    for row in kinds[sys.argv[1]](0, int(sys.argv[2])):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
