"""What the documentation site needs beside Markdown: a hook of MkDocs and an extension of Griffe (mkdocs.yml).

Pages link to files of the repository as they lie there, so that links work in a checkout too; formulas become MathML,
which browsers show without a script; roles of docstrings (``:func:`pair_topk```) become links.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# What the site has of the repository beside docs/.
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "benchmarks/results/**/*.*")

_LINK = re.compile(r"(\]\()((?![a-z]+:|#|/)[^)#\s]+)")
_FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_TOGETHER = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)+):(.*(?:\n+ {8}.*)*)", re.MULTILINE)
_ROLE = re.compile(r":(func|class|meth|data|mod|attr|math):`([^`]+)`")


def on_files(files: Files, config: Any) -> Files:
    """Pages and results of the repository that do not lie in docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of a page, which are those of its place in the repository, as the site has them."""
    at = page.file.src_uri
    in_docs = page.file.generated_by is None
    folder = posixpath.dirname(f"docs/{at}" if in_docs else at)

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        inside = target.removeprefix("docs/")
        return match[1] + os.path.relpath(inside, posixpath.dirname(at) or ".")

    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(linked, part) for i, part in enumerate(parts))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML.

    Raises:
        ValueError: a command that latex2mathml does not know and would print as it is.
    """

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[2])
        made = convert(latex, display="block" if match[1] == "div" else "inline")
        if "\\" in made:
            raise ValueError(f"got the formula {latex}; expected commands that latex2mathml knows. Write it otherwise.")
        return made

    return _FORMULA.sub(formula, content)


class Roles(griffe.Extension):
    """Docstrings as Griffe and Markdown want them: an argument a line, links for Sphinx's roles, no double colons."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _TOGETHER.sub(_apart, obj.docstring.value)
            text = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = _ROLE.sub(lambda role: _markdown(role[1], role[2], obj), text)


def _apart(arguments: re.Match[str]) -> str:
    """Arguments that a docstring describes together, one by one."""
    return "\n".join(f"    {name}:{arguments[2]}" for name in arguments[1].split(", "))


def _markdown(role: str, name: str, obj: griffe.Object) -> str:
    if role == "math":
        return f"${name}$"
    home = obj if role == "meth" and obj.is_class else obj.parent if role == "meth" else obj.module
    path = name if name.startswith("fastcl.") or home is None else f"{home.path}.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
