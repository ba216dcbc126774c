"""What can be said of the mini-world's searches: how far rules get without one, and how a text searches.

    python -m data.search       # the rates of the best rules on validation problems, by level

A search gives two lists of prices and a sum: 9 4 17, 16 12 3, 21. One price of each list, 9 and 12, make the sum; the
answer is their difference, 3. Whoever knows one of the two knows the answer: |2 * 9 - 21|. So a rule picks a price by
its place, its size or by chance, without a look at pairs. Its rate is what a model must exceed before one can say that
it searches.
"""

import re
from collections import Counter, defaultdict

from data.world import HARD_LEVELS, LEVELS, parse_search, problems, translate

# ------------------------------------------------------------------------------------------- rules without search


def best_rule_scores(examples):
    """For each search, the chance that the best rule of its level answers it.

    It is chosen on training problems, so not on those that it is measured on.
    """
    best = {}
    for level in sorted({example["level"] for example in examples}):
        training = searches(problems(0, "train", 2000, (level,)))
        best[level] = next(iter(rule_rates(training)))
    usual = usual_answers()
    return [scores_of(example, usual)[best[example["level"]]] for example in examples]


def rule_rates(examples):
    """{rule: the share of these searches that it answers}, the best first."""
    usual = usual_answers()
    scores = [scores_of(example, usual) for example in examples]
    rates = {rule: sum(row[rule] for row in scores) / len(scores) for rule in scores[0]}
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def scores_of(example, usual):
    """{rule: the chance that it answers this search}."""
    guesses = guesses_of(example["problem"])
    total = parse_search(example["problem"])[2]
    guesses["the most frequent answer of this sum"] = [usual[total]]
    return {rule: answers.count(int(example["answer"])) / len(answers) for rule, answers in guesses.items()}


def guesses_of(canonical):
    """{rule: its answers, each equally likely}."""
    first, second, total = parse_search(canonical)
    shorter, longer = sorted([first, second], key=len)
    guesses = {"any pair": [abs(a - b) for a in first for b in second]}
    for name, prices, others in [("the first list", first, second), ("the second list", second, first),
                                 ("the shorter list", shorter, longer), ("the longer list", longer, shorter)]:
        picks = picks_by_size_and_place(prices, total)
        picks["a price whose partner is in the other's range"] = in_range(prices, others, total)
        for how, picked in picks.items():
            guesses[f"{how}, of {name}"] = [abs(2 * price - total) for price in picked]
    for how, picked in picks_by_size_and_place(first + second, total).items():
        guesses[f"{how}, of all"] = [abs(2 * price - total) for price in picked]
    return guesses


def chance_of_a_random_pair(example):
    """That the difference of any price of one list and any of the other is the answer."""
    first, second, _ = parse_search(example["problem"])
    answers = [abs(a - b) for a in first for b in second]
    return answers.count(int(example["answer"])) / len(answers)


def picks_by_size_and_place(prices, total):
    def distance_from_half(price):
        return abs(2 * price - total)

    picks = {"any price": prices, "the price nearest to half of the sum": [min(prices, key=distance_from_half)],
             "the price farthest from half of the sum": [max(prices, key=distance_from_half)]}
    ordered = sorted(prices)
    for k in range(3):
        picks[f"price {k + 1}"] = [prices[k]]
        picks[f"price {k + 1} by size"] = [ordered[k]]
        picks[f"price {k + 1} by size from above"] = [ordered[-1 - k]]
    return picks


def in_range(prices, others, total):
    """The prices whose partner lies between the smallest and the largest of the other list: half of a search."""
    return [price for price in prices if min(others) <= total - price <= max(others)]


def usual_answers():
    """{sum: its most frequent answer in training}."""
    counts = defaultdict(Counter)
    for example in searches(problems(0, "train", 3000)):
        counts[parse_search(example["problem"])[2]][example["answer"]] += 1
    return {total: int(answers.most_common(1)[0][0]) for total, answers in counts.items()}


def searches(examples):
    return [example for example in examples if example.get("family") == "search"]


# ------------------------------------------------------------------------------------------- how a text searches

LOOK = re.compile(r"(\d+)\+(\d+)=(\d+) (high|low|yes)\b")


def reflection(text, canonical):
    """How often a text about a search tries a pair, checks it, and returns; and how often its checks are false.

    tries: sums of two numbers. checks: those that are followed by "high", "low" or "yes". returns: how often it starts
    again. A check is false where the pair is not of the lists, the sum is wrong or the word is: false_yes claims a pair
    that does not fit, false_no is any other.
    """
    first, second, total = parse_search(canonical)
    text = translate(text, "en")
    looks = [(int(a), int(b), int(result), word) for a, b, result, word in LOOK.findall(text)]
    counts = {"tries": len(re.findall(r"\d+\+\d+=\d+", text)), "checks": len(looks),
              "returns": len(re.findall(r"\bagain\b", text)), "false_no": 0, "false_yes": 0}
    for a, b, result, word in looks:
        is_pair = a in first and b in second
        if not is_pair or result != a + b or word != word_for(a + b, total):
            counts["false_yes" if word == "yes" else "false_no"] += 1
    return counts


def word_for(result, total):
    if result == total:
        return "yes"
    return "high" if result > total else "low"


def main():
    for level in (*LEVELS, *HARD_LEVELS):
        examples = searches(problems(0, "validation", 2000, (level,)))
        rates = list(rule_rates(examples).items())[:5]
        print(f"level {level}: " + "; ".join(f"{rule} {100 * rate:.0f}%" for rule, rate in rates))


if __name__ == "__main__":
    main()
