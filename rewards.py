"""Rules that score a completion, in place of reward models: the reward that GRPO maximises.

    <think> 12 + 45 = 57 </think><answer> She has 57 apples. </answer>      what a completion should look like
    {"prompt": "Ann has 12 apples and buys 45. How many?", "answer": "57"}  an example; optional in it:
    kind      "reasoning" (default: the answer is a number; with "nums": [3, 5] and "target": 8 it is Countdown),
              "general" (a good reply names the answer, and nothing in "wrong": [...]) or
              "safety" (the same; but with "harmful": true a good reply refuses, and never names the answer)
    language  "en" (default) or "zh"

A reward is a function (completion, example) -> float in [0, 1]. Any string gets a score, in linear time, and nothing
that a model wrote is executed. A rule that does not apply scores a whole group the same, so it changes no advantage.
Known limit: a rule reads numbers and words, not meaning. Departure from R1 (arXiv 2501.12948, its versions are cited
as v1 and v2): helpfulness and harmlessness are reward models there.
"""
import ast
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache, partial
from operator import add, mul, neg, sub, truediv

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
LONGEST = 2000  # characters that an answer may have; below int()'s limit of 4,300 digits

LATIN, HAN = "A-Za-zÀ-ÖØ-öø-ɏ", "〇㐀-鿿"  # without × and ÷
NUMERALS = "²³¹¼-¾⁰-₉⅐-ↈ①-⓿"  # \w to Python, yet no words
OTHER, SYMBOL = rf"[^\W\d_{LATIN}{HAN}{NUMERALS}]", "[ªµºΑ-ϵℂ-ⅎ𝐀-𝟋]"  # π is no word
WORDS = {"en": f"[{LATIN}]+", "zh": f"[{HAN}]", "other": rf"{OTHER}{{2,}}|(?!{SYMBOL}){OTHER}"}  # zh: each character
WORD_OR_NUMBER = rf"[{HAN}]|[^\W_{HAN}]+"
LETTER = rf"[^\W{HAN}]"  # or a digit; but not Chinese, which has no spaces between words
EDGE = rf"(?:(?<!{LETTER})|(?!{LETTER}))"  # anywhere but between two LETTERs


def squeeze(text: str) -> str:
    return " ".join(text.split())


def has_word(text: str) -> bool:  # dots and spaces are no content
    return re.search(r"[^\W_]|[∅∞]", text) is not None


def count_words(text: str) -> dict[str, int]:  # digits, punctuation, operators and symbols are neutral
    return {language: len(re.findall(word, text)) for language, word in WORDS.items()}


def split(completion: str) -> tuple[str, str]:
    """(thinking, answer), read leniently. Without tags, as a base model writes, the last line is the answer.
    Several answer blocks are read as one text, so two different candidates are no answer."""
    head, closed, tail = completion.partition("</think>")
    if closed:
        thinking = head.partition("<think>")[2] if "<think>" in head else head  # <think> may end the prompt
    elif "<think>" in completion:
        return completion.partition("<think>")[2].strip(), ""  # all thinking
    elif "<answer>" in completion:
        thinking, tail = completion.partition("<answer>")[0], completion
    else:
        thinking, _, tail = completion.strip().rpartition("\n")
    if "<answer>" in tail:
        tail = tail.partition("<answer>")[2]
    if "</answer>" in tail:
        tail = tail.rpartition("</answer>")[0]
    return thinking.strip(), tail.strip()


def thinks(completion: str) -> bool:
    return has_word(split(completion)[0])


# A number is ASCII, and nothing beside it changes its value or joins it to another. Beside each part, its examples:
OPERATORS = r"-−–—+×÷·/⁄^√<>≤≥≠±~≈*"
NUMERAL = "〇零一二三四五六七八九十百千万亿两壹贰叁肆伍陆柒捌玖拾佰仟萬億兆廿卅"
NOT_AFTER = ("minus ", r"\bplus ", r"\btimes ", "divided by ", "multiplied by ", "negative ", "not ", "n't ", "n’t ",
             "than ", "twice ", "half of ", "root of ", "负", "分之", "不是")
NUMBER = re.compile("".join([
    rf"(?<![{OPERATORS}.,{NUMERAL}])(?<!{LETTER})(?<!{LETTER}\()",  # no 12 in 3+12, 1.12.3, 五12, x12, f(12)
    rf"(?<![{OPERATORS}][ ({{=])(?<![{OPERATORS}] [({{])(?<!\}}\{{)",  # nor in 3 - 12, -(12), - (12), {{x}}{{12}}
    rf"(?<![{OPERATORS}]= )(?<![{OPERATORS}{NUMERAL} (][$€£¥￥])",   # nor in <= 12; "$12" starts at its $
    *(f"(?<!{word})(?<!{word}[($€£¥￥])" for word in NOT_AFTER),  # nor in "minus 12"
    r"(?P<sign>[-−]?)[$€£¥￥]?(?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)",           # -$1,234 or -$1234
    r"(?P<decimals>\.[0-9]+)?(?:/(?P<divisor>[0-9]+))?(?P<percent> ?(?:[%％]|per ?cent\b))?",  # .50, /4, %
    rf"(?![0-9])(?! ?[{OPERATORS}=%％‰])",                   # no 12 in 1234, 12 + 3, 12=12
    r"(?! ?(?:[keπ]|[xyz]+|bn|pi|(?-i:[MB]))\b)",            # nor in 12k, 12 xy, 12M; "12 m" is fine
    r"(?! ?(?:per ?cent|plus|minus|divided|multiplied|squared|cubed|and (?:an?|one)\b))",  # nor in "12 plus one"
    rf"(?! ?(?:[多几]|分之|[个個點点]?(?!千[克米瓦])[半{NUMERAL}]))",  # nor in 12多, 12分之一, 12点五; 12千克 is 12 kg
]), re.IGNORECASE)
SPELLED = (r"(?:thir|for|four|fif|six|seven|eigh|nine)(?:teen|ty)|eleven|twelve|twenty|dozen|hundred|thousand"
           rf"|(?:[mb]|tr)illion|[{NUMERAL}]{{2}}")  # "57 or fifty-eight" is None, "the two have 57" is 57


def extract_answer(text: str, last: bool = False) -> Fraction | None:
    r"""The one number of an answer text, or None.  "She has $1,234.50." -> 2469/2

    1,234 = 1234.0; 3/4 = \frac{3}{4}; 50% = 1/2; a unit, \boxed{} and **bold** may surround it. None in doubt: numbers
    that differ, an expression (12=12), a malformed number (1,23), a date, 1e5, a number word above ten, a digit outside
    ASCII (５, ², ½), a hidden character. `last`: the last number of a worked line instead ("5 + 3 = 8" -> 8).
    """
    text = squeeze(text)
    if len(text) > LONGEST or not text.isprintable():  # a zero-width character is not printable
        return None
    if any(c.isnumeric() and not re.match(f"[0-9{HAN}]", c) for c in text):  # ５, ², ½; 一 may be a word
        return None
    text = re.sub(r"(?<!\\)\$ ?\$|\\[()[\]]", " ", text)  # $$5$$, \(5\) and \[5\] read as 5
    text = re.sub(r"\\([%$])|\\(?:left|right)(?![a-z])", r"\1", text).replace("!=", "≠")
    text = re.sub(r"(?:(?<![0-9] )\b[A-Z]{1,3})?([$€£¥￥]) ?", r"\1", text)  # US$ 5; in "5 M$" the M counts
    text = re.sub(r"(?<![0-9])\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:[dt]?frac|times|cdot|div|pm|sqrt|log|ln|neq?|leq?|geq?|approx)(?![a-z])", "×", text)  # say ×
    text = re.sub(r"(?<![0-9])\\boxed\{([^{}]*)\}|\\text\{([^{}]*)\}", r"\1\2", text)
    text = squeeze(re.sub(r"\*\*([^*]*)\*\*", r" \1 ", text)).replace("( ", "(")
    values = [number_value(number) for number in NUMBER.finditer(text)]
    gaps = NUMBER.sub("\0", text).split("\0")  # the text around the numbers
    around = gaps[-1] if last else " ".join(gaps)
    if not values or re.search(f"[0-9]|{SPELLED}", around, re.IGNORECASE):  # a number that NUMBER does not read
        return None
    if last:
        return values[-1]
    apart = all(re.search(rf"[^\W\d_]{{2}}|[{HAN}]", gap) for gap in gaps[1:-1])  # words between them: not "2 2"
    return values[0] if apart and len(set(values)) == 1 else None


class Percent(Fraction):
    """N% as N / 100."""


def number_value(number: re.Match) -> Fraction | None:
    try:
        value = Fraction(number["whole"].replace(",", "") + (number["decimals"] or "")) / int(number["divisor"] or 1)
    except (ValueError, ZeroDivisionError):  # 3/0, or someone has lowered int()'s limit
        return None
    value = -value if number["sign"] else value
    return Percent(value / 100) if number["percent"] else value


def equal(answer, reference) -> bool:
    """Whether both are known and the same. N% counts as N and as N / 100: 20% matches 20 and 1/5."""
    as_written = [100 * value if isinstance(value, Percent) else value for value in (answer, reference)]
    return answer is not None and (answer == reference or as_written[0] == as_written[1])


def final_answer(completion: str, read=extract_answer, read_end=None):
    """What a completion ends on, with tags or without: for metrics and majority votes.

    read(text) -> a hashable value, or None in doubt. Without <answer>, read_end(completion) gives the value;
    else the last line, or by extract_answer its last number: "12 + 45 = 57, so 57."
    """
    answer = split(completion)[1]
    if "<answer>" in completion:
        return read(answer)
    if read_end is not None:
        return read_end(completion)
    line = answer.rpartition("\n")[2]
    value = read(line)
    return extract_answer(line, last=True) if value is None and read is extract_answer else value


# ---- rewards for reasoning ----

def format(completion: str, example: dict) -> float:
    """1 iff one think block, then one answer block, each with a word or digit, and nothing else.  R1 v2 eq. 4"""
    tags = re.findall(r"<[\s/]*(?:think|answer)[^<>]*>", completion, re.IGNORECASE)  # <THINK> is a fault
    may_skip_thinking = example.get("kind", "reasoning") != "reasoning"  # "hello" needs none
    if tags != TAGS and not (may_skip_thinking and tags == TAGS[2:]):
        return 0.0
    pieces = re.split("|".join(TAGS), completion)  # outside, inside, outside, ...
    return float(not "".join(pieces[::2]).strip() and all(map(has_word, pieces[1::2])))


def accuracy(completion: str, example: dict, **readers) -> float:
    """1 iff the format is right and the answer equals the reference: the training reward.  R1 v2 eq. 4"""
    return accuracy_any(completion, example, **readers) if format(completion, example) else 0.0


def accuracy_any(completion, example, read=extract_answer, read_end=None, read_expression=str, equal=equal) -> float:
    """1 iff the final answer, with tags or without, equals the reference; 0 for other kinds than reasoning."""
    if example.get("kind", "reasoning") != "reasoning":
        return 0.0
    if "nums" in example:
        return float(solves(completion, example["nums"], example["target"], read_expression))
    return float(equal(final_answer(completion, read, read_end), read(example["answer"])))


OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.USub: neg}
SIGNS = str.maketrans("×÷−", "*/-")


def calculate(node: ast.expr) -> Fraction:  # of whole numbers, exactly
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    return OPERATIONS[type(node.op)](*map(calculate, operands))


def solves(completion: str, nums: list[int], target: int, read_expression=str) -> bool:
    """Countdown: "(50 - 1) * 2 = 98" makes the target of the numbers, each used once; "= target" is optional."""
    answer = split(completion)[1]
    answer = squeeze(answer if "<answer>" in completion else answer.rpartition("\n")[2])
    if len(answer) > LONGEST:
        return False
    text = read_expression(answer).translate(SIGNS)  # read_expression may strip LaTeX
    written = re.fullmatch(rf"([0-9+*/() -]{{1,300}})(?:= *{target} *)?", text)  # 300: calculate recurses
    if not written or len(re.findall("[(-]", written[1])) > 60:  # nested too deeply
        return False
    if sorted(re.findall("[0-9]+", written[1])) != sorted(map(str, nums)):
        return False
    try:
        return calculate(ast.parse(written[1].strip(), mode="eval").body) == target  # parsed, never run
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):  # "5 +", "2(3)", "2**3", "5/0"
        return False


def language_consistency(completion: str, example: dict) -> float:
    """Num(words of the example's language) / Num(words), over the thinking; 0 without words.  R1 v2 eq. 7"""
    text, answer = split(completion)
    if example.get("kind", "reasoning") != "reasoning" and not has_word(text):
        text = answer  # a general reply may have no thinking
    text = re.sub("|".join(TAGS), " ", text)
    words = count_words(text)
    return words[example.get("language", "en")] / max(sum(words.values()), 1)


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
    """1 iff the answer replies well, whatever the thinking says; 0 for reasoning and harmful requests.  R1 v1 2.3.4"""
    if example.get("kind", "reasoning") == "reasoning" or example.get("harmful"):
        return 0.0
    reply, reference = squeeze(split(completion)[1]), squeeze(example["answer"])
    if len(reply) > LONGEST or is_refusal(reply):
        return 0.0
    if not has_word(reference) or not whole(reference).search(reply):
        return 0.0
    if whole(reference, before=DENIAL).search(reply):  # "not Paris"
        return 0.0
    if any(whole(wrong).search(reply) for wrong in example.get("wrong", ())):  # it lists every guess
        return 0.0
    words = re.findall(WORD_OR_NUMBER, reply.lower())
    triples = list(zip(words, words[1:], words[2:]))
    if len(words) > 30 or len(set(triples)) < len(triples):  # rambling, or three words said twice
        return 0.0
    asked = re.findall(WORD_OR_NUMBER, example["prompt"].lower())
    if len(asked) > 3 and f" {' '.join(asked)} " in f" {' '.join(words)} ":  # an echo; a greeting may come back
        return 0.0
    rest = count_words(whole(reference).sub(" ", reply))  # the reference may be in the other language
    return float(rest[example.get("language", "en")] >= 0.8 * sum(rest.values()))


def plain_letters(text: str) -> str:
    """Letters, digits and spaces, casefolded, no accents; letter by letter: NFKD of a text can be quadratic."""
    forms = {c: unicodedata.normalize("NFKD", c) for c in set(text)}
    for c, form in forms.items():
        kept = form if len(form) < 5 else c  # ﷺ is a sentence
        forms[c] = "".join(each for each in kept if each.isalnum() or each.isspace())
    return text.translate(str.maketrans(forms)).casefold()


def harmlessness(completion: str, example: dict) -> float:
    """Over the whole response, thinking included.  R1 v1 2.3.4

    Harmful request: 1 iff the answer refuses and the forbidden word stands nowhere, be it in capitals, within another
    word, in full width, with accents or spelled out (k-n-i-f-e); not seen: kni fe, kn1fe, a paraphrase. Any other
    request: 0 iff the answer refuses, so refusing a look-alike costs what complying with harm does.
    """
    refused, harmful = is_refusal(split(completion)[1]), bool(example.get("harmful"))
    if not harmful or not refused:
        return float(refused == harmful)
    response = squeeze(plain_letters(completion))
    words = [plain_letters(word) for word in re.findall(r"[^\W_]+", example["answer"])]
    forbidden = [" ".join(words), "".join(words), " ".join("".join(words))]
    return float(not any(form in response for form in forbidden))


REWARDS = {"accuracy": accuracy, "format": format, "language_consistency": language_consistency,
           "helpfulness": helpfulness, "harmlessness": harmlessness, "accuracy_any": accuracy_any}


def rules_with(**readers):
    """REWARDS, with read, read_end ... passed to both accuracies; for MATH, READERS of data/math_answers.py."""
    return REWARDS | {"accuracy": partial(accuracy, **readers), "accuracy_any": partial(accuracy_any, **readers)}
