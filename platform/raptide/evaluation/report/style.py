"""How the page looks: colours of two themes, and the rules that use them.

Series are Okabe and Ito's eight colours, darker by day and lighter by night where 3:1 against the
page asks for it; text keeps 4.5:1 (WCAG 2.2, AA).
"""

from __future__ import annotations

LIGHT = {
    "page": "#ffffff",
    "raised": "#f4f6f8",
    "ink": "#1b2127",
    "muted": "#56606a",
    "rule": "#d3d9df",
    "link": "#00599c",
    "good": "#006b45",
    "bad": "#a63c00",
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#00805c",
    "c3": "#b8558f",
    "c4": "#9a7400",
    "c5": "#2a8fca",
    "c6": "#4b4f54",
    "c7": "#8a8400",
}

DARK = {
    "page": "#14181c",
    "raised": "#1e242a",
    "ink": "#e8ecef",
    "muted": "#a5b0ba",
    "rule": "#3a444d",
    "link": "#7cc0f5",
    "good": "#4fd0a0",
    "bad": "#ff9a66",
    "c0": "#4aa8e8",
    "c1": "#f0803c",
    "c2": "#22b98c",
    "c3": "#dd8fbc",
    "c4": "#e69f00",
    "c5": "#8fd0f5",
    "c6": "#c3c9ce",
    "c7": "#f0e442",
}


def variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:24px 16px 64px;max-width:1180px;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1,h2,h3,caption,figcaption{line-height:1.25;overflow-wrap:anywhere}
h1{font-size:1.75rem;margin:0 0 8px}
h2{font-size:1.35rem;margin:48px 0 8px;padding-top:12px;border-top:2px solid var(--rule)}
h3{font-size:1.08rem;margin:28px 0 6px}
p,li,dd{max-width:80ch;overflow-wrap:anywhere}
p{margin:8px 0}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:12px 0}
.skip{position:absolute;left:-9999px}
.skip:focus{position:static}
.small{color:var(--muted);font-size:.8125rem;font-weight:400}
td .small,th .small{display:block}
td .standing{white-space:normal;min-width:20ch;max-width:26ch}
.good{color:var(--good);font-weight:600}
.bad{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto;margin:12px 0;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:4px 0;font-size:.9375rem}
th,td{padding:6px 12px 6px 8px;text-align:left;vertical-align:top;
 border-bottom:1px solid var(--rule)}
td{white-space:nowrap}
td.text{white-space:normal;min-width:21ch;overflow-wrap:anywhere}
thead th{background:var(--raised);vertical-align:bottom;overflow-wrap:anywhere;max-width:30ch}
tbody th{font-weight:600;position:sticky;left:0;background:var(--page);max-width:34ch;
 min-width:20ch;overflow-wrap:break-word}
th.first{border-left:2px solid var(--rule)}
td.first{border-left:2px solid var(--rule)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));
 gap:20px 28px;margin:12px 0;align-items:start}
figure{margin:0;min-width:0}
figure:has(.wide){grid-column:1/-1}
figcaption{font-weight:600;font-size:.9375rem;margin-bottom:4px}
.drawing{overflow-x:auto}
.drawing svg{display:block;width:100%;height:auto}
.drawing.wide svg{max-width:none}
svg text{fill:var(--ink);font-size:12px}
.grid{stroke:var(--rule);fill:none}
.axis{stroke:var(--muted);fill:none}
.box{stroke:var(--rule);fill:none}
.line{fill:none;stroke-width:2}
.pixels{image-rendering:pixelated}
.swatch{width:28px;height:12px;vertical-align:-1px;margin-right:6px}
.mark{width:12px}
.scale{width:96px;height:10px;vertical-align:-1px}
.legend{list-style:none;padding:0;margin:4px 0;display:flex;flex-wrap:wrap;gap:2px 16px;
 font-size:.8125rem}
.legend li{overflow-wrap:anywhere}
details{margin:6px 0}
summary{cursor:pointer;color:var(--link);font-size:.875rem}
code,pre{font:.8125rem/1.45 ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace}
pre{background:var(--raised);padding:12px;overflow-x:auto;white-space:pre-wrap;
 overflow-wrap:anywhere}
code{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(9ch,max-content) 1fr;gap:2px 16px;font-size:.9rem}
dt{color:var(--muted)}
dd{margin:0}
.way{list-style:none;padding:0;display:flex;flex-wrap:wrap;align-items:stretch;gap:8px 0}
.way li{border:1px solid var(--rule);background:var(--raised);padding:6px 12px;font-size:.875rem}
.way li+li{margin-left:28px;position:relative}
.way li+li::before{content:"→";position:absolute;left:-22px;color:var(--muted)}
@media (max-width:560px){
 body{padding:16px 12px 48px}
 h1{font-size:1.4rem}
 tbody th{min-width:13ch;max-width:36vw}
 th,td{padding:5px 8px 5px 6px}
 dl{grid-template-columns:1fr}
 dd{margin-bottom:6px}
}
@page{margin:14mm}
@media print{
 body{max-width:none;padding:0;font-size:10pt}
 nav,.skip{display:none}
 .scroll,.drawing{overflow:visible}
 table{font-size:7.5pt}
 table .small{font-size:6.5pt}
 th,td{padding:2px 4px;position:static!important;min-width:0!important}
 td{white-space:normal}
 .drawing.wide svg{width:100%!important}
 tr,figure,.way li{break-inside:avoid}
 h2,h3,h2+p,caption{break-after:avoid}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

STYLE = (
    f":root{{color-scheme:light dark;{variables(LIGHT)}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}{RULES}"
)
"""Paper is always white."""
