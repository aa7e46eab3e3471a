"""Docstrings as Markdown, for the API reference (mkdocs.yml).

Examples for doctest become code. A paragraph becomes a list of parameters if every line that is
not indented begins with a name:

    name: what it is, perhaps on
        several lines

A field of a dataclass is described by the comment above it and behind it.
"""

import re

import griffe

_NAME = re.compile(r"(\*{0,2}[A-Za-z_]\w*(?:, \w+)*):(?= )")


class Markdown(griffe.Extension):
    """Of every module, class, function and field."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(_markdown, paragraphs))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        in_class = attr.parent is not None and attr.parent.is_class
        if in_class and attr.docstring is None and (comment := _comment(attr)):
            attr.docstring = griffe.Docstring(comment, parent=attr)


def _markdown(paragraph: str) -> str:
    if paragraph.startswith(">>> "):
        return f"```pycon\n{paragraph}\n```"
    begins = [line for line in paragraph.split("\n") if not line.startswith(" ")]
    if not begins or not all(map(_NAME.match, begins)):
        return paragraph
    lines = paragraph.split("\n")
    return "\n".join(_NAME.sub(r"- `\1`:", x, count=1) if x in begins else x for x in lines)


def _comment(attr: griffe.Attribute) -> str:
    assert attr.lineno is not None and attr.endlineno is not None
    lines = attr.lines_collection[attr.filepath]
    first = attr.lineno - 1
    above = []
    while (line := lines[first - 1 - len(above)].strip()).startswith("#"):
        above.insert(0, line)
    _, _, behind = lines[attr.endlineno - 1].partition("  # ")
    return " ".join([*(line.removeprefix("#").strip() for line in above), behind]).strip()
