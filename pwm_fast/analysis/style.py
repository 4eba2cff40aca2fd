"""The style sheet of the comparison's page."""

CSS = """
:root { --ink: #1d2430; --soft: #5d6675; --line: #dfe3e9; --paper: #fff; --ground: #f4f5f7;
  --accent: #0b5a92; }
* { box-sizing: border-box; }
html { background: var(--ground); }
body { margin: 0 auto; padding: 2.2rem 1.5rem 4rem; max-width: 1200px; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .2rem; padding-top: 1.3rem;
  border-top: 2px solid var(--ink); overflow-wrap: anywhere; }
h3 { font-size: 1.02rem; margin: 0 0 .15rem; }
p { margin: .3rem 0 .7rem; max-width: 110ch; }
a { color: var(--accent); }
code { font: .88em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
.lead, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .86rem; }
nav { margin: .8rem 0 0; font-size: .92rem; }
nav a { margin-right: 1.1rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.15rem; margin: 1rem 0; }
.mind { border-left: 4px solid #d08700; }
.mind ul { margin: .35rem 0 0; padding-left: 1.2rem; }
.mind li { margin: .2rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 .4rem; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem .42rem 0; text-align: right; vertical-align: top; }
th:last-child, td:last-child { padding-right: .2rem; }
thead th { border-bottom: 1.5px solid var(--ink); font-weight: 600; vertical-align: bottom;
  line-height: 1.25; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th.text, td.text { text-align: left; }
tbody th { text-align: left; font-weight: 600; min-width: 9rem; max-width: 24rem;
  overflow-wrap: anywhere; }
.value code { overflow-wrap: break-word; }
.long { overflow-wrap: anywhere; }
.unit { display: block; font-weight: 400; color: var(--soft); font-size: .82rem; }
.ci { display: block; color: var(--soft); font-size: .82rem; white-space: nowrap; }
.key { display: flex; align-items: baseline; }
.whole { white-space: nowrap; }
.detail { display: block; color: var(--soft); font-size: .82rem; }
code.path { display: block; min-width: 14rem; }
.swatch { display: inline-block; flex: none; width: .72em; height: .72em; border-radius: 50%;
  margin-right: .5em; }
.line { flex: none; margin-right: .5em; align-self: center; }
.badge { display: inline-block; padding: 0 .5em; border-radius: 1em; font-size: .8rem;
  background: #e6f2ea; color: #17643a; white-space: nowrap; }
.badge.open { background: #fdf0d8; color: #875700; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.figures figure { margin: 0; }
.figures figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; margin: .3rem 0 .4rem; }
@media (max-width: 820px) { .figures { grid-template-columns: minmax(0, 1fr); } }
@media print { html { background: #fff; } .card { break-inside: avoid; } }
"""
