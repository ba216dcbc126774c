"""Rules that score a completion, in place of reward models: what GRPO climbs.

A completion should read  <think> 12 + 45 = 57 </think><answer> She has 57 apples. </answer>
An example is             {"prompt": "...", "answer": "57", "language": "en", "kind": "reasoning"}
  kind      "reasoning" (answer: a number or a mathematical answer, as in GSM8K and MATH; with "nums": [3, 5]
            and "target": 8 it is Countdown), "general" (answer: what a good reply names) or "safety"
            (where "harmful": true, answer is the word that complying would name)
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
import unicodedata
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import product
from math import gcd

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
NUMERAL = "〇零一二三四五六七八九十百千万亿两壹贰叁肆伍陆柒捌玖拾佰仟萬億兆廿卅"
SPELLED = (rf"(?:thir|for|four|fif|six|seven|eigh|nine)(?:teen|ty)|eleven|twelve|twenty|dozen|hundred|thousand"
           rf"|(?:[mb]|tr)illion|[{NUMERAL}]{{2}}")  # "57 or fifty-eight"; one to ten stand in "the two have 57"
NUMBER = re.compile(rf"""
    (?<![{OPERATORS}*.,{NUMERAL}]) (?<![{OPERATORS}*][\ ({{=]) (?<![{OPERATORS}]=\ ) (?<!{LETTER})
    (?<!minus\ ) (?<!negative\ ) (?<!not\ ) (?<!n't\ ) (?<!than\ ) (?<!twice\ ) (?<!half\ of\ )
    (?<!负) (?<!分之) (?<!不是)
    (?P<sign>[-−]?) [$€£¥￥]? (?P<whole>[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+ | [0-9]+) (?P<decimals>\.[0-9]+)?
    (?:/(?P<divisor>[0-9]+))? (?P<percent>\ ?(?:[%％]|percent\b))?
    (?![0-9]) (?!\ ?[{OPERATORS}*=%％‰])
    (?!\ ?(?: (?:[kxyzeπ]|bn|pi|(?-i:M))\b | per\ ?cent | plus | squared | cubed | and\ (?:an?|one)\b
           | [多几] | 分之 | [个個點点]?[半{NUMERAL}](?![克米瓦])))
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


# ---- exact numbers ----
#
# {(n, k): c} is the sum of c * sqrt(n) * pi^k, with c rational and n squarefree; n = -1 makes i.

TOKEN = re.compile(r"\\frac|[0-9]*\.[0-9]+|[0-9]+|\S")
TWO_MEANINGS = re.compile(  # 2 3, π2, \frac{3}{2}^2, √2π, 1/2π
    r"[0-9.] +[0-9.]|[)}πi] ?[0-9]|\} ?\^|√ ?[0-9.]+ ?[πi(^\\]|/ ?√?(?:[0-9.]+|[({][0-9.]+[)}]) ?[(√πi\\]")


def need(condition) -> None:
    if not condition:
        raise ValueError("no number that can be read")


def plain(a: dict) -> Fraction | None:
    """The number as a fraction; None with a root, π or i in it."""
    return a.get((1, 0), Fraction(0)) if a.keys() <= {(1, 0)} else None


def add(a: dict, b: dict) -> dict:
    total = {base: a.get(base, 0) + b.get(base, 0) for base in a | b}
    return {base: c for base, c in total.items() if c}


def multiply(a: dict, b: dict) -> dict:
    total = {}
    for ((m, j), x), ((n, k), y) in product(a.items(), b.items()):
        shared = gcd(m, n) * (-1 if m < 0 and n < 0 else 1)  # sqrt(m) sqrt(n) = shared * sqrt(mn / shared^2)
        base = m * n // shared ** 2, j + k
        total[base] = total.get(base, 0) + x * y * shared
    total = {base: c for base, c in total.items() if c}
    need(len(total) < 7 and all(abs(c.numerator) + c.denominator < 10 ** 300 for c in total.values()))
    return total


def power(a: dict, exponent: Fraction | None) -> dict:
    need(a and exponent and exponent.denominator == 1 and abs(exponent) <= (100 if len(a) == 1 else 5))
    if exponent < 0:
        need(len(a) == 1)
        a = {(n, -k): 1 / (c * n) for (n, k), c in a.items()}  # 1 / sqrt(n) = sqrt(n) / n
    result, exponent = {(1, 0): Fraction(1)}, abs(int(exponent))
    while exponent:  # by squares: 9^99 in 10 products
        result, exponent = multiply(result, a) if exponent % 2 else result, exponent // 2
        a = multiply(a, a) if exponent else a
    return result


def root(a: dict) -> dict:
    """sqrt(72) = 6 sqrt(2), sqrt(1/2) = sqrt(2) / 2, sqrt(-4) = 2i"""
    need(plain(a) and abs(plain(a).numerator * plain(a).denominator) <= 1000 ** 2)
    n, outside = squarefree(plain(a).numerator * plain(a).denominator)
    return {(n, 0): Fraction(outside, plain(a).denominator)}


@lru_cache(1024)
def squarefree(n: int) -> tuple[int, int]:
    """(m, k) with n = m k^2, m squarefree."""
    k, p = 1, 2
    while p * p <= abs(n):
        n, k, p = (n, k, p + 1) if n % (p * p) else (n // (p * p), k * p, p)
    return n, k


@lru_cache(256)  # the items of a set are often tried in several readings
def exact_value(text: str, calculation: bool = False) -> dict | None:
    r"""The exact value of a cleaned text in + - * / ^ √ π i \frac and brackets; None for anything else.

    Only a calculation may leave plain numbers to add or to multiply (2 + 3), and it writes each sign: in an answer,
    a fraction, a power and a root are but ways to write a number, and 2π is a product.
    """
    tokens = TOKEN.findall(text)[::-1]  # the next one is the last

    def read(level):  # 0: a sum, 1: a product, 2: a factor
        value = read(level + 1) if level < 2 else factor()
        while level < 2 and tokens and tokens[-1] not in ")}" and (tokens[-1] in "+-") == (level == 0):
            sign = tokens.pop() if tokens[-1] in "+-*/" else ""
            value = combine(value, sign, read(level + 1))
        return value

    def combine(a, sign, b):
        x, y = plain(a), plain(b)
        if sign and sign in "+-":
            need(calculation or (a and b and not a.keys() & b.keys()))
            return add(a, multiply(b, {(1, 0): Fraction(f"{sign}1")}))
        fraction = sign == "/" and x is not None and y is not None and x.denominator == y.denominator == 1
        need(sign if calculation else fraction or x is None or y is None)
        value = multiply(a, power(b, Fraction(-1)) if sign == "/" else b)
        need(calculation or plain(value) is None or (x is not None and y is not None))  # 12π * 45/π is a product not worked out
        return value

    def factor():
        token = tokens.pop()
        if token == "-":
            return multiply(factor(), {(1, 0): Fraction(-1)})
        if token in "({":
            value = read(0)
            need(tokens.pop() == {"(": ")", "{": "}"}[token])
        elif token == "√":
            value = root(factor())
        elif token == "\\frac":
            value = combine(factor(), "/", factor())
        elif token in "πi":
            value = {(1, 1) if token == "π" else (-1, 0): Fraction(1)}
        else:
            need(re.fullmatch("[0-9.]+", token))
            value = add({}, {(1, 0): Fraction(token)})
            if token.isdigit() and tokens and tokens[-1] == "\\frac":
                part = factor()
                need(plain(part) is None or 0 < plain(part) < 1)  # 1\frac{1}{2} is 3/2; 1\frac{3}{2} is in doubt
                value = multiply(value, part) if plain(part) is None else add(value, part)
        if tokens and tokens[-1] == "^":
            tokens.pop()
            value = power(value, plain(factor()))
        return value

    try:
        need(len(text) <= 300 and not TWO_MEANINGS.search(text) and sum(map(text.count, "({√^-")) <= 60)
        value = read(0)
        need(not tokens)
        return value
    except (ValueError, IndexError):
        return None


# ---- mathematical answers ----

SPELLINGS = [(re.compile(pattern), form) for pattern, form in (  # one spelling for each thing, in this order
    (r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\{,\}|,?\\[,!]) ?[0-9]{3})+(?![0-9])", lambda m: re.sub("[^0-9]", "", m[0])),
    (r"\\(?:left|right)(?![a-z])\.?|\\(?:[bB]igg?[lr]?|displaystyle)(?![a-z])|\\!", ""), (r"\*\*([^*]*)\*\*", r" \1 "),
    (r"(\\(?:text|mbox|mathrm) ?\{ ?(?:[A-Za-z. ]{2,}|m) ?\}) ?\^ ?(?:[23]|\{[23]\})", r"\1"),  # cm^2 is a unit
    (r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf)|boxed|fbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\^ ?(?:\\circ(?![a-z])|\{ ?\\circ ?\})|°|(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|\\?\$|(?<!\\)\\[()[\]]", " "),
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1"), (r"\\%", "%"), (r"\\[dtc]?frac(?![a-z]) ?", r"\\frac"),
    (r"\\frac([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"), (r"\\frac([0-9π])(?=\{)", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\}) ?([0-9])(?![0-9])", r"\1{\2}"), (r"^(-? ?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
    (r"\\sqrt ?([0-9])(?![0-9])", r"√{\1}"), (r"\\sqrt(?![a-z0-9 ])", "√"), (r"\\pi(?![a-z])", "π"), ("−", "-"),
    (r"\\infty(?![a-z])", "∞"), (r"\\cup(?![a-z])", "∪"), (r"\\pm(?![a-z])", "±"), (r"\\div(?![a-z])|÷", "/"),
    (r"\\(?:times|cdot)(?![a-z])|[×·]", "*"), (r"\\([lgn]e)q(?![a-z])", r"\\\1"),
    (r"(?i)^ ?(?:#+ )?(?:(?:so|thus|hence|therefore)[ ,]+)?(?:the )?(?:final )?(?:answer(?: is:?|:)(?: |$))?", ""),
    (r"\.? *$", ""))]
AZ = rf"[^\W\d_{HAN}]"  # a letter
UNIT = rf"(?:[cdkm]?m|[km]?g|m?l|s|h|lbs?|oz|in|ft|yd|mi|[ap]m|mph|hrs?|st|nd|rd|th)(?!{AZ})"
DOUBT = re.compile(rf"""  # what extract_answer does not look for beside the one number of a text
    [\\^_|√π∞∪±ⁿⁱˣʸ] | [^\s!-~\w°€£¥￥’‘“”…。，：；！？、（）−–—·×÷≤≥≠] | [0-9]\ ?! | ^[\[({{](?=.*[\])}}]$)[^,]*, | [-+*/].*=
    | [{OPERATORS}*0-9]\ +[0-9] | \.[0-9]+\ ?(?:\.\.|…)
    | [0-9](?!{UNIT}){AZ}{{1,3}}(?!{AZ}) | [0-9]{AZ}(?!{AZ}) | [0-9]\ (?!{UNIT}){AZ}{{1,2}}$
    | \b(?:about|around|over|under|above|below|up\ to)\ +[0-9]
    | \b(?:times|by|over|less|point)\ (?:one|two|three|four|five|six|seven|eight|nine|ten)\b
    | (?:不等于|并非|[大小多少高低]于|至[多少]|最[多少]|超过|不[到足]|约|根号|[点點])\ ?[0-9] | [0-9]\ ?(?:[成折又余]|以[上下]|左右) | 或
    | n['’]t\b | \b(?:not|wrong|incorrect|or|n?either|between|approx\w*|roughly|nearly|almost|least|most|minus|negative|base
    |never|false|grand|basis|pct|per\ ?mille?|mod(?:ulo)?|log|ln|sin|cos|tan|lakhs?|lacs?|crores?|tens|half|halves|halved
    |doubled?|tripled?|root|reciprocal|factorial
    |(?:third|quarter|(?:four|fif|six|seven|eigh|nin|ten)th)s?)\b""", re.VERBOSE | re.I)
INSIDE = reduce(lambda inside, _: rf"(?:[^{{}}\\]|\\.|\{{{inside}\}})*+", range(5), "(?!)")  # braces within braces
BOX = re.compile(rf"\\(?:boxed|fbox)(?![a-z])\s*(?:\{{({INSIDE})\}}|((?!\\(?:boxed|fbox))[^\s{{$]+))", re.DOTALL)


def clean(text: str) -> str:
    for pattern, form in SPELLINGS:
        text = pattern.sub(form, squeeze(text))
    return text


def number_in(text: str) -> Fraction | None:
    """`extract_answer` with more doubt."""
    number, cleaned = extract_answer(text), clean(text)
    if number is None or DOUBT.search(cleaned) or ("\\" in text and extract_answer(cleaned) != number):
        return None
    return number


def boxes(text: str) -> list[str | None]:
    r"""What stands in each \boxed{}, \fbox{} or "\boxed 5"; None where its neighbours would change a 1 in its place.

    They do in -\boxed{5}, \boxed{5}0, not \boxed{5}, \boxed{5} thousand.
    """
    matches = list(BOX.finditer(text))
    found = [None] * (len(matches) - 20)  # more than twenty are not looked at
    for box in matches[-20:]:
        before = re.search(r"[^\s=]*[^\S\n]*\Z", text[max(0, box.start() - 40):box.start()].replace("!=", "≠"))[0]
        after = re.match(r"\S*(?:[^\S\n]+[^\s\d\\]+){0,2}", text[box.end():box.end() + 40])[0]
        found.append((box[1] or box[2] or "") if number_in(f"{before}1{after}") == 1 else None)
    return found


def cut(text: str) -> list[str]:
    """The pieces between the commas that stand in no bracket; none if the brackets do not match."""
    pieces, depth = [""], 0
    for token in re.findall(r"\\?.", text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[-1], 0)
        if depth < 0:
            return []
        pieces = pieces + [""] if token == "," and not depth else pieces[:-1] + [pieces[-1] + token]
    return [] if depth else pieces


def read_value(text: str, level: int = 0):
    """A cleaned text as a number, set, tuple, interval or formula; None in doubt."""
    text = text.strip().removeprefix("+")
    bracket = re.fullmatch(r"(\(|\[|\\?\{)(.*?)(\)|\]|\\?\})", text)
    items, kind = (cut(bracket[2]), bracket[1][-1] + bracket[3][-1]) if bracket else ([], "")
    if len(items) < 2 and not (items and bracket[1] == "\\{"):
        measured = re.fullmatch(rf"(.*[0-9π}})]) ?({UNIT}|[A-Za-z. ]{{4,}})", text)
        number = measured[1] if measured and number_in("1 " + measured[2]) == 1 else text
        if (value := exact_value(number.removesuffix("%"))) is not None:
            value = {base: c / 100 for base, c in value.items()} if number.endswith("%") else value
            return ("number", frozenset(value.items())) if plain(value) is None else plain(value)
        items, kind = cut(text), "{}"
        if len(items) < 2 and "±" not in text:
            return _formula(text) if items else None
    if not bracket and re.search(f"[0-9],[0-9]{{{min(len(items), 3)}}}", text):  # 1,23
        return None
    if kind == "{}":
        items = [item.replace("±", sign) for item in items for sign in ("+-" if item.count("±") == 1 else "+")]
    values = [read_value(item, level + 1) for item in items] if level < 3 else [None]
    if None in values or kind not in ("()", "(]", "[)", "[]", "{}") or (kind == "{}" and len(set(values)) < len(values)):
        return None
    return kind, frozenset(values) if kind == "{}" else tuple(values)


def _formula(text: str) -> str | None:
    """What is equal as a string alone: x^{2} + 1 = x^2+1."""
    formula = " ".join(re.findall(r"\\[A-Za-z]+|[A-Za-z]|[0-9.]+|\S", text))
    letters = re.sub(r"\\(?:(?:begin|end)\{[pb]matrix\}|[A-Za-z]+)", r"\\", text)
    if (re.search(r"[A-Za-z] ?[0-9]|[A-Za-z]{4}|\b(?:or|and|is|not|the)\b|</?[A-Za-z]", letters)  # prose
            or not re.search(r"[A-Za-z√_^∞∪]", formula.replace("\\frac", "")) or not re.search("[^A-Za-z ]", formula)
            or not re.fullmatch("∞|[ !->@-~√π∞∪]{2,}", formula)):
        return None
    return re.sub(r"\{ (\\?\w+|\S) \}", r"\1", formula)


def read_answer(text: str):
    r"""The canonical value of an answer text, hashable, or None: two answers are equal iff their values are.

    Decided: the one number of a text, as `extract_answer` reads it; else the whole text as an exact number with
    fractions, mixed numbers, roots, π, i, powers, percent: \sqrt{8} = 2\sqrt{2}; a tuple or an interval, whose
    brackets count; a set in any order, as are "1, 2" and "1 \pm 2"; up to three words or a choice, (A) = A, in
    any case; another formula as the same string, spaces aside. "x =", units and degrees are dropped: 5 cm = 5 m.
    Boxes come first; several that differ are no answer. A fraction need not be in lowest terms: 114/2 = 57.
    Undecided, so None or a mere string: several candidates ("5 or 6"), a calculation left to do (12 + 45, 12π * 45/π), formulas
    with variables in other words, a decimal for a third, a root or π, and whatever is in doubt.
    """
    text = squeeze(text) if len(text) > LONGEST else text  # boxes look at the lines
    if len(text) > LONGEST:
        return None
    found = set(boxes(text))
    if len(found) > 1 and sum(len(content or "") for content in found) > 300:  # no one boxes so much
        return None
    if found and found != {None}:
        values = {None if content is None else read_answer(content) for content in found}
        return values.pop() if len(values) == 1 else None
    number, text = number_in(text), clean(text)
    if number is not None or len(text) > 300:  # only a sentence is that long
        return number
    if choice := re.fullmatch(r"([A-J])|\(([A-Za-z])\)", text):
        return (choice[1] or choice[2]).upper()
    named = re.fullmatch(r"[A-Za-z] ?(?:=|\\in(?![a-z])) ?([^=]*)", text)
    value = read_value(named[1]) if named else None
    value = read_value(text) if value is None or isinstance(value, str) else value
    words = re.fullmatch(rf"(?!none$|nothing$|unknown$|no (?:answer|idea)|(?:the )?(?:final )?answer$)[{LATIN}]{{2,}}(?:[ '-][{LATIN}]+){{0,2}}",
                         text.lower())
    return words[0] if value is None and words else value


def final_answer(completion: str):
    r"""What a completion ends on, in any stage's style, as `read_answer` reads it: for metrics and majority votes.

    In answer tags, the block. Without, the last \boxed{}, or else the last line: all of it, or the formula $...$ that
    ends it, or the last number, as a base model writes: "12 + 45 = 57, so 57." A Countdown expression is no vote.
    """
    answer = split(completion)[1]
    if "<answer>" in completion:
        return read_answer(answer)
    tail = answer and (completion.partition("</think>")[2] or completion)
    if (at := max(tail.rfind(r"\boxed"), tail.rfind(r"\fbox"))) >= 0:
        content = boxes(tail[max(0, at - 100):at + LONGEST])[-1:]
        return read_answer(content[0] if content and content[0] is not None else answer)
    line = squeeze(answer.rpartition("\n")[2])
    line = line if len(line) <= LONGEST else line[-LONGEST:].partition(" ")[2]  # not from within a number
    value, sentence = read_answer(line), line.rstrip(" .!")
    for opening, closing in ("$", "$"), (r"\(", r"\)"):
        if value is None and sentence.endswith(closing):
            value = read_answer(sentence.removesuffix(closing).rpartition(opening)[2])
    if value is None and not re.search(r"[\\^_|√π∞∪±]", clean(line.rpartition("=")[2])):
        value = extract_answer(line, last=True)
    return value


def check_reference(example: dict) -> None:
    """Call when data is loaded: a reference that no rule can read must never score (open-r1#293)."""
    for field, allowed in (("kind", KINDS), ("language", ("en", "zh"))):
        if example.get(field) not in allowed:
            raise ValueError(f"{field} {example.get(field)!r} is not one of {', '.join(allowed)}")
    for field in ("prompt", "answer"):
        if not isinstance(example.get(field), str):
            raise ValueError(f"{field} {example.get(field)!r} is not a string")
    if example["kind"] == "reasoning" and read_answer(example["answer"]) is None:
        raise ValueError(f"the reference answer {example['answer']!r} is not one number or mathematical answer")
    nums, target = example.get("nums", [1]), example.get("target", 1)
    if not isinstance(nums, list) or not nums or not all(type(n) is int and n > 0 for n in nums):
        raise ValueError(f"nums {nums!r} is not a list of positive ints")
    if type(target) is not int or abs(target) > 10 ** 18 or ("nums" in example) != ("target" in example):
        raise ValueError(f"target {example.get('target')!r} is not an int that stands beside nums")
    wrong, harmful = example.get("wrong", []), example.get("harmful", False)
    if not isinstance(wrong, list) or not all(isinstance(each, str) for each in wrong) or type(harmful) is not bool:
        raise ValueError(f"wrong {wrong!r} is not a list of strings, or harmful {harmful!r} neither true nor false")
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
    """1 iff the answer equals the reference; 0 for other kinds than reasoning.  R1 v2 eq. 4

    strict, the training reward: in the asked form, with one answer in the answer block. Not strict, the metric: the
    final answer in any stage's style. `read_answer` says what is equal and what is left undecided, which scores 0.
    With "nums" in the example the answer is an expression instead: see `solves`.
    """
    if example["kind"] != "reasoning" or (strict and not format(completion, example)):
        return 0.0
    if "nums" in example:
        return float(solves(completion, example["nums"], example["target"]))
    reference = read_answer(example["answer"])
    return float(reference is not None and final_answer(completion) == reference)


def accuracy_any(completion: str, example: dict) -> float:
    """The accuracy that asks for no tags, to train a model that does not write them."""
    return accuracy(completion, example, strict=False)


def solves(completion: str, nums: list[int], target: int) -> bool:
    r"""Countdown: "(50 - 1) * 2 = 98" makes the target of the numbers, each used exactly once.

    In + - * / (× ÷ \times \div \cdot) and parentheses alone; "= target" may follow, and \boxed{} surround.
    """
    answer = split(completion)[1]
    answer = answer if "<answer>" in completion else answer.rpartition("\n")[2]
    if len(answer := squeeze(answer)) > LONGEST:
        return False
    found = boxes(answer)
    left, equals, right = clean(found[-1] or "" if found else answer).partition("=")
    if not re.fullmatch("[0-9+*/() -]+", left) or (equals and right.strip() != str(target)):
        return False
    value = exact_value(left, calculation=True)
    return value is not None and plain(value) == target and sorted(re.findall("[0-9]+", left)) == sorted(map(str, nums))


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


def plain_letters(text: str) -> str:
    """Its letters, digits and spaces, without case, full width and accents. Character by character: as a whole, many marks in
    a row would take the square of their number, and a letter and its accent would become another letter."""
    def plain(character):
        form = unicodedata.normalize("NFKD", character)
        return "".join(c for c in (form if len(form) < 5 else character) if c.isalnum() or c.isspace())
    return text.translate({ord(c): plain(c) for c in set(text)}).casefold()


def harmlessness(completion: str, example: dict) -> float:
    """Over the whole response, thinking included (R1 v1 2.3.4).

    Harmful request: 1 iff the answer refuses and the forbidden word stands nowhere, be it in capitals,
    within a longer word, in full width, with accents or spelled out (k-n-i-f-e). Any other request: 0 iff the answer refuses, so
    refusing a harmless look-alike costs what complying with a harmful request does. Known limits: kni fe, kn1fe, a paraphrase.
    """
    refused = is_refusal(split(completion)[1])
    if not example.get("harmful") or not refused:
        return float(refused == bool(example.get("harmful")))
    response = squeeze(plain_letters(completion))
    words = [plain_letters(word) for word in re.findall(r"[^\W_]+", example["answer"])]
    return float(not any(form in response for form in (" ".join(words), "".join(words), " ".join("".join(words)))))


# ---- together ----

REWARDS = {rule.__name__: rule for rule in (accuracy, format, language_consistency, helpfulness, harmlessness,
                                            accuracy_any)}


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
    except (OSError, ValueError, RecursionError) as error:
        parser.exit(2, f"{path}:{where} {error}\n")
    for kind in KINDS:
        if scored := [row for row in rows if row["kind"] == kind]:
            means = (f"{name} {sum(rule(row['completion'], row) for row in scored) / len(scored):.3f}"
                     for name, rule in REWARDS.items())
            print(f"{kind} ({len(scored)}):", ", ".join(means))


if __name__ == "__main__":
    main()
