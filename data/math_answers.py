r"""MATH's answers: LaTeX read as exact values, so that two ways to write an answer are equal and no others are.

    read_answer(r"\frac{\sqrt{12}}{4}") == read_answer(r"\sqrt{3}/2")   the value of an answer text
    read_end("so $x = 2$.\nHence it is \\boxed{2}.").value == 2         of a completion without answer tags
    read_expression(r"\boxed{(50 - 1) \times 2 = 98}")                  "(50 - 1) * 2 = 98": what Countdown asks for
    equal(read_both("20%"), read_both("20"))                           an answer beside its reference

rewards.rules_with(**READERS) scores with them. In doubt an answer is None, which scores nothing: a wrong answer that
scores teaches a model to write it. A reference in doubt is compared as text (`read_both`).
"""
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from data.exact_numbers import exact_value, rational
from rewards import HAN, LATIN, LONGEST, OPERATORS, Percent, extract_answer, split, squeeze


# ---- one spelling for each thing ----

AZ = rf"[^\W\d_{HAN}]"  # a letter
SAME = {spelling: form for form, spellings in {
    r"\ne ": r"\ne \neq ≠ !=", r"\le ": r"\le \leq \leqslant ≤ <=", r"\ge ": r"\ge \geq \geqslant ≥ >=", "<": r"\lt",
    ">": r"\gt", "π": r"\pi", "∞": r"\infty", "±": r"\pm", "∪": r"\cup \bigcup", "∅": r"\emptyset \varnothing \oslash",
    "*": r"\times \cdot × · ⋅", "/": r"\div ÷", "-": "−", "%": r"\% ％", ",": "， 、", ";": "；", "Ω": r"\Omega",
    r"\mathbb{R}": "ℝ"}.items() for spelling in spellings.split()}
ONE_SPELLING = ("|".join(re.escape(each) + ("(?![a-z])" if each[-1].isalpha() else "") for each in SAME),
                lambda match: SAME[match[0]])
TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|mbox|hbox|emph|boxed|fbox|operatorname|math(?:rm|bf|it|sf|tt))"
TEXT_OF = rf"{TEXT} ?\{{([^{{}}]*)\}}"
THOUSANDS = r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\{,\}|,? ?\\[,!]) ?[0-9]{3})+(?![0-9])"
BRACKET_SIZE = r"\\(?:left|right)(?![a-z])\.?|\\(?:[bB]igg?[lr]?|displaystyle)(?![a-z])|\\!"
POWER = r"(?: ?\^ ?(?:-?[1-4]|\{ ?-?[1-4] ?\})|[²³])"
UNIT_POWER = rf"({TEXT} ?\{{[ ~]?(?:[A-Za-z. /*]{{2,}}|[a-zA-Z]) ?\}}){POWER}"
DEGREES = r"\^ ?(?:\\circ(?![a-z])|\{ ?\\circ ?\})|°"
SPACES = r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])"
FORMULA_ENDS = r"\\?\$|(?<!\\)\\[()[\]]"
OPENING = (r"(?i)^ ?(?:#+ )?(?:(?:so|thus|hence|therefore)[ ,]+)?(?:the )?(?:final )?"
           r"(?:(?:answer|solution)s?(?: (?:is|are):?|:)(?: |$))?")


SPELLINGS = [(re.compile(pattern), form) for pattern, form in (  # in this order
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1"),                                  # 2pi -> 2\pi
    ONE_SPELLING,                                                                        # 2\pi -> 2π, x ≤ 5 -> x \le 5
    (THOUSANDS, lambda match: re.sub("[^0-9]", "", match[0])),                           # 1{,}234 -> 1234
    (BRACKET_SIZE, ""),                                                                  # \left( -> (
    (r"(?<=[0-9A-Za-z}).])~(?=[A-Za-z\\])|(?<=\{)~", " "),                               # 5~\text{m} -> 5 \text{m}
    (r"\*\*([^*]*)\*\*", r" \1 "),                                                       # **5** -> 5
    (rf"({TEXT} ?\{{[^{{}}]*\^ ?)\{{ ?(-?[1-4]) ?\}}", r"\1\2"),                         # \text{s^{-2}} -> \text{s^-2}
    (UNIT_POWER, r"\1"),                                                                 # \text{cm}^2 -> \text{cm}
    (TEXT_OF, r" \1 "),                                                                  # \text{cm} -> cm
    (r"\\mu +(?=[AFLVWgms](?![A-Za-z]))", "µ"),                                          # \mu\text{m} -> µm
    (f"{DEGREES}|{SPACES}|{FORMULA_ENDS}", " "),                                         # $90^\circ$ -> 90
    (r"\\[dtc]?frac(?![a-z]) ?", r"\\frac"),                                             # \dfrac{1}{2} -> \frac{1}{2}
    (r"\\frac([0-9π]) ?([0-9π])(?![0-9])", r"\\frac{\1}{\2}"),                           # \frac12 -> \frac{1}{2}
    (r"(\\frac\{[^{}]*\}) ?([0-9])(?![0-9])", r"\1{\2}"),                                # \frac{1}2 -> \frac{1}{2}
    (r"(?<=[0-9])\.(?=/)", ""),                                                          # 3./2 -> 3/2
    (r"\\sqrt ?([0-9])(?![0-9])", r"√{\1}"),                                             # \sqrt2 -> √{2}
    (r"\\sqrt(?![a-z0-9 ])", "√"),                                                       # \sqrt{2} -> √{2}
    (r"(?<=[)\]]) ?U ?(?=[(\[])", "∪"),                                                  # (0,1) U (2,3)
    (r"^\\\{ *\\\}$", "∅"),                                                              # \{\} -> ∅
    (OPENING, ""),                                                                       # So the answer is 5 -> 5
    (r"\.? *$", ""))]                                                                    # 5. -> 5
TYPOGRAPHY = [(re.compile(pattern), form) for pattern, form in (
    ONE_SPELLING,                                                                        # 3 \times 37 -> 3 * 37
    (BRACKET_SIZE, ""),                                                                  # \left( -> (
    (r"\\\$ ?([0-9](?:[0-9.,]*[0-9])?)", r"\1 dollars"),                                 # \$5 -> 5 dollars
    (r"\$|\\[()[\]]|^[*#]+|(?<![*.。])[*.。]+$", " "),                                     # $n$., **n** -> n
    (r"[‘’]", "'"), ("[“”]", '"'), ("[–—]", "-"), ("：", ":"),                            # “3：30” -> "3:30"
    (r"\\[dt]frac(?![a-z])", r"\\frac"),                                                 # \dfrac -> \frac
    (rf"{SPACES}|(?<=[^ ])~", " "),                                                      # a\,b -> a b
    (TEXT_OF, r" \1 "),                                                                  # \text{even} -> even
    (OPENING, ""),                                                                       # The answer is 1a1 -> 1a1
    (r" ?([^\w ]) ?", r"\1"),                                                            # 3 * 37 -> 3*37; 3 37 stays
    ("(?<![ .。*])[ .。*]+$", ""))]                                                        # what was before a $


def clean(text: str) -> str:
    for pattern, form in SPELLINGS:
        text = pattern.sub(form, squeeze(text))
    return text


def as_text(text: str) -> str:
    """What is compared where no value can be read: the text, its spaces and typography aside."""
    for pattern, form in TYPOGRAPHY:
        text = pattern.sub(form, squeeze(text))
    return text


# ---- the one number of a text ----

UNIT = rf"(?:[cdkm]?m|[km]?g|m?l|s|h|lbs?|oz|in|ft|yd|mi|[ap]m|mph|hrs?|st|nd|rd|th)(?!{AZ})"
DOUBTFUL = "|".join([  # "5 or so", "5 is wrong", "5 thirds"
    "not", "wrong", "incorrect", "or", "n?either", "between", r"approx\w*", "roughly", "nearly", "almost", "least",
    "most", "minus", "negative", "base", "never", "false", "grand", "basis", "bps", "pct", "mille", "per ?mil(?:le)?",
    "mod(?:ulo)?", "log", "ln", "sin", "cos", "tan", "lakhs?", "lacs?", "crores?", "tens", "half", "halves", "halved",
    "doubled?", "tripled?", "root", "reciprocal", "factorial", "kilo", "mega", "giga", "centi", "milli", "micro",
    "doubt", "cannot be", "(?:any|every)thing but", "all but", r"(?<=\()(?:about|around)", r"(?<!\()quarters?",
    r"(?:third|(?:four|fif|six|seven|eigh|nin|ten)th)s?(?! graders)"])  # ASDiv: 9 (quarters), 41 (fourth graders)
DOUBTED = re.compile(rf"\b(?:{DOUBTFUL})\b|n['’]t\b", re.IGNORECASE)
DOUBT = re.compile("|".join([  # what extract_answer does not look for beside the one number of a text
    DOUBTED.pattern,
    r"[\\^_|√π∞∪±ⁿⁱˣʸ]",                                                      # 5\pi, 5^2: a formula
    r"[^\s!-~\w°€£¥￥’‘“”…。，：；！？、（）−–—·×÷≤≥≠]",                                # 5‱
    r"[0-9] ?!",                                                              # 5!
    r"^[\[({](?=.*[\])}]$)[^,]*,",                                            # (5,5)
    r"[-+*/].*=",                                                             # -x = 5
    rf"[{OPERATORS}0-9] +[0-9]",                                              # 5 5
    r"\.[0-9]+ ?(?:\.\.|…)",                                                  # 4.99...
    rf"[0-9](?!{UNIT}){AZ}{{1,3}}(?!{AZ})", rf"[0-9]{AZ}(?!{AZ})",            # 5ab, 5x
    rf"[0-9] (?!{UNIT}){AZ}{{1,2}}$",                                         # 5 n
    rf"[0-9] {AZ}{{1,2}}(?: ?/ ?(?!{UNIT}){AZ}{{1,2}}(?!{AZ})|\((?!s\)))",    # 5 m/n, 5 C(n)
    rf"[0-9] ?{AZ} {AZ}(?!{AZ})", rf"(?<!{AZ}){AZ} ?[+*^/]",                  # 2 a x+b
    rf"[0-9] ?\([^)]{{,40}}[+*/=^]", rf"(?<!{AZ}){AZ} ?\([^)]{{,40}}[0-9]",   # 6(x+y), I(0)
    r"^[^=]*=[^,]*,[^=]*=", r"^[\w-]+(?:, [\w-]+){3}",                        # f(n)=n, g(n)=1; a list of words
    r"\b(?:about|around|over|under|above|below|up to) +[0-9]",                # about 5
    r"\b(?:times|by|over|less|point) (?:one|two|three|four|five|six|seven|eight|nine|ten)\b",  # 5 over two
    r"(?:不等于|并非|[大小多少高低]于|至[多少]|最[多少]|超过|不[到足]|约|根号|[点點]) ?[0-9]",        # 约5
    r"[0-9] ?(?:[成折又余]|以[上下]|左右)", "或"]), re.IGNORECASE)                          # 5以上, 5或六


def number_in(text: str) -> Fraction | None:
    """`extract_answer` with more doubt."""
    number, cleaned = extract_answer(text), clean(text)
    if number is None or DOUBT.search(cleaned):
        return None
    if "\\" in text and extract_answer(cleaned) != number:
        return None
    return number


# ---- boxes ----

BOX_OR_BRACE = re.compile(r"(\\(?:boxed|fbox)(?![a-z])\s*\{?)|\\.|[{}]", re.DOTALL)  # an escaped brace is none
BARE = re.compile(r"(?!\\(?:boxed|fbox))[^\s{$]+")  # \boxed 5
JOINT = re.compile(  # between the boxes of a list: $\boxed{1}$ and $\boxed{2}$
    rf"(?=.*(?:,|and|or))(?:[^\S\n]|,|{SPACES}|{FORMULA_ENDS}|\\text ?\{{|\}}|(?<![a-z])(?:and|or)(?![a-z]))+")


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each outermost \boxed{}, \fbox{} or "\boxed 5" with braces nested at most four deep."""
    found, unclosed = [], []  # unclosed braces: [start of its box or None, start of its content, its depth]
    for token in BOX_OR_BRACE.finditer(text):
        bare = BARE.match(text, token.end()) if token[1] else None
        if token[0] == "{" or (token[1] or "").endswith("{"):
            unclosed.append([token.start() if token[1] else None, token.end(), 0])
        elif bare:
            found.append((token.start(), bare.end(), bare[0]))
        elif token[0] == "}" and unclosed:
            start, inside, depth = unclosed.pop()
            if unclosed:
                unclosed[-1][2] = max(unclosed[-1][2], depth + 1)
            if start is not None and depth < 5:
                while found and found[-1][0] > start:  # a box within this one
                    found.pop()
                found.append((start, token.end(), text[inside:token.start()]))
    return found


def last_box(text: str) -> str | None:
    found = find_boxes(text)
    return found[-1][2] if found else None


def boxes(text: str) -> list[str | None]:
    r"""What stands in each box, "1, 2" for \boxed{1} and \boxed{2}; None where its neighbours would change a 1 in its
    place: in -\boxed{5}, \boxed{5}0, not \boxed{5}, \boxed{5} thousand.
    """
    found = find_boxes(text)
    contents = [None] * (len(found) - 20)  # more than twenty are not looked at
    found = found[-20:]
    between = ["", *(text[end:start] for (_, end, _), (start, _, _) in zip(found, found[1:])), ""]
    for (start, end, content), left, right in zip(found, between, between[1:]):
        joined = JOINT.fullmatch(left)
        before = re.search(r"[^\s=]*[^\S\n]*\Z", text[max(0, start - 40):start].replace("!=", "≠"))[0]
        after = re.match(r"\S*(?:[^\S\n]+[^\s\d\\]+){0,2}", text[end:end + 40])[0]
        if number_in(f"{'' if joined else before}1{'' if JOINT.fullmatch(right) else after}") != 1:
            contents.append(None)
        elif joined and differ(contents[-1], content):
            contents[-1] += f" or {content}" if "or" in left else f", {content}"
        else:
            contents.append(content)
    return contents


def differ(box: str | None, other: str) -> bool:
    """Whether two boxes hold two values of a list. No one boxes more than 300 characters of one."""
    return box is not None and len(box + other) <= 300 and read_answer(box) != read_answer(other)


# ---- mathematical answers ----

SYMBOL = r"(?:[nµμmckdhMG]?(?:m|g|s|N|J|W|V|A|K|C|Hz|Pa|eV|mol|L|Ω)|min|hr?s?|lbs?|oz|in|ft|yd|mi|rad|F)"
SYMBOLS = "|".join([
    rf"{SYMBOL}[²³]?",                                                  # 5 N, 5 m²; not 5 n, nor 5 m^2
    rf"(?:[nµμmckd]m|ft|in|yd|mi){POWER}",                              # 5 cm^2
    rf"{SYMBOL}{POWER}?(?: ?[/*] ?{SYMBOL}{POWER}?| {SYMBOL}{POWER})+"])  # 5 m/s^2, 5 kg*m/s, 5 m s^{-1}
WITH_WORDS = re.compile(rf"(.*[0-9π}})]) ?({UNIT}|[A-Za-z. ]{{4,}})")
WITH_SYMBOLS = re.compile(rf"(.*[0-9π}})]) +(?:{SYMBOLS})")
MIXED = re.compile(r"^(-? ?[0-9]+) ([0-9]+)/([0-9]+)$")
SCIENTIFIC = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)(?: ?\* ?10 ?\^ ?\{? ?(-?[0-9]{1,3}) ?\}?|[eE][+]?(-?[0-9]{1,3}))")
CLOCK = re.compile(r"([0-9]+(?: ?: ?[0-9]+)+(?:\.[0-9]+)?) ?(?:([ap])\.?m\.?)?", re.IGNORECASE)
MATRIX = re.compile(r"[(\[]? ?\\begin ?\{([pb]?matrix|array)\} ?(?:\{[lcr| ]*\})?(.*?)(?:\\\\)? ?\\end ?\{\1\} ?[)\]]?")
NAMED = re.compile(r" ?([A-Za-z](?: ?_ ?\{?[0-9]\}?)?) ?(?:=|\\in(?![a-z])) ?([^=]*)")  # x = 5, x_1 = 5, x \in [0,1]
AND_OR = re.compile(r" ?,? ?(?<![A-Za-z])(and|or)(?![A-Za-z]) ?")
BRACKETS = ("()", "(]", "[)", "[]", "{}")


def split_at(separator: str, text: str) -> list[str]:
    """The pieces between the separators that stand in no bracket; none if the brackets do not match."""
    pieces, depth = [""], 0
    for token in re.findall(r"\\?.", text):
        if token[-1] in "([{":
            depth += 1
        elif token[-1] in ")]}":
            depth -= 1
        if depth < 0:
            return []
        if token == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [] if depth else pieces


def read_value(text: str, level: int = 0):
    """A cleaned text as a number, set, tuple, interval, matrix or formula; None in doubt."""
    text = text.strip().removeprefix("+")
    if text == "∅":
        return "{}", frozenset()
    if re.fullmatch("[A-Za-z]", text):  # a variable
        return text
    bracket = re.fullmatch(r"(\(|\[|\\?\{)(.*?)(\)|\]|\\?\})", text)
    if bracket:
        opening, inside, closing = bracket.groups()
        items = split_at(",", inside)
        if len(items) > 1 or (items and opening == "\\{"):
            return read_items(items, opening[-1] + closing[-1], level)
    number = read_number(text)
    if number is not None:
        return number
    value = read_matrix(text, level) or read_clock(text) or read_named_tuple(text, level)
    return value or read_union(text, level) or read_list(text, level)


def read_number(text: str):
    r"""An exact number before a unit or a percent sign: a fraction; with roots, π or i ("number", its terms)."""
    measured = WITH_WORDS.fullmatch(text)
    if not measured or number_in(f"1 {measured[2]}") != 1:  # "5 thousand" is not 5
        measured = WITH_SYMBOLS.fullmatch(text)
    if measured:
        text = measured[1]
    scientific = SCIENTIFIC.fullmatch(text)
    if scientific:
        number, power_of_ten, e = scientific.groups()
        exponent = int(power_of_ten or e)
        in_doubt = exponent == 0 or abs(exponent) > 100 or (e and abs(exponent) == 1)  # 5.7e1 is no way to write 57
        return None if in_doubt else Fraction(number) * Fraction(10) ** exponent
    percent = re.fullmatch(r"(.*?) ?(?:%|per ?cent)", text)
    text = MIXED.sub(r"\1\\frac{\2}{\3}", percent[1] if percent else text)  # 1 1/2 -> 1\frac{1}{2}
    terms = exact_value(text)
    if terms is None:
        return None
    if percent:
        terms = {base: c / 100 for base, c in terms.items()}
    number = rational(terms)
    if number is None:
        return "number", frozenset(terms.items())
    return Percent(number) if percent else number


def read_matrix(text: str, level: int):
    r"""("matrix", rows): \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, in round or square brackets."""
    matrix = MATRIX.fullmatch(text)
    if not matrix or level:
        return None
    rows = [tuple(read_value(cell, level + 1) for cell in row.split("&")) for row in matrix[2].split("\\\\")]
    return None if any(None in row for row in rows) else ("matrix", tuple(rows))


def read_clock(text: str):
    """(":", numbers, "a", "p" or ""): the time 03:30:57 = 3:30:57, 3:30 p.m., or the ratio 3:1, 3 to 1."""
    clock = CLOCK.fullmatch(re.sub(r"^([0-9]+) to ([0-9]+)$", r"\1:\2", text))
    if not clock:
        return None
    return ":", tuple(Fraction(number) for number in clock[1].split(":")), (clock[2] or "").lower()


def read_named_tuple(text: str, level: int):
    """(p, q) = (3, 2) is (3, 2), if the names stand in the order of the alphabet."""
    named = re.fullmatch(r"\(([A-Za-z](?: ?, ?[A-Za-z])+)\) ?= ?(\([^=]*\))", text)
    if not named:
        return None
    names, value = re.findall("[A-Za-z]", named[1]), read_value(named[2], level + 1)
    is_tuple = isinstance(value, tuple) and value[0] == "()" and len(value[1]) == len(names)
    return value if is_tuple and names == sorted(set(names)) else None


def read_union(text: str, level: int):
    """("∪", values): intervals and sets in any order."""
    parts = split_at("∪", text)
    if len(parts) < 2:
        return None
    values = [read_value(part, level + 1) for part in parts]
    if not all(isinstance(value, tuple) and value[0] in BRACKETS for value in values):
        return None
    return "∪", frozenset(values)


def read_list(text: str, level: int):
    """Bare lists: "1, 2 and 3" a set, "1 or 2" a set that says so, "1; 2" in order; else a formula. Of equations:
    x = 1, x = 2 and x = 1 or x = 2 are the set 1, 2; x = 1, y = 2 names its values."""
    items = split_at(";", text)
    if len(items) > 1 and level == 0:
        return read_items(items, ";", level)
    words = set(AND_OR.findall(text))
    items = split_at(",", AND_OR.sub(",", text) if words else text)
    if len(items) < 2 and re.fullmatch("[A-H]( [A-H])+", text):  # A C D
        items = text.split()
    if len(items) < 2 and "±" not in text:
        return read_formula(text) if items else None
    if level > 0 and "," in text or is_doubtful_list(items):
        return None
    equations = [NAMED.fullmatch(item) for item in items]
    if all(equations):
        names = [re.sub("[ {}]", "", equation[1]) for equation in equations]
        values = [read_value(equation[2], level + 1) for equation in equations]
        if len(set(names)) == len(names) > 1 and None not in values:
            return "=", tuple(sorted(zip(names, values), key=lambda pair: pair[0]))
        if len(set(names)) == 1:
            return read_items([equation[2] for equation in equations], "{}", level)
    value = read_items(items, "{}", level)
    return ("or", value[1]) if value and words == {"or"} else value


def is_doubtful_list(items: list[str]) -> bool:
    """1,234, 5 may be two numbers or three. 1,23 and 1,5,100 are lists: as a number they would be malformed."""
    spaced = [item.startswith(" ") for item in items[1:]]
    thousands = [re.search("(?<![0-9.])[1-9][0-9]{0,2}$", a) and re.match("[0-9]{3}(?![0-9])", b)
                 for a, b in zip(items, items[1:])]
    return bool(thousands) and (all(thousands) or any(spaced) and any(thousands))


def read_items(items: list[str], brackets: str, level: int):
    """(brackets, values): a tuple or an interval in order, a set {} in none, each value with its number of times;
    1 ± 2 stands for two items."""
    if brackets not in (*BRACKETS, ";") or level > 2:
        return None
    if brackets != "{}":
        values = [read_value(re.sub(r"""^ *(['"])(.*)\1 *$""", r"\2", item), level + 1) for item in items]  # ['1', '2']
        return None if None in values else (brackets, tuple(values))
    values = []
    for item in items:
        signs = "+-" if item.count("±") == 1 else "+"
        values += [read_value(item.replace("±", sign), level + 1) for sign in signs]
    return None if None in values else (brackets, frozenset(Counter(values).items()))


def read_formula(text: str) -> str | None:
    """What is equal as a string alone: x^{2} + 1 = x^2+1; 5 > x is x < 5."""
    letters = re.sub(r"\\(?:(?:begin|end)\{[pb]matrix\}|[A-Za-z]+)", r"\\", text)
    if re.search(r"[A-Za-z] ?[0-9]|[A-Za-z]{4}|\b(?:or|and|is|not|the)\b|</?[A-Za-z]+>", letters):  # prose
        return None
    formula = " ".join(re.findall(r"\\[A-Za-z]+|[A-Za-z]|[0-9.]+|\S", text))
    if not re.search(r"[A-Za-z√_^∞∪]", formula.replace("\\frac", "")):  # a number that we could not read
        return None
    if not re.search("[^A-Za-z ]", formula) or not re.fullmatch("∞|[ !->@-~√π∞∪]{2,}", formula):
        return None
    formula = re.sub(r"\{ (\\?\w+|\S) \}", r"\1", formula)
    relations = re.findall(r" (>|\\ge|<|\\le|=|\\ne|\\in) ", formula)
    if relations and set(relations) <= {">", "\\ge"}:
        sides = re.split(r" (>|\\ge) ", formula)[::-1]
        formula = " ".join({">": "<", "\\ge": "\\le"}.get(side, side) for side in sides)
    return formula


NO_ANSWER = r"none$|nothing$|unknown$|no (?:answer|idea)|(?:the )?(?:final )?answer$"
FEW_WORDS = re.compile(rf"(?!{NO_ANSWER})[{LATIN}]{{2,}}(?:[ '-][{LATIN}]+){{0,2}}")
CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])[ :]*(?!(?:is|was|are|has|can|may|seems)\b)(.+)")  # (C) 5, C. 5
RULE_LINE = re.compile(r"^[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,}|```\w*)[ \t]*$", re.MULTILINE)  # 42\n---


@lru_cache(2 ** 14)  # several rules read the same text, and completions share their answers
def read_answer(text: str):
    r"""The canonical value of an answer text, hashable, or None: two answers are equal iff their values are.

    Decided: the one number of a text, as `extract_answer` reads it; else the whole text as an exact number with
    fractions, mixed numbers, roots, π, i, powers, percent: \sqrt{8} = 2\sqrt{2}; a tuple or an interval, whose brackets
    count; a set in any order, as are "1, 2", "1,2 and 3", "x = 1, x = 2" and "1 \pm 2" ("1 or 2" is kept apart), and a
    union; values with names, "x = 1, y = 2"; a matrix; a time or a ratio; up to three words or a choice, (A) = A, in
    any case; another formula as the same string, spaces aside. "x =", units and degrees are dropped (but see `equal`).
    Boxes come first; several that differ are no answer, but a list where "and" or a comma joins them. A fraction need
    not be in lowest terms: 114/2 = 57.
    Undecided, so None or a mere string: a calculation left to do (12 + 45, 12π * 45/π), formulas with variables in
    other words, a decimal for a third, a root or π, and whatever is in doubt.
    """
    if len(text) > LONGEST:
        text = squeeze(text)  # not before: boxes look at the lines
    if len(text) > LONGEST:
        return None
    found = set(boxes(text))
    if len(found) > 1 and sum(len(content or "") for content in found) > 300:  # no one boxes so much
        return None
    if found and found != {None}:
        values = {None if content is None else read_answer(content) for content in found}
        return values.pop() if len(values) == 1 else None
    text = RULE_LINE.sub("", text)
    number, cleaned = number_in(text), clean(text)
    choice = read_choice(cleaned)
    if choice is not None or number is not None:
        return number if choice is None else choice
    if len(cleaned) > 300:  # only a sentence is that long
        return None
    equation = NAMED.fullmatch(cleaned)
    value = read_value(equation[2]) if equation else None  # x = 5
    if value is None or isinstance(value, str):  # y = 2x + 3 is a formula as a whole
        value = read_value(cleaned)
    if value is None and FEW_WORDS.fullmatch(cleaned.lower()):
        return cleaned.lower()
    return value


def read_choice(cleaned: str):
    """C and (C) as "C"; "(C) 5" and "C. 5" as ("choice", "C", 5), unless what follows is in doubt or names another."""
    choice = re.fullmatch(r"([A-J])|\(([A-Za-z])\)", cleaned)
    if choice:
        return (choice[1] or choice[2]).upper()
    choice = CHOICE.fullmatch(cleaned)
    if not choice or re.search(r"(?<![A-Za-z])[A-J](?![A-Za-z])", choice[3]) or DOUBTED.search(choice[3]):
        return None
    content = read_answer(choice[3])
    return "choice", choice[1] or choice[2], as_text(choice[3]) if content is None else content


# ---- an answer beside its reference ----

NOTHING = re.compile(rf"[?.…_{{}}-]*|nan|null|n/?a|{NO_ANSWER}", re.IGNORECASE)
UNITS = {word: names.split()[0] for names in (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre", "inch inches",
    "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram", "lb pound", "oz ounce",
    "ml mL", "L l", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year", "dollar", "cent",
    "degree", "rad radian", "% percent")
    for word in names.split()}
MEASURE = re.compile(  # 5 cm^2, 5 square cm, 5 m/s^2, 5 km per hour, 5 m s^{-2}
    r"[0-9)}π] ?\\?(square |sq\.? ?|cubic )?([A-Za-zµμΩ]+|%)(?:\^\{?([1-4]))?"
    r"( ?/ ?\w+(?:\^\{?[1-4])?| per \w+|[* ]\w+\^\{?-[1-4])?")


class Reading(NamedTuple):
    """An answer or a reference: its value, None in doubt, and its text."""
    value: object
    text: str

    def vote(self, reference):
        """What it stands for in a majority: the reference where it is right; a text only beside a text."""
        if equal(self, reference):
            return reference
        return self.text if reference.value is None else self.value


@lru_cache(2 ** 14)
def read_both(text: str) -> Reading | None:
    """The value and the text of an answer; None where there is nothing to compare."""
    value = read_answer(text)
    if len(text) > LONGEST:
        return Reading(value, "") if value is not None else None
    found = boxes(text)
    if len(set(found)) == 1 and found[0] is not None:
        text = found[0]
    text = as_text(text)
    return None if NOTHING.fullmatch(text) else Reading(value, text)


def equal(answer: Reading | None, reference: Reading | None) -> bool:
    """Whether an answer is right: by value, or where the reference has none, as the same text."""
    if answer is None or reference is None:
        return False
    if reference.value is None:
        return answer.text == reference.text
    in_base = re.fullmatch(r"([0-9][0-9A-F]*)_\{?[0-9]+\}?", reference.text)
    if in_base and answer.text == in_base[1]:  # 52 for 52_8
        return True
    units = units_of(answer.text), units_of(reference.text)
    return equal_values(answer.value, reference.value) and (units[0] == units[1] or not all(units))


def units_of(text: str) -> set[tuple]:
    """(unit, its power, the power below the line) after each number: 5 cm is not 5 m, 5 cm^2 nor 5 cm/s, while
    5 apples may be anything."""
    units = set()
    for area, word, power, per in MEASURE.findall(text.replace("²", "^2").replace("³", "^3")):
        unit = UNITS.get(word) or UNITS.get(word.removesuffix("s"))
        if word != "in" and re.fullmatch(SYMBOL, word):  # "5 in all"
            unit = UNITS.get(word, word)
        if unit:
            power = power or {"s": "2", "c": "3"}.get(area[:1], "1")
            units.add((unit, power, per and (re.findall("[1-4]", per) or ["1"])[0]))
    return units


def equal_values(answer, reference) -> bool:
    """Whether an answer's value is the reference's. What only one of them has is no difference: %, a choice's letter or
    its content, a.m. or p.m. And 1, 2 is right where the reference is "1 or 2", x_1 = 1, x_2 = 2 where it is 1, 2.
    """
    if answer is None:
        return False
    if answer == reference or without_percent(answer) == without_percent(reference):
        return True
    kinds = [value[0] if isinstance(value, tuple) else None for value in (answer, reference)]
    if "choice" in kinds and kinds != ["choice", "choice"]:
        choice, other = (answer, reference) if kinds[0] == "choice" else (reference, answer)
        return other == choice[1] or equal_values(choice[2], other)
    if kinds == [":", ":"]:
        return answer[1] == reference[1] and "" in (answer[2], reference[2])
    if kinds == ["=", "{}"]:
        names, values = zip(*answer[1])
        return len({name[0] for name in names}) == 1 and frozenset(Counter(values).items()) == reference[1]
    return kinds == ["{}", "or"] and answer[1] == reference[1]


def without_percent(value):
    """20% -> 20, (20%, 30%) -> (20, 30): all of a list, so that 20%, 3000% is not 20, 30."""
    if isinstance(value, Percent):
        return 100 * value
    return type(value)(map(without_percent, value)) if isinstance(value, (tuple, frozenset)) else value


# ---- a completion without answer tags ----

MARKER = re.compile("|".join([
    r"####(?![ \t]*(?:[0-9]+[.)][ \t]|[A-Za-z]{2,}[ :]))",                 # #### 42; not #### Step 2, #### 1. Add
    r"(?<!if )(?<!if the )(?<!wrong )(?<!incorrect )\b(?:answers?|solutions?) ?(?:is|are)\b:?",  # The answer is 42
    r"\banswer\**:",                                                       # **Answer**: 42
    r"答案[是为]?[:：]?"]), re.IGNORECASE)                                   # 答案是42
BLOCK = re.compile(r"(\\\[|\$\$|```\w*\n)(.{,2000}?)(?:\\\]|\$\$|```)", re.DOTALL)
TAKEN_BACK = re.compile("|".join([
    r"\b(?:wait|no|not|but|actually|however|instead|wrong|incorrect|mistake|sorry|correction|rather|hmm|oops|edit)\b",
    r"n['’]t\b|\bshould be\b|不|错|但|所以|更正",                              # The answer is 5. Edit: it should be 6
    r"^[ \t>*-]{0,9}(?:so|thus|hence|therefore|then)\b"]), re.IGNORECASE | re.MULTILINE)  # So it is 6


CLAUSE = re.compile(r"[,.;:，。；：]|\b(?:so|thus|hence|therefore|then|get|gives?|yields?|obtain)\b", re.IGNORECASE)
VERB = re.compile(r"\b(?:is|are|was|were|be|has|have|makes?|equals?|leaves?)\b|[=是为得有]", re.IGNORECASE)
DENIED = re.compile(r"\b(?:not|never|cannot|doubt|wrong|incorrect|false|n?either|nor|but|unless|except)\b"
                    r"|n['’]t\b|不|错", re.IGNORECASE)
VAGUE = re.compile("|".join([
    DOUBTED.pattern, r"\b(?:than|about|around|twice|over|under|above|below|up to|within|from)\b",  # more than $5$
    r"^[^0-9]*[0-9].*\band\b",                                             # 2 and 3: two answers
    r"[<>^~≤≥≠≈]\W*$|[-+*/]\$ *$"]), re.IGNORECASE)                       # $3 <$ $5$


def is_doubtful(before: str, after: str = "") -> bool:
    """Whether the words beside a number or a formula change it: not in "They are not equal, so it is $5$"."""
    clause = CLAUSE.split(before)[-1]
    listed = re.search(r"[0-9]\W{,3}, ?\W?$", before)  # 2, 3
    return bool(listed or DENIED.search(clause) or VAGUE.search(VERB.split(clause)[-1]) or DOUBTED.search(after))


def last_line(tail: str) -> str:
    r"""The last line with content: not \], ---, \end{align}."""
    lines = tail.strip()[-2 * LONGEST:].split("\n")
    while len(lines) > 1 and not re.search(r"\w", re.sub(r"\\end\{\w+\*?\}|```\w*", "", lines[-1])):
        lines.pop()
    _, aligned, line = lines[-1].rpartition("&")  # x &= 42 \\
    return line.removesuffix("\\\\") if aligned and r"\begin" not in lines[-1] else lines[-1]


def marked_answer(tail: str) -> str | None:
    """The line or the displayed formula after the last marker; None without one, or where what follows differs."""
    markers = list(MARKER.finditer(tail))
    if not markers:
        return None
    after = tail[markers[-1].end():].lstrip(" \t\n:：*")
    block = BLOCK.match(after)
    text, _, rest = (block[2], "", after[block.end():]) if block else after.partition("\n")
    text = re.sub(r"\*\*(\.?)[ \t]*$", r"\1", text)  # **42**.
    if not text.strip() or text.rstrip().endswith("?") or TAKEN_BACK.search(rest[:LONGEST]):
        return None
    last = re.sub(r"\\[A-Za-z]+", "", last_line(rest))
    if re.search("[0-9]", last) and not re.search(f"{AZ}{{3}}|[{HAN}]", last):  # "x = 43": another answer
        return None
    return text.rstrip(" \t*")


def read_line(line: str):
    """All of a line; or the formula $...$ that ends it, or its last number, if no words beside them are doubtful."""
    line = squeeze(line)
    if len(line) > LONGEST:
        line = line[-LONGEST:].partition(" ")[2]  # not from within a number
    value = read_answer(line)
    sentence = re.sub(r" is (?:the|our) (?:final )?(?:answer|solution)$", "", line.rstrip(" .!"))
    for opening, closing in ("$", "$"), (r"\(", r"\)"):
        if value is None and sentence.endswith(closing):
            before, _, formula = sentence.removesuffix(closing).rpartition(opening)
            value = None if is_doubtful(before) else read_answer(formula)
    if value is not None:
        return value
    is_formula = re.search(r"[\\^_|√π∞∪±]", clean(line.rpartition("=")[2]))
    around = re.fullmatch("(.*?)[0-9][0-9.,/]*([^0-9]*)", line)  # its last number
    if not around or is_formula or is_doubtful(*around.groups()):
        return None
    return extract_answer(line, last=True)


@lru_cache(2 ** 14)
def read_end(completion: str) -> Reading | None:
    r"""What a completion without answer tags ends on, as `read_both` reads it.

    The last \boxed{}; or what an explicit marker names, "#### 42" or "The answer is 42.", unless what follows takes it
    back; or else the last line, closing delimiters aside: all of it, or the formula $...$ that ends it, or the last
    number, as a base model writes: "12 + 45 = 57, so 57."
    """
    answer = split(completion)[1]
    if not answer:
        return None
    tail = completion.partition("</think>")[2] or completion
    at = max(tail.rfind(r"\boxed"), tail.rfind(r"\fbox"))
    if at >= 0:
        found = boxes(tail[max(0, at - 100):at + LONGEST])
        text = found[-1] if found and found[-1] is not None else answer
        value = read_answer(text)
    else:
        if "</answer>" in tail:
            tail = answer
        text = marked_answer(tail) or last_line(tail)
        value = read_line(text)
    both = read_both(text) if len(text) <= LONGEST else None  # an essay is no text to compare
    if value is None:
        return both
    return Reading(value, both.text if both else "")


def read_expression(text: str) -> str:
    """What Countdown's answer writes, in the last box if there is one."""
    found = boxes(text)
    return clean(found[-1] or "" if found else text)


READERS = {"read": read_both, "read_end": read_end, "read_expression": read_expression, "equal": equal}
