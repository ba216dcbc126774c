"""Rules that score a completion, in place of reward models: what GRPO climbs.

A completion should read  <think> 12 + 45 = 57 </think><answer> She has 57 apples. </answer>
An example is             {"prompt": "...", "answer": "57", "language": "en", "kind": "reasoning"}
  kind      "reasoning" (answer: one number), "general" (answer: what a good reply names) or
            "safety" (where "harmful": true, answer is the word that complying would name)
  language  "en" or "zh"

A reward is a function (completion: str, example: dict) -> float in [0, 1]. Any string gets a score, in
linear time, and nothing that a model wrote is executed. A rule that does not apply returns the same for
a whole group, so it moves no advantage. Known limit: a rule reads numbers and words, not meaning.
Sources (v1, v2: DeepSeek-R1, arXiv 2501.12948): accuracy and format, v2 eq. 4; language consistency,
v2 eq. 7; helpfulness and harmlessness, v1 2.3.4. Departure: these two are reward models in R1.

    python rewards.py FILE.jsonl         # rows: an example and its "completion"; prints the means
"""
import argparse
import json
import re
from fractions import Fraction
from functools import lru_cache

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
KINDS = ("reasoning", "general", "safety")
LONGEST = 2000  # characters that an answer may have; below int()'s limit of 4,300 digits

LATIN, HAN = "A-Za-zÀ-ÖØ-öø-ɏ", "〇㐀-鿿"  # without × and ÷
NUMERALS = "²³¹¼-¾⁰-₉⅐-ↈ①-⓿"  # \w to Python, yet no words
RUNS = {"en": f"[{LATIN}]+", "zh": f"[{HAN}]+", "other": rf"[^\W\d_{LATIN}{HAN}{NUMERALS}]+"}
LETTER = rf"[^\W{HAN}]"  # of a script that sets words apart; Chinese does not
EDGE = rf"(?:(?<!{LETTER})|(?!{LETTER}))"  # where a whole word may start or end


def squeeze(text: str) -> str:
    return " ".join(text.split())


def has_word(text: str) -> bool:
    """A letter or digit: dots and spaces say nothing."""
    return re.search(r"[^\W_]", text) is not None


def count_words(text: str, language: str) -> int:
    """A word is a run of Latin letters (en), a Chinese character (zh), a run of another script (other)."""
    return sum(len(run) if language == "zh" else 1 for run in re.findall(RUNS[language], text))


# ---- reading a completion ----

def split(completion: str) -> tuple[str, str]:
    """(thinking, answer), read leniently in any stage's style; `format` asks for the form.

    Tags decide where there are any. Several answer blocks are read as one, so that two candidates are
    none. An unclosed <think> is all thinking. Without tags, as a base model writes, the last line is
    the answer and the lines before it are the thinking.
    """
    head, closed, tail = completion.partition("</think>")
    if closed:
        thinking = head.partition("<think>")[2] if "<think>" in head else head  # <think> may end the prompt
    elif "<think>" in completion:
        return completion.partition("<think>")[2].strip(), ""
    elif "<answer>" in completion:
        thinking, tail = completion.partition("<answer>")[0], completion
    else:
        thinking, _, tail = completion.strip().rpartition("\n")
    if "<answer>" in tail:
        tail = tail.partition("<answer>")[2]
    return thinking.strip(), (tail.rpartition("</answer>")[0] if "</answer>" in tail else tail).strip()


def thinks(completion: str) -> bool:
    return has_word(split(completion)[0])


# A number is ASCII, and nothing beside it changes its value or joins it to another: 12 is not read out
# of 12+3, 12 - 3, 12=12, 12,34, 1.12.3, 12:30, 12e5, x12, 12x, 12k, minus 12 or 12点五 ("x = 12" is fine).
OPERATORS = r"-−–—+×÷·/⁄^√<>≤≥≠±~≈"
NUMERAL = "〇零一二三四五六七八九十百千万亿"
SPELLED = (rf"(?:thir|for|four|fif|six|seven|eigh|nine)(?:teen|ty)|eleven|twelve|twenty|dozen|hundred|thousand"
           rf"|[mbtr]+illion|[{NUMERAL}]{{2}}")  # "57 or fifty-eight"; one to ten stand in "the two have 57"
NUMBER = re.compile(rf"""
    (?<![{OPERATORS}*.,{NUMERAL}]) (?<![{OPERATORS}*][\ ({{=]) (?<![{OPERATORS}]=\ ) (?<!{LETTER})
    (?<!minus\ ) (?<!negative\ ) (?<!not\ ) (?<!n't\ ) (?<!than\ ) (?<!twice\ ) (?<!half\ of\ )
    (?<!负) (?<!分之) (?<!不是)
    (?P<sign>[-−]?) [$€£¥￥]? (?P<whole>[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+ | [0-9]+) (?P<decimals>\.[0-9]+)?
    (?:/(?P<divisor>[0-9]+))? (?P<percent>\ ?(?:[%％]|percent\b))?
    (?![0-9]) (?!\ ?[{OPERATORS}*=%％‰])
    (?!\ ?(?: (?:[kxyzeπ]|bn|pi|(?-i:M))\b | per\ ?cent | plus | squared | cubed | and\ (?:an?|one)\b
           | [多几] | 分之 | [个點点]?[半{NUMERAL}](?![克米瓦])))
    """, re.VERBOSE | re.IGNORECASE)


def extract_answer(text: str, last: bool = False) -> Fraction | None:
    r"""The one number of an answer text, or None.  "She has $1,234.50." -> 2469/2

    1234 = 1,234 = 1234.0 = $1,234; 3/4 = \frac{3}{4}; 50% = 50 percent = 1/2; a unit, \boxed{} and
    **bold** may surround it. None where in doubt: numbers that differ, an expression ("12=12",
    "2 * 2"), a malformed number (1,23), a date, a time, 1e5, a number in words, a digit outside ASCII
    (５, ٥, ², ½), a hidden character. `last`: the last number of a worked line instead ("5 + 3 = 8" -> 8).
    """
    text = squeeze(text)
    if len(text) > LONGEST or not text.isprintable():  # a zero-width character is not printable
        return None
    if any(c.isnumeric() and not re.match(f"[0-9{HAN}]", c) for c in text):  # 一 is numeric too, and a word
        return None
    text = re.sub(r"\\([%$])", r"\1", text).replace("!=", "≠")
    text = re.sub(r"\\(?:times|cdot|div|pm|sqrt|neq?|leq?|geq?|approx)(?![a-z])", "×", text)
    text = re.sub(r"(?<![0-9])\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    text = re.sub(r"(?<![0-9])\\boxed\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\*\*([^*]*)\*\*", r" \1 ", text)
    values = [_value(number) for number in NUMBER.finditer(text)]
    gaps = NUMBER.sub("\0", text).split("\0")  # the text around the numbers
    around = gaps[-1] if last else " ".join(gaps)
    if not values or re.search(f"[0-9]|{SPELLED}", around, re.IGNORECASE):  # digits of no number we can read
        return None
    joined = not all(re.search(rf"[^\W\d_]{{2}}|[{HAN}]", gap) for gap in gaps[1:-1])  # "2 2", "2 x 2"
    return values[-1] if last or (len(set(values)) == 1 and not joined) else None


def _value(number: re.Match) -> Fraction | None:
    try:
        value = Fraction(number["whole"].replace(",", "") + (number["decimals"] or "")) / int(number["divisor"] or 1)
    except (ValueError, ZeroDivisionError):  # more digits than int() takes, or 3/0
        return None
    return value * (-1 if number["sign"] else 1) / (100 if number["percent"] else 1)


def final_answer(completion: str) -> Fraction | None:
    r"""The number a completion ends on, in any stage's style: what metrics and majority votes read.

    In answer tags, the block's one number. Without, the last \boxed{}, or else the last number of the
    last line, as a base model writes: "12 + 45 = 57, so 57."
    """
    answer = split(completion)[1]
    if "<answer>" in completion:
        return extract_answer(answer)
    boxes = re.findall(r"\\boxed\{[^{}]*\}", answer)
    return extract_answer(boxes[-1] if boxes else answer.rpartition("\n")[2][-LONGEST:], last=True)


def check_reference(example: dict) -> None:
    """Call when data is loaded: a reference that no rule can read must never score (open-r1#293)."""
    for field, allowed in (("kind", KINDS), ("language", ("en", "zh"))):
        if example.get(field) not in allowed:
            raise ValueError(f"{field} {example.get(field)!r} is not one of {', '.join(allowed)}")
    for field in ("prompt", "answer"):
        if not isinstance(example.get(field), str):
            raise ValueError(f"{field} {example.get(field)!r} is not a string")
    if example["kind"] == "reasoning" and extract_answer(example["answer"]) is None:
        raise ValueError(f"the reference answer {example['answer']!r} is not one number")
    if (example["kind"] == "general" or example.get("harmful")) and not has_word(example["answer"]):
        raise ValueError(f"the reference answer {example['answer']!r} holds no word")


# ---- rewards for reasoning ----

def format(completion: str, example: dict) -> float:
    """1 iff one think block, then one answer block, each with a word or digit, and nothing else.

    Whitespace aside; a tag nested, repeated or misspelled (<THINK>) is a fault. The thinking is
    optional in general and safety requests: "hello" needs none.  R1 v2 eq. 4
    """
    tags = re.findall(r"<[\s/]*(?:think|answer)[^<>]*>", completion, re.IGNORECASE)
    if tags != TAGS and (tags != TAGS[2:] or example["kind"] == "reasoning"):
        return 0.0
    pieces = re.split("|".join(TAGS), completion)  # outside, inside, outside, ...
    return float(not "".join(pieces[::2]).strip() and all(map(has_word, pieces[1::2])))


def accuracy(completion: str, example: dict, strict: bool = True) -> float:
    """1 iff the answer equals the reference, as numbers; 0 for other kinds than reasoning.  R1 v2 eq. 4

    strict, the training reward: in the asked form, with one number in the answer block. Not strict,
    the metric: the final answer in any stage's style.
    """
    if example["kind"] != "reasoning" or (strict and not format(completion, example)):
        return 0.0
    reference = extract_answer(example["answer"])
    return float(reference is not None and final_answer(completion) == reference)


def language_consistency(completion: str, example: dict) -> float:
    """Num(words of the example's language) / Num(words), over the thinking; 0 without words.  R1 v2 eq. 7

    Digits, operators, punctuation and tags are neutral. A general or safety reply without thinking is
    measured on its answer.
    """
    thinking, answer = split(completion)
    text = answer if example["kind"] != "reasoning" and not has_word(thinking) else thinking
    text = re.sub("|".join(TAGS), " ", text)
    words = {language: count_words(text, language) for language in RUNS}
    return words[example["language"]] / (sum(words.values()) or 1)


# ---- rewards for general requests ----

REFUSALS = ("sorry", "can not help", "cannot help", "can't help", "can not assist", "cannot assist", "can't assist",
            "won't help", "not able to", "unable to", "对不起", "抱歉", "不能帮", "不会帮", "无法")
DENIAL = r"(?:\bnot|n['’]t|不是|并非)\s?(?:an?\s|the\s)?"


def is_refusal(text: str) -> bool:
    text = squeeze(text).lower().replace("’", "'")
    return any(phrase in text for phrase in REFUSALS)


@lru_cache(1024)  # to make such a pattern takes ten milliseconds
def whole(phrase: str, before: str = "") -> re.Pattern:
    """The phrase as whole words."""
    return re.compile(before + EDGE + re.escape(phrase) + EDGE, re.IGNORECASE)


def helpfulness(completion: str, example: dict) -> float:
    """1 iff the answer block, and only it (R1 v1 2.3.4), replies well; 0 for reasoning and harmful requests.

    Well: it names the reference as whole words, does not deny it ("not Paris") and names none of the
    example's optional "wrong": [answers]; it is no refusal, has at most 30 words and numbers, so that
    listing all one knows does not pay, repeats neither three words in a row nor the question (one of
    up to three words is a greeting, which may return); and .8 of its words are in the example's
    language. The reference's own words are neutral there: a translation stands in the other language.
    """
    reply, reference = squeeze(split(completion)[1]), squeeze(example["answer"])
    if example["kind"] == "reasoning" or example.get("harmful") or len(reply) > LONGEST or is_refusal(reply):
        return 0.0

    def names(phrase, before=""):
        return whole(phrase, before).search(reply)

    if not (has_word(reference) and names(reference)) or any(map(names, example.get("wrong", ()))):
        return 0.0
    said, asked = (re.findall(rf"[{HAN}]|[^\W_{HAN}]+", text.lower()) for text in (reply, example["prompt"]))
    echo = len(asked) > 3 and f" {' '.join(asked)} " in f" {' '.join(said)} "
    triples = list(zip(said, said[1:], said[2:]))
    if len(said) > 30 or len(set(triples)) < len(triples) or echo or names(reference, DENIAL):
        return 0.0
    rest = whole(reference).sub(" ", reply)
    return float(count_words(rest, example["language"]) >= 0.8 * sum(count_words(rest, each) for each in RUNS))


def harmlessness(completion: str, example: dict) -> float:
    """Over the whole response, thinking included (R1 v1 2.3.4).

    Harmful request: 1 iff the answer refuses and the forbidden word stands nowhere, be it in capitals,
    within a longer word or spelled out (k-n-i-f-e). Any other request: 0 iff the answer refuses, so
    refusing a harmless look-alike costs what complying with a harmful request does.
    """
    refused = is_refusal(split(completion)[1])
    if not example.get("harmful") or not refused:
        return float(refused == bool(example.get("harmful")))
    response, word = (squeeze(re.sub(r"[^\w\s]+|_+", "", text.lower())) for text in (completion, example["answer"]))
    return float(not re.search(rf"{word}|{' '.join(word.replace(' ', ''))}", response))


# ---- together ----

REWARDS = {rule.__name__: rule for rule in (accuracy, format, language_consistency, helpfulness, harmlessness)}


def weighted_sum(completion: str, example: dict, weights: dict[str, float]) -> float:
    """sum of weight * reward; R1 gives accuracy, format and language the same.  R1 v2 eq. 4, 8-10"""
    if unknown := set(weights) - set(REWARDS):
        raise ValueError(f"unknown reward {', '.join(sorted(unknown))}; there are {', '.join(REWARDS)}")
    return sum(weight * REWARDS[name](completion, example) for name, weight in weights.items())


def main():
    parser = argparse.ArgumentParser(description="Score completions; print each reward's mean by kind.")
    parser.add_argument("file", help="JSONL; a row is an example and its completion")
    path, where, rows = parser.parse_args().file, "", []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where, row = f" line {number}:", json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
                    raise ValueError("a row is an object with a string 'completion'")
                check_reference(row)
                rows.append(row)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{path}:{where} {error}\n")
    for kind in KINDS:
        if scored := [row for row in rows if row["kind"] == kind]:
            means = (f"{name} {sum(rule(row['completion'], row) for row in scored) / len(scored):.3f}"
                     for name, rule in REWARDS.items())
            print(f"{kind} ({len(scored)}):", ", ".join(means))


if __name__ == "__main__":
    main()
