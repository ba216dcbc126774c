"""Elements of HTML and SVG, and figures in words, for report.py, figures.py and tables.py.

Untrusted text (what a model wrote, what a file says) is escaped where it enters an element.
"""

import html
import re

NAMES = {"accuracy_any": "any style", "validation_accuracy": "validation",
         "validation_accuracy_any": "validation, any style"}
STRANGE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Elements of our own making. Any other string is untrusted, and escaped when it enters an element."""


def escape(value):
    """For HTML and XML; control characters, direction overrides and what is no character become visible."""
    if value is None:
        return ""
    return html.escape(STRANGE.sub("\ufffd", str(value)))


def el(tag, *content, **attributes):
    """el("td", 5, [el("b", "x")], cls="n") -> <td class="n">5<b>x</b></td>"""
    opening, inner = [tag], []
    for key, value in attributes.items():
        name = "class" if key == "cls" else key.replace("_", "-")
        if value is not None:
            opening.append(f'{name}="{escape(value)}"')
    for item in content:
        for piece in item if isinstance(item, list) else [item]:
            inner.append(piece if isinstance(piece, Markup) else escape(piece))
    return Markup(f"<{' '.join(opening)}>{''.join(inner)}</{tag}>")


def number(value):
    """A finite float, or None for whatever else a run may hold."""
    if type(value) in (int, float) and abs(value) < 1e300:  # NaN is not less
        return float(value)
    return None


def short(value, digits=3, sign=""):
    """.783, 62.1, 1,234; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 2:
        digits = 1 if abs(value) < 1000 else 0
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign},.{digits}f}").replace("-", "−")


def quantity(value):
    """912k, 10.4M, and FLOPs as 3.1e13; a dash for what is no number."""
    value = number(value)
    if value is None:
        return "–"
    if abs(value) >= 1e12:
        return f"{value:.1e}".replace("e+", "e")
    for size, unit in (1e9, "B"), (1e6, "M"), (1e3, "k"):
        if abs(value) > .9995 * size:  # 999,600 is 1M
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(value):
    value = number(value)
    if value is None:
        return "–"
    return f"{value:.0f} s" if value < 100 else f"{value / 60:,.0f} min"


def words(metric):
    """A metric's name for a reader."""
    metric = str(metric).removesuffix("_if_thinking")
    return NAMES.get(metric, metric.replace("_", " "))


def counts_in_words(counts):
    """sampled 9,600; fell to wrong 2,810, mixed language 391; kept 4,182"""
    parts = [f"{words(name)} {number(count) or 0:,.0f}" for name, count in counts.items()]
    if len(parts) > 2:
        return f"{parts[0]}; fell to {', '.join(parts[1:-1])}; {parts[-1]}"
    return ", ".join(parts)
