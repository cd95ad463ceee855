"""The page of the gallery: a jinja2 template that is rendered with autoescape, and nothing else."""

MARK = b"<title>The worst confusions</title>"  # in every page
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>The worst confusions</title>
<style>
:root { --ink: #1a1a1a; --paper: #ffffff; --soft: #555555; --line: #d0d0d0; --card: #f6f6f8; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #16171a; --soft: #b4b4b8; --line: #3c3e44; --card: #1f2126; --link: #8ab8f0; }
}
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); }
a:focus-visible, .wide:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { position: static; }
.soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding: .5rem 0; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { overflow-wrap: normal; }
.wide { overflow-x: auto; }
@media (max-width: 40rem) { th, td { padding: .25rem .3rem; font-size: .9rem; } }
td.n { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
section { margin: 2rem 0; border-top: 1px solid var(--line); }
ul.images { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; list-style: none; }
figure { margin: 0; padding: .5rem; width: 160px; background: var(--card); border: 1px solid var(--line); }
figure img { display: block; width: 160px; height: 160px; object-fit: contain; image-rendering: auto; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: .85rem; }
</style>
</head>
<body>
<a class="skip" href="#pairs">Skip to the pairs</a>
<header>
<h1>The worst confusions</h1>
<p>{{ facts.wrong }} of {{ facts.images }} images of {{ facts.classes }} classes are given to a wrong class.
Below are the pairs of classes that lose the largest share of a class, and of each pair the mistakes that the model was
surest of.</p>
<p class="soft">Weights: <bdi>{{ source }}</bdi>. Images: <bdi>{{ data }}</bdi>.</p>
</header>
<main id="pairs">
{% if not sections %}
<p>No image is given to a wrong class.</p>
{% else %}
<div class="wide" role="region" tabindex="0" aria-label="Pairs of classes">
<table>
<caption>Pairs of classes, the worst first</caption>
<thead><tr><th scope="col" class="n">#</th><th scope="col">true class</th><th scope="col">taken for</th>
<th scope="col" class="n">images</th><th scope="col" class="n">share of the class</th>
<th scope="col" class="n">trained on</th></tr></thead>
<tbody>
{% for s in sections %}
<tr><td class="n"><a href="#pair-{{ s.number }}" aria-label="Pair {{ s.number }}">{{ s.number }}</a></td>
<th scope="row"><bdi>{{ s.true }}</bdi></th><td><bdi>{{ s.predicted }}</bdi></td><td class="n">{{ s.count }}</td>
<td class="n">{{ "%.1f" | format(100 * s.share) }} %</td><td class="n">{{ s.train_images }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% for s in sections %}
<section id="pair-{{ s.number }}" aria-labelledby="head-{{ s.number }}">
<h2 id="head-{{ s.number }}">{{ s.number }}. <bdi>{{ s.true }}</bdi>, taken for <bdi>{{ s.predicted }}</bdi></h2>
<p class="soft">{{ s.count }} images, {{ "%.1f" | format(100 * s.share) }} % of the class. Training images:
{{ s.train_images }} of the true class, {{ s.predicted_train_images }} of the other.
{% if s.left_out %}{{ s.left_out }} more are left out to keep the file small.{% endif %}</p>
<ul class="images">
{% for image in s.images %}
<li><figure>
<img src="{{ image.uri }}"{% if image.uri.startswith("data:image/png") %} class="small"{% endif %}
 width="160" height="160"
 alt="Image {{ image.key }}: of class {{ s.true }}, taken for {{ s.predicted }}">
<figcaption><bdi>{{ image.key }}</bdi><br>confidence {{ "%.1f" | format(100 * image.sure) }} %</figcaption>
</figure></li>
{% endfor %}
</ul>
</section>
{% endfor %}
{% endif %}
</main>
</body>
</html>
"""
