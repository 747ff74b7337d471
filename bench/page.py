"""One self-contained page, and the same in Markdown, from what the sub-commands have written."""

import base64
import html
from pathlib import Path

from bench.ceilings import LIBRARIES
from bench.report import Picture, Table, Words

Part = Table | Picture | Words
STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --quiet: #666; --shade: #f6f6f6; --mark: #c1121f }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --quiet: #aaa; --shade: #202020; --mark: #ff6b6b }
  img { filter: invert(1) hue-rotate(180deg) }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { margin-top: 3rem; border-top: 3px solid var(--mark); padding-top: .5rem }
h3 { margin: 2rem 0 .5rem } p { max-width: 48rem } img { max-width: 100%; height: auto; border-radius: 4px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { vertical-align: bottom }
.long td:first-child { white-space: normal; min-width: 20rem }
tbody tr:nth-child(even) { background: var(--shade) }
code { background: var(--shade); padding: .1rem .3rem; overflow-wrap: anywhere }
.note { color: var(--quiet); font-size: .85rem }
nav a { margin-right: 1rem; white-space: nowrap }
"""


def write(folder: Path, stem: str, sections: dict[str, tuple[dict, list[Part]]]) -> list[Path]:
    """Write stem.html and stem.md from the results and parts of each sub-command; the files."""
    page, plain = folder / f"{stem}.html", folder / f"{stem}.md"
    links = "".join(f'<a href="#{name}">{name}</a>' for name in sections)
    body = "\n".join(_section(folder, name, *found) for name, found in sections.items())
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastnewton: measurements</title><style>{STYLE}</style></head>\n"
        f"<body><h1>fastnewton: what was measured</h1><nav>{links}</nav>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )
    texts = [
        f"## {name}\n\n{about(found)}" + "".join(f"\n\n{part.markdown()}" for part in parts)
        for name, (found, parts) in sections.items()
    ]
    plain.write_text("\n\n".join(["# fastnewton: what was measured", *texts]) + "\n", encoding="utf-8")
    return [page, plain]


def about(found: dict) -> str:
    """The command behind the figures, the machine and the versions, as Markdown."""
    machine = found["machine"]
    told = [f"{key} {machine[key]}" for key in ("python", *LIBRARIES) if key in machine]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    return f"Made by `{found['command']}` on {where}: {', '.join(told)}."


def _section(folder: Path, name: str, found: dict, parts: list[Part]) -> str:
    made, _, rest = html.escape(about(found)).removeprefix("Made by `").partition("`")
    shown = "\n".join(_shown(folder, part) for part in parts)
    return f'<section id="{name}"><h2>{name}</h2>\n<p>Made by <code>{made}</code>{rest}</p>\n{shown}</section>'


def _shown(folder: Path, part: Part) -> str:
    title = html.escape(part.title)
    if isinstance(part, Picture):
        data = base64.b64encode((folder / part.file).read_bytes()).decode()
        return f'<p><img alt="{title}" src="data:image/png;base64,{data}"></p>'
    if isinstance(part, Words):
        return f"<h3>{title}</h3>" + "".join(f"<p>{html.escape(text)}</p>" for text in part.paragraphs)
    head = _row("th", part.columns)
    rows = "\n".join(_row("td", row) for row in part.rows)
    note = f'<p class="note">{html.escape(part.note)}</p>' if part.note else ""
    table = f"<table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table>"
    kind = "scroll" if part.is_short else "scroll long"
    return f'<h3>{title}</h3><div class="{kind}" tabindex="0">{table}</div>{note}'


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
