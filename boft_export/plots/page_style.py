"""How pages look: narrow or wide, light or dark."""

from __future__ import annotations

from collections.abc import Iterable

from boft_export.plots.module_names import KIND_COLOURS
from boft_export.plots.panel import BAD, DOUBTFUL, GOOD, INK, LINE, MUTED, PAPER

# What stands on a page for a plot's colours.
COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    GOOD: "var(--good)",
    DOUBTFUL: "var(--doubtful)",
    BAD: "var(--bad)",
    **{colour: f"var(--k{i})" for i, colour in enumerate(KIND_COLOURS)},
}
_DARK_KINDS = ("#6fb1ff", "#f79a45", "#56cc8d", "#f7808c", "#b59cff", "#4cc6dd", "#d8b44c", "#ec8ad6", "#98a1ad")


def _variables(colours: Iterable[str]) -> str:
    return "".join(f"--k{i}:{colour};" for i, colour in enumerate(colours))


CSS = f"""
:root{{color-scheme:light dark;--back:#f5f6f8;--card:{PAPER};--ink:{INK};--muted:{MUTED};--line:{LINE};
{_variables(KIND_COLOURS)}}}
@media(prefers-color-scheme:dark){{:root{{--back:#101317;--card:#181c22;--ink:#e7eaee;--muted:#a3acb8;--line:#313843;
{_variables(_DARK_KINDS)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:1040px;margin:auto;padding:28px 20px 56px}}
h1{{font-size:1.6rem;line-height:1.25;margin:0 0 8px}}
h2{{font-size:1.15rem;margin:36px 0 12px}}
h1,p,h3,li{{overflow-wrap:anywhere}}
p{{margin:0 0 12px;max-width:70ch}}
.note{{color:var(--muted);font-size:.875rem}}
.card,figure{{background:var(--card);border:1px solid var(--line);border-radius:10px}}
.card{{overflow:hidden}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:16px}}
figure{{margin:0;padding:14px 16px 12px;min-width:0}}
h3{{font-size:1rem;margin:0 0 6px}}
@media(min-width:740px){{figure:last-child:nth-child(odd){{grid-column:1/-1;display:grid;align-items:center;
grid-template:auto auto/1fr 1fr;column-gap:32px}}figure:last-child:nth-child(odd) h3{{grid-column:1/-1}}}}
figcaption{{color:var(--muted);font-size:.875rem;margin-top:6px}}
svg{{display:block;width:100%;max-width:500px;height:auto;margin:auto;overflow:visible}}
svg *{{stroke-linejoin:round;stroke-linecap:butt}}
svg text{{font-family:inherit!important}}
.kinds{{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 14px;padding:0;list-style:none;font-size:.875rem}}
.kinds b{{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:7px;vertical-align:middle}}
.scroll{{overflow:auto}}
.tall{{max-height:85vh}}
table{{border-collapse:separate;border-spacing:0;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}}
th,td{{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}}
tbody tr:last-child>*{{border-bottom:0}}
thead th{{position:sticky;top:0;z-index:1;background:var(--card);color:var(--muted);font-weight:500;
vertical-align:bottom;line-height:1.3}}
thead.wrap th:not(:first-child){{white-space:normal;min-width:6em}}
tr>:first-child{{position:sticky;left:0;background:var(--card);text-align:left}}
thead tr>:first-child{{z-index:2}}
tbody th{{font-weight:600}}
th.module{{font-weight:400;white-space:normal;min-width:17rem;line-height:1.3;overflow-wrap:anywhere}}
td small{{color:var(--muted)}}
summary{{padding:10px 14px;cursor:pointer}}
details[open]>summary{{border-bottom:1px solid var(--line)}}
@media(max-width:560px){{main{{padding:18px 12px 40px}}h1{{font-size:1.3rem}}figure{{padding:12px 10px 10px}}
th,td{{padding:6px 9px}}th.module{{min-width:9.5rem}}}}
"""

# What a page of outcomes adds.
OUTCOME_CSS = f"""
:root{{--good:{GOOD};--doubtful:{DOUBTFUL};--bad:{BAD}}}
@media(prefers-color-scheme:dark){{:root{{--good:#55cf8e;--doubtful:#e2b33d;--bad:#ff8088}}}}
.good{{--tone:var(--good)}}.doubtful{{--tone:var(--doubtful)}}.bad{{--tone:var(--bad)}}.none{{--tone:var(--muted)}}
.outcome{{display:flex;align-items:center;gap:14px;max-width:none;margin:18px 0 14px;padding:14px 18px;font-size:1.2rem;
font-weight:650;line-height:1.3;border-left:6px solid var(--tone)}}
.mark{{flex:none;display:inline-grid;place-items:center;width:1.7em;height:1.7em;border-radius:50%;
background:var(--tone);color:var(--card);font-weight:700;line-height:1}}
.tiles{{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin:0 0 16px;padding:0;list-style:none}}
.tiles li{{padding:10px 14px;color:var(--muted);font-size:.875rem;line-height:1.3;border-top:3px solid var(--tone)}}
.tiles b{{display:block;color:var(--ink);font-size:1.5rem;font-variant-numeric:tabular-nums;line-height:1.2}}
.finding{{margin:0 0 14px;padding:14px 18px;border-left:6px solid var(--tone)}}
.finding h3{{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 10px}}
.finding h3 small{{color:var(--muted);font-weight:400}}
.hint{{max-width:none;white-space:pre-line;margin:0 0 8px}}
.finding ul{{margin:0;padding:0;list-style:none}}
.finding li{{padding:7px 0;border-top:1px solid var(--line);line-height:1.4}}
.finding li b{{font-weight:600}}.finding li span{{display:block;white-space:pre-line}}
.finding li small{{display:block;color:var(--muted);font-variant-numeric:tabular-nums}}
.finding details>summary{{padding:8px 0;border-top:1px solid var(--line)}}
td.bad,td.doubtful{{color:var(--tone);font-weight:600}}
tr>.text{{text-align:left;white-space:normal;min-width:9rem;overflow-wrap:anywhere;line-height:1.3}}
tbody th.text{{min-width:0;overflow-wrap:break-word}}
thead.checks th:nth-last-child(4),thead.checks th:last-child{{text-align:left}}
.narrow{{max-width:34rem}}.card+.note{{margin-top:10px}}
.kinds .cross{{width:auto;height:auto;color:var(--bad);line-height:1}}
@media(max-width:560px){{.tiles{{grid-template-columns:repeat(2,1fr);gap:8px}}.outcome{{padding:12px;font-size:1.05rem}}
.finding{{padding:12px}}}}
"""
