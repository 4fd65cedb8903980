"""A result as one HTML file that needs nothing besides."""

from __future__ import annotations

from html import escape

from vllm.score.perplexity.result import PerplexityResult
from vllm.score.report.characters import visible, visible_token
from vllm.score.report.losses import LossSummary
from vllm.score.report.numbers import count, significant
from vllm.score.report.table import LABELS, headline, provenance_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e6e6e6;
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .86rem;
        white-space: pre-wrap; overflow-wrap: anywhere; }
.context { color: #5f6368; } .token { color: #b3261e; font-weight: bold; }
"""


def render_page(result: PerplexityResult, summary: LossSummary, svg: str) -> str:
    """A drawing (an <svg> element), the hardest tokens in their context, figures, provenance."""
    title = headline(result).plain
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{svg}
<h2>Hardest tokens</h2>
<table><tr><th class="number">loss (nats)</th><th class="number">position</th>
<th>token, after what precedes it</th></tr>
{_hardest_rows(summary)}</table>
<h2>Figures</h2>
<table><tr><th>figure</th><th class="number">value</th><th class="number">standard error</th>
<th class="number">95 % interval</th><th>unit</th><th>convention</th></tr>
{_figure_rows(result)}</table>
<h2>Where they come from</h2>
<table>{_provenance_rows(result)}</table>
{notes}
</body></html>
"""


def _hardest_rows(summary: LossSummary) -> str:
    rows = []
    for token in summary.hardest:
        text = escape(visible_token(token.text, token.token_id))
        rows.append(
            f'<tr><td class="number">{token.loss:.3f}</td>'
            f'<td class="number">{count(token.position)}</td>'
            f'<td class="text"><span class="context">{escape(visible(token.context))}</span>'
            f'<span class="token" title="token {token.token_id}">{text}</span></td></tr>'
        )
    return "\n".join(rows)


def _figure_rows(result: PerplexityResult) -> str:
    rows = []
    for figure in result.figures:
        label = LABELS.get(figure.name, figure.name)
        error = "" if figure.standard_error is None else significant(figure.standard_error, 3)
        interval = "" if figure.interval is None else " to ".join(map(significant, figure.interval))
        convention = (
            f"{figure.convention} ({figure.variant})" if figure.variant else figure.convention
        )
        rows.append(
            f'<tr><td>{escape(label)}</td><td class="number">{significant(figure.value)}</td>'
            f'<td class="number">{error}</td><td class="number">{interval}</td>'
            f"<td>{escape(figure.unit)}</td><td>{escape(convention)}</td></tr>"
        )
    return "\n".join(rows)


def _provenance_rows(result: PerplexityResult) -> str:
    return "\n".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>"
        for key, value in provenance_rows(result)
    )
