"Write README.md from nbs/index.ipynb, without Quarto."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

TOP = Path(__file__).resolve().parents[2]


def readme():
    "The text of README.md: hidden cells dropped, pictures found from the top."
    nb = nbformat.read(TOP / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:|#|/)([^)]+\.(?:jpg|png|svg))\)", r"](nbs/\1)", text)
    text = re.sub(r"\]\((?!https?:|#|/)([\w/]+)\.ipynb\)", r"](nbs/\1.ipynb)", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    (TOP / "README.md").write_text(readme(), encoding="utf-8")
