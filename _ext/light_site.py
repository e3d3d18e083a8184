"""Sphinx extension of this book: pages that carry nothing they do not use.

* The theme draws a dozen icons with a script of half a megabyte, which
  blocks the page. Its own style sheet can draw them from a font; that font
  and the style sheet are cut to the icons that the pages show.
* A page asks for one style sheet, not for ten, and no script holds up its
  text.
* The assets of sphinx-thebe (the book has no live kernel, and its script
  names a third-party host) and, where a page has no such element, those of
  sphinx-design are left out.
* The mathematical font is cut to the signs of the formulas.
* Files that no page asks for, such as source maps, are deleted.

Everything here happens to what was built, after all other extensions; when
the theme changes so much that there is nothing to leave out, the build says
so and stops.
"""

import contextlib
import hashlib
import html
import re
from importlib.metadata import distribution
from pathlib import Path

from fontTools import subset
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# ------------------------------------------------------------------- fonts


def cut(source: Path, target: Path, codes: set[int]) -> set[int]:
    """Write the part of a font that draws `codes`; return what it lacks."""
    options = subset.Options()
    options.flavor = "woff2"
    options.hinting = False
    # ssty: signs drawn for indices; dtls: letters without dots, for accents
    options.layout_features = ["ssty", "dtls"]
    options.name_IDs = ["*"]  # they hold the licence
    options.notdef_outline = True
    with contextlib.closing(subset.load_font(str(source), options)) as font:
        if "MATH" in font:
            # TeX lets neither the depth nor the height of a letter move its
            # index or power, a browser does: let them move tall things only.
            constants = font["MATH"].table.MathConstants
            constants.SubscriptBaselineDropMin.Value = 0
            constants.SuperscriptBaselineDropMax.Value = 386  # as in TeX
        known = set(font.getBestCmap())
        if codes & known:
            cutter = subset.Subsetter(options)
            cutter.populate(unicodes=codes & known)
            cutter.subset(font)
            subset.save_font(font, str(target), options)
    return codes - known


FORMULA = re.compile(r"<math\b.*?</math>", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
MATH_FONT = "ziamath/fonts/STIXTwoMath-Regular.ttf"
# What a browser draws, slanted, for a single letter: first, last, its twin.
SLANTED = (
    ("A", "Z", 0x1D434),
    ("a", "z", 0x1D44E),
    ("Α", "Ω", 0x1D6E2),
    ("α", "ω", 0x1D6FC),
)
SLANTED_SINGLE = {"h": 0x210E, "∂": 0x1D715, "ϵ": 0x1D716, "ϑ": 0x1D717}
SLANTED_SINGLE |= {"ϕ": 0x1D719}
INVISIBLE = set("\n\N{FUNCTION APPLICATION}\N{NO-BREAK SPACE}")


def signs(pages: dict[Path, str]) -> set[int]:
    """Return the code points that the formulas of the pages need."""
    used = set(map(chr, range(0x20, 0x7F)))
    for text in pages.values():
        for formula in FORMULA.findall(text):
            used |= set(html.unescape(TAG.sub("", formula)))
    codes = {ord(sign) for sign in used - INVISIBLE}
    for first, last, twin in SLANTED:
        codes |= {
            twin + ord(s) - ord(first) for s in used if first <= s <= last
        }
    codes |= {SLANTED_SINGLE[s] for s in used if s in SLANTED_SINGLE}
    return codes - {0x1D455}  # the place of h, which Unicode left empty


def cut_math_font(static: Path, pages: dict[Path, str]) -> None:
    source = Path(distribution("ziamath").locate_file(MATH_FONT))
    missing = cut(source, static / "math.woff2", signs(pages))
    if missing:
        raise ExtensionError(f"no font for {''.join(map(chr, missing))}")


# ------------------------------------------------------------------- icons

ICON_RULE = re.compile(r'([^{}]+)\{content:"\\(f[0-9a-f]+)"\}')
ICON_NAME = re.compile(r"\.fa-([a-z0-9-]+):{1,2}(?:before|after)")
ICON_SET = re.compile(r'"(?:\\(f[0-9a-f]{3})|([\ue000-\uf8ff]))"')


def cut_icons(static: Path, pages: dict[Path, str]) -> None:
    """Leave in style sheet and fonts the icons that the pages show."""
    texts = [*pages.values()]
    texts += [f.read_text("utf-8") for f in static.glob("scripts/*.js")]
    names = {n for t in texts for n in re.findall(r"\bfa-([a-z0-9-]+)", t)}
    sheet = static / "styles" / "pydata-sphinx-theme.css"
    codes = set()

    def keep(rule: re.Match) -> str:
        owners = ICON_NAME.findall(rule[1])
        if owners and not names & set(owners):
            return ""
        codes.add(int(rule[2], 16))
        return rule[0]

    rules = ICON_RULE.sub(keep, sheet.read_text("utf-8"))
    sheet.write_text(rules, "utf-8")
    sheets = static.glob("styles/*.css")
    for shown in "".join(s.read_text("utf-8") for s in sheets).split("{"):
        for code, sign in ICON_SET.findall(shown):
            codes.add(int(code, 16) if code else ord(sign))
    for font in (static / "vendor/fontawesome/webfonts").glob("*.woff2"):
        cut(font, font, codes)


# ----------------------------------------------------------- style sheets

SHEET = re.compile(
    r'[ ]*<link (?:rel="stylesheet" )?[^>]*?href="([^"]*_static/)'
    r'([^"?]+\.css)[^"]*"[^>]*>\n?'
)
IMPORTED = re.compile(r'@import (?:url\()?"?([^")]+\.css)[^;]*;')
ADDRESS = re.compile(r"""url\(["']?(?!data:)([^"')?]+)[^"')]*["']?\)""")


def stamp(content: bytes) -> str:
    """Return what a browser knows an old copy of a file by."""
    return hashlib.sha256(content).hexdigest()[:8]


def inline(static: Path, sheet: Path) -> str:
    """Return a sheet, its imports in place, its addresses from `static`."""

    def imported(match: re.Match) -> str:
        return inline(static, sheet.parent / match[1])

    def address(match: re.Match) -> str:
        file = (sheet.parent / match[1]).resolve()
        if not file.is_file():  # a format of a font that is not shipped
            return match[0]
        name = file.relative_to(static.resolve()).as_posix()
        return f"url({name}?v={stamp(file.read_bytes())})"

    text = ADDRESS.sub(address, sheet.read_text("utf-8"))
    text = re.sub(r"/\*#.*?\*/", "", text)  # where its map was
    return IMPORTED.sub(imported, text)


def join_sheets(static: Path, pages: dict[Path, str]) -> None:
    """Make one style sheet of those that every page asks for."""
    lists = [[m[2] for m in SHEET.finditer(t)] for t in pages.values()]
    shared = [n for n in lists[0] if all(n in names for names in lists)]
    joined = "\n".join(inline(static, static / name) for name in shared)
    (static / "book.css").write_text(joined, "utf-8")
    version = stamp(joined.encode())

    for path, text in pages.items():

        def one(match: re.Match) -> str:
            if match[2] not in shared:
                return match[0]
            if match[2] != shared[0]:
                return ""
            return (
                f'  <link rel="stylesheet" href="{match[1]}book.css'
                f'?v={version}">\n'
            )

        pages[path] = SHEET.sub(one, text)
    for name in shared:
        (static / name).unlink()


# ------------------------------------------------------------------- pages

ICON_SCRIPT = re.compile(
    r'\s*<script src="[^"]*fontawesome\.js[^"]*"></script>'
)
# The inline scripts behind documentation_options use what it declares.
SCRIPT = re.compile(
    r'<script (?!defer)(src="(?:[^"]*_static/(?!documentation_options)[^"]*'
    r'|[^"]*searchindex\.js[^"]*)")'
)
ICON = re.compile(r'<i class="(?=[^"]*\bfa[bsr]?[ -])(?![^>]*aria-hidden)')
# Until the theme's scripts have run it has no colours; without them it has
# none at all. What the reader's system prefers is known at once.
THEME = 'localStorage.getItem("theme") || "auto"'
PREFERRED = (
    'localStorage.getItem("theme") || '
    '(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")'
)
# What stands outside of all landmarks is skipped by those who walk by them.
LOGO = re.compile(
    r'<div (class="sidebar-primary-item">(?=\s*<a class="navbar-brand))'
)
THEBE = re.compile(
    r'\s*<script type="text/x-thebe-config">.*?</script>'
    r"\s*<script>kernelName = .*?</script>",
    re.DOTALL,
)
UNUSED = (
    "**/*.map",
    "**/*.ttf",
    "scripts/fontawesome.js",
    "sphinx-thebe.*",
    "sphinx-design.*",
    "design-tabs.js",
    "webpack-macros.html",
    "sbt-webpack-macros.html",
)


def asked_for(file: object, body: str) -> bool:
    """Whether a page needs a style sheet or script of an extension."""
    name = f"{file} {getattr(file, 'attributes', {}).get('body') or ''}"
    if "thebe" in name.lower():
        return False
    designed = "sphinx-design" in name or "design-tabs" in name
    return not designed or 'class="sd-' in body


def choose_assets(app, pagename, templatename, context, doctree) -> None:
    body = context.get("body", "")
    for kind in ("css_files", "script_files"):
        files = context.get(kind, [])
        context[kind] = [f for f in files if asked_for(f, body)]
    if body:
        context["body"] = THEBE.sub("", body)


def mend(page: str) -> str:
    """Leave out the script of the icons, let no script hold up a page, and
    give the logo its landmark.
    """
    page = ICON_SCRIPT.sub("", page)
    page = page.replace('data-theme="auto"', 'data-theme="light"')
    page = page.replace(THEME, PREFERRED)
    page = SCRIPT.sub(r"<script defer \1", page)
    page = LOGO.sub(r'<div role="navigation" aria-label="Home" \1', page)
    return ICON.sub(r'<i aria-hidden="true" class="', page)


def lighten(app: Sphinx, exception: Exception | None) -> None:
    """Take out of the built site what it does not use."""
    if exception is not None or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    if (static / "book.css").exists():
        raise ExtensionError(
            "build into an empty folder: delete _build/html"
        )
    pages = {
        path: mend(path.read_text("utf-8"))
        for path in Path(app.outdir).rglob("*.html")
        if static not in path.parents
    }
    if not any('<i aria-hidden="true"' in text for text in pages.values()):
        raise ExtensionError("the icons of the theme were not found")
    designed = any('class="sd-' in text for text in pages.values())
    for pattern in UNUSED:
        if not (designed and "design" in pattern):
            for file in static.glob(pattern):
                file.unlink()
    cut_math_font(static, pages)
    cut_icons(static, pages)
    join_sheets(static, pages)
    for path, text in pages.items():
        path.write_text(text, "utf-8")


def setup(app: Sphinx) -> dict:
    # Late, so that it sees what the other extensions add.
    app.connect("html-page-context", choose_assets, priority=950)
    app.connect("build-finished", lighten, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
