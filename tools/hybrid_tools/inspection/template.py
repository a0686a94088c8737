"""The page's HTML, in Jinja: what it looks like, nothing of what it says."""

from __future__ import annotations

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --paper: #ffffff; --ink: #16181d; --soft: #5b616b; --line: #d5d9df; --band: #f4f5f7; --note: #fff6e0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e6e8eb; --soft: #a2a8b2; --line: #363b44; --band: #1d2026; --note: #322a14; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
p { max-width: 46rem; }
nav a { color: inherit; margin-right: 1rem; }
.note { background: var(--note); padding: 0.6rem 0.9rem; border-radius: 0.3rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.2rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figcaption, caption, summary { color: var(--soft); font-size: 0.92rem; }
caption { text-align: left; padding-bottom: 0.3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; margin: 0.6rem 0; }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; max-width: 11rem; }
tbody tr:nth-child(even) { background: var(--band); }
th:first-child { text-align: left; }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% for remark in remarks %}
<p class="note">{{ remark }}</p>
{% endfor %}
{% if without_pictures %}
<p class="note">{{ without_pictures }}</p>
{% endif %}
{% if sections | length > 1 %}
<nav aria-label="Sections">
{% for section in sections %}
<a href="#section-{{ loop.index }}">{{ section.title }}</a>
{% endfor %}
</nav>
{% endif %}
</header>
<main>
{% if summary %}
<dl>
{% for name, value in summary.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endif %}
{% macro rows_of(table) %}
<div class="wide"><table>
{% if not table.is_long %}
<caption>{{ table.caption }}</caption>
{% endif %}
<thead><tr>{% for header in table.headers %}<th scope="col">{{ header }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
{% for section in sections %}
<section id="section-{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% if section.text %}
<p>{{ section.text }}</p>
{% endif %}
{% for name, caption in section.captions.items() if name in pictures %}
<figure role="group" aria-label="{{ caption }}">
{{ pictures[name] }}
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
{% for table in section.tables %}
{% if table.is_long %}
<details><summary>{{ table.caption }}: {{ table.rows | length }} rows</summary>
{{ rows_of(table) }}
</details>
{% else %}
{{ rows_of(table) }}
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
