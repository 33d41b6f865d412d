"""Packaging: everything that can change stands in settings.ini."""
import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(HERE / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
EXTRAS = ("dev", "docs", "export", "lab", "tensorboard")


def lines(text, sep="\n"):
    return [part.strip() for part in text.split(sep) if part.strip()]


class WithAssets(build_py):
    """Put notebooks, parameters and tiny checkpoints into the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        dst = Path(self.build_lib) / cfg["lib_name"] / "_assets"
        shutil.rmtree(dst, ignore_errors=True)
        for pattern in ("nbs/[0-9]*.ipynb", "nbs/params/*.yaml", "data/*.json", "data/tiny/**/*"):
            for src in sorted(HERE.glob(pattern)):
                if src.is_file():
                    out = dst / src.relative_to(HERE)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(src, out)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license=cfg["license"],
    license_files=["LICENSE", "NOTICE"],
    keywords=lines(cfg["keywords"], " "),
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=lines(cfg["requirements"]),
    extras_require={name: lines(cfg[name], ";") for name in EXTRAS},
    entry_points={"console_scripts": lines(cfg["console_script"])},
    cmdclass={"build_py": WithAssets},
    zip_safe=False,
)
