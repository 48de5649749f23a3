"""The frame and the style of a report page, and what of a text must not reach a browser as it is.

The page shows what models wrote and what files held, and both may be hostile. Two walls stand against it: all text is
escaped where the page is built, and the page's own Content Security Policy (W3C, CSP Level 3) lets a browser run no
script, send no form and fetch nothing, should an escape ever be forgotten. Escaping leaves characters that a reader
cannot see: NUL, which browsers drop, terminal controls, and the marks that turn the direction of a line, by which a
text can show other words than it has (Boucher and Anderson 2021, "Trojan Source"). They become signs that can be seen.
"""

from __future__ import annotations

import re

_SEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def visible(page: str) -> str:
    """The page with control characters, turns of direction and halves of surrogate pairs as signs that can be seen.

    None of them has a place in a page of ours, so that this is done once, to the finished page. A NUL becomes U+2400,
    its picture; what has no picture is named, as ⟨U+202E⟩.
    """
    return _SEEN.sub(lambda found: _sign(ord(found[0])), page)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser may do with the page: show it in its own style. `unsafe-inline` speaks of styles alone."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{subtitle}</header>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --series-1: #0072b2; --series-2: #c8500a; --series-3: #00805d; --series-4: #a0408f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0f1318; --ink: #e6eaef; --soft: #9aa5b1; --line: #39424d; --panel: #181e25;
    --series-1: #5ab4f0; --series-2: #ff9a52; --series-3: #3ccf9f; --series-4: #e08bd0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  overflow-wrap: anywhere; font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.subtitle, .note, .detail { color: var(--soft); } .subtitle { margin: .2rem 0 0; } .note { font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; background: var(--panel); }
.card .name { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
.card .value { font-size: 1.7rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .detail { font-size: .85rem; font-variant-numeric: tabular-nums; }
.strip { position: relative; height: .5rem; margin: .3rem 0 .4rem; border-radius: .25rem; background: var(--line); }
.strip i { position: absolute; top: 0; bottom: 0; }
.strip .band { background: var(--series-1); opacity: .55; border-radius: .2rem; }
.strip .tick { width: 2px; margin-left: -1px; top: -3px; bottom: -3px; background: var(--ink); }
.strip .chance { left: 50%; width: 1px; background: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
figcaption { font-weight: 600; font-size: .9rem; } figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; } td, th { overflow-wrap: break-word; max-width: 36rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font-size: .85rem; } summary { cursor: pointer; font-weight: 600; }
figure.broad { grid-column: 1 / -1; overflow-x: auto; } figure.broad svg { min-width: 44rem; max-width: 62rem; }
details { margin: .5rem 0; } details > *:not(summary) { margin-top: .6rem; }
.hash { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; font-size: .85em; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: .9rem; } figure { padding: .5rem .3rem; overflow-x: auto; }
  td, th { padding-right: .6rem; } }
@media print { details > pre { white-space: pre-wrap; } }
"""
