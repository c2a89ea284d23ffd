"""Looks and the one script of the report's page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --page: #f6f7f9;
  --card: #fff; --good: #12805c; --good-soft: #d9f2e7; --warn: #92580a; --warn-soft: #fdf0d5;
  --bad: #b42318; --bad-soft: #fde2df; --mute-soft: #eaecf0; --accent: #3b63d8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --line: #2c3342;
  --page: #12151c; --card: #1a1f29; --good: #6fd3a9; --good-soft: #173a2d; --warn: #f1c177;
  --warn-soft: #40301373; --bad: #ff9d92; --bad-soft: #471e1a; --mute-soft: #2a303c; --accent: #7f9cf5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 15px; margin: 0 0 10px; }
header p { color: var(--soft); margin: 0 0 20px; max-width: 90ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 14px; } .card b { display: block; font-size: 20px; font-weight: 650; }
.card span { color: var(--soft); font-size: 12px; } .card.bad b { color: var(--warn); }
section { padding: 18px 18px 12px; margin-top: 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12px; padding: 4px 12px 6px 0;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
td.num { font-variant-numeric: tabular-nums; white-space: nowrap; } td.wide { width: 60%; }
#sites td:first-child { white-space: nowrap; } td.why { min-width: 220px; color: var(--soft); }
.bar { background: var(--mute-soft); border-radius: 4px; height: 8px; margin-top: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--good); border-radius: 4px; }
.tag { border-radius: 99px; padding: 2px 9px; font-size: 12px; white-space: nowrap;
  background: var(--mute-soft); color: var(--soft); }
.tag.applied { background: var(--good-soft); color: var(--good); }
.tag.illegal, .tag.unprofitable { background: var(--warn-soft); color: var(--warn); }
.tag.error { background: var(--bad-soft); color: var(--bad); }
.trouble { color: var(--warn); font-size: 13px; max-width: 70ch; }
summary { cursor: pointer; } summary:hover { color: var(--accent); }
details ul { margin: 6px 0 0; padding-left: 16px; color: var(--soft); }
code, pre { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--mute-soft); border-radius: 8px; padding: 12px;
  margin: 8px 0 0; }
input { width: 100%; max-width: 420px; padding: 7px 11px; margin-bottom: 10px; font: inherit; color: inherit;
  background: var(--page); border: 1px solid var(--line); border-radius: 8px; }
input:focus { outline: 2px solid var(--accent); outline-offset: -1px; }
.note, footer { color: var(--soft); font-size: 12px; } footer { margin-top: 20px; }
@media print { body { background: none; } input { display: none; } }
"""

# Every word typed must occur in a row for it to stay.
SCRIPT = """
const field = document.getElementById("filter");
if (field) field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/);
  for (const row of document.querySelectorAll("#sites tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
});
"""
