r"""Exact numbers of MATH's answers: sums of c * sqrt(n) * pi^k, read from a text that data/math_answers.py has cleaned.

    exact_value(r"\frac{√{12}}{4}") == exact_value("√3/2") == {(3, 0): Fraction(1, 2)}     3 is n, 0 is k, 1/2 is c
    exact_value("2 + 3") is None                                       a calculation left to do, or no number at all
"""
import re
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import gcd

# {(n, k): c} is the sum of c * sqrt(n) * pi^k, with c a fraction and n squarefree; n = -1 makes i. No terms: zero.

ONE = (1, 0)


def need(condition, reason: str) -> None:
    """Gives up on an exact number; exact_value turns that into None."""
    if not condition:
        raise ValueError(reason)


def rational(a: dict) -> Fraction | None:
    """The number as a fraction; None with a root, π or i in it."""
    if not a:
        return Fraction(0)
    return a[ONE] if a.keys() == {ONE} else None


def without_zeros(terms: dict) -> dict:
    return {base: c for base, c in terms.items() if c}


def add(a: dict, b: dict) -> dict:
    return without_zeros({base: a.get(base, 0) + b.get(base, 0) for base in a | b})


def multiply(a: dict, b: dict) -> dict:
    total = {}
    for ((m, j), x), ((n, k), y) in product(a.items(), b.items()):
        shared = gcd(m, n)  # sqrt(m) sqrt(n) = shared * sqrt(mn / shared^2)
        if m < 0 and n < 0:
            shared = -shared  # i * i = -1
        total = add(total, {(m * n // shared ** 2, j + k): x * y * shared})
    need(len(total) < 7, "too many terms")
    need(all(abs(c.numerator) + c.denominator < 10 ** 300 for c in total.values()), "too many digits")
    return total


def power(a: dict, exponent: Fraction | None) -> dict:
    need(a and exponent and exponent.denominator == 1, "only integer powers, neither 0^n nor n^0")
    need(abs(exponent) <= (100 if len(a) == 1 else 5), "too high a power")
    if exponent < 0:
        need(len(a) == 1, "a sum in a denominator")
        a = {(n, -k): 1 / (c * n) for (n, k), c in a.items()}  # 1 / sqrt(n) = sqrt(n) / n
    result = {ONE: Fraction(1)}
    for bit in f"{abs(int(exponent)):b}":  # by squares: 9^99 in 10 products
        result = multiply(result, result)
        if bit == "1":
            result = multiply(result, a)
    return result


def root(a: dict) -> dict:
    """sqrt(72) = 6 sqrt(2), sqrt(1/2) = sqrt(2) / 2, sqrt(-4) = 2i"""
    x = rational(a)
    need(x, "a root of zero, or of a number that is no fraction")
    inside = x.numerator * x.denominator
    need(abs(inside) <= 1000 ** 2, "a root of too large a number")
    n, outside = squarefree(inside)
    return {(n, 0): Fraction(outside, x.denominator)}


@lru_cache(1024)
def squarefree(n: int) -> tuple[int, int]:
    """(m, k) with n = m k^2, m squarefree."""
    k, p = 1, 2
    while p * p <= abs(n):
        if n % (p * p):
            p += 1
        else:
            n //= p * p
            k *= p
    return n, k


TOKEN = re.compile(r"\\frac|[0-9]*\.[0-9]+|[0-9]+|\S")
CONSTANTS = {"π": {(1, 1): Fraction(1)}, "i": {(-1, 0): Fraction(1)}}
CLOSING = {"(": ")", "{": "}"}
TWO_MEANINGS = re.compile("|".join([
    r"[0-9.] +[0-9.]",                                      # √2 3
    r"[)}πi] ?[0-9]",                                       # π2
    r"\} ?\^",                                              # \frac{3}{2}^2
    r"√ ?[0-9.]+ ?[πi(^\\]",                                # √2π
    r"/ ?√?(?:[0-9.]+|[({][0-9.]+[)}]) ?[(√πi\\]"]))        # 1/2π


@lru_cache(256)  # the items of a set are often tried in several readings
def exact_value(text: str) -> dict | None:
    r"""The exact value of a cleaned text in + - * / ^ √ π i \frac and brackets; None for anything else."""
    try:
        need(len(text) <= 300 and sum(map(text.count, "({√^-")) <= 60, "too long, or nested too deeply")
        need(not TWO_MEANINGS.search(text), "it can be read in two ways")
        parser = Parser(text)
        value = parser.sum()
        need(not parser.tokens, "a bracket closes nothing")
        return value
    except (ValueError, IndexError):  # IndexError: the text ends too early
        return None


class Parser:
    """A sum of products of factors, by recursive descent. It does no calculation: an answer leaves no plain numbers to
    add or multiply (2 + 3), while a fraction, a power and a root are ways to write a number, and 2π is a product."""

    def __init__(self, text: str):
        self.tokens = TOKEN.findall(text)[::-1]  # the next one is the last

    def next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[-1] in tokens

    def sum(self) -> dict:
        value = self.product()
        while self.next_is("+", "-"):
            sign = self.tokens.pop()
            term = self.product()
            need(value and term and not value.keys() & term.keys(), "a sum not worked out")
            value = add(value, multiply(term, {ONE: Fraction(f"{sign}1")}))
        return value

    def product(self) -> dict:
        value = self.factor()
        while self.tokens and not self.next_is("+", "-", ")", "}"):
            sign = self.tokens.pop() if self.next_is("*", "/") else "*"  # 2π
            value = self.combine(value, sign, self.factor())
        return value

    def combine(self, a: dict, sign: str, b: dict) -> dict:
        x, y = rational(a), rational(b)
        both_rational = x is not None and y is not None
        is_fraction = sign == "/" and both_rational and x.denominator == y.denominator == 1
        need(is_fraction or not both_rational, "a product not worked out")
        value = multiply(a, power(b, Fraction(-1)) if sign == "/" else b)
        need(both_rational or rational(value) is None, "a product not worked out: 12π * 45/π")
        return value

    def factor(self) -> dict:
        token = self.tokens.pop()
        if token == "-":
            return multiply(self.factor(), {ONE: Fraction(-1)})
        if token in CLOSING:
            value = self.sum()
            need(self.tokens.pop() == CLOSING[token], "a bracket of another kind")
        elif token == "√":
            value = root(self.factor())
        elif token == "\\frac":
            numerator = self.factor()
            value = self.combine(numerator, "/", self.factor())
        else:
            value = CONSTANTS.get(token) or self.number(token)
        if self.next_is("^"):
            self.tokens.pop()
            value = power(value, rational(self.factor()))
        return value

    def number(self, token: str) -> dict:
        need(re.fullmatch("[0-9.]+", token), "no number")
        value = without_zeros({ONE: Fraction(token)})
        if not (token.isdigit() and self.next_is("\\frac")):
            return value
        part = self.factor()
        if rational(part) is None:  # 2\frac{π}{3}
            return multiply(value, part)
        need(0 < rational(part) < 1, r"1\frac{1}{2} is 3/2, 1\frac{3}{2} is in doubt")
        return add(value, part)
