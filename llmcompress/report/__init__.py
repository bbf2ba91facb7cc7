"""The model card and the report: `results.json`, made readable.

A run measures, writes what it measured to `results.json`, and is done; this package only shows it. `README.md` is a
model card for the Hub, `report.html` one page without scripts or requests to anywhere. Both can be made again from
the folder at any time, and give the same bytes.

Two rules keep them honest, and the template engine enforces both:

- A number reaches a template only as text made by `show`, which converts units and rounds but computes nothing else;
  a template that prints a bare number fails. So whatever is read here stands in `results.json`. The one exception is
  the scale of a plot (its tick labels and the places of its marks), which is drawn, not measured.
- Strings come from users (names of models, data and files) and are escaped on the way out, as HTML on the page and as
  Markdown on the card. Only `Markup`, made here, passes untouched.

Markup lives in `templates/`; what is here prepares rows of text, and for the plots shares of an axis from 0 to 1.
"""

from llmcompress.report.documents import write_report
from llmcompress.report.rows import summary_table

__all__ = ["summary_table", "write_report"]
