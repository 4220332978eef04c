"""What the README says of the code is still so, and it stays short."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text()
OF_TORCHRUN = {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "standalone"}


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250
    assert len(README.split()) <= 2400


def names_in(file):
    """Functions, classes and constants of a module."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        targets = getattr(node, "targets", [])
        names |= {getattr(target, "id", None) for target in targets} | {getattr(node, "name", None)}
    return names


def test_every_function_it_links_to_exists():
    """By name: a line number is wrong after the next change."""
    links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)\)", README)
    assert len(links) >= 10
    for name, file in links:
        assert name in names_in(HERE / file), f"{file} has no {name}"
    assert "#L" not in README


def test_every_file_it_links_to_exists():
    places = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert len(places) > 10
    for place in places:
        assert (HERE / place).exists(), place


def test_every_flag_it_names_exists():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", README))
    of_guard = set(re.findall(r"^    (\w+): .* = flag\(", (HERE / "guard.py").read_text(), re.M))
    scripts = [HERE / "rewards.py", *HERE.glob("scorers/*.py"), *HERE.glob("experiments/*.py")]
    of_scripts = set(re.findall(r'"--([a-z_]+)"', "".join(path.read_text() for path in scripts)))
    assert len(of_guard) > 30 and len(flags & of_guard) > 10
    assert flags - OF_TORCHRUN - of_scripts - of_guard == set()


@pytest.mark.parametrize("equation", ["Eq. 7", "Eq. 8"])
def test_its_equations_are_the_lines_of_the_code(equation):
    """Right-hand sides, without comments and spaces."""

    def lines_of(text):
        found = [line.split("#") for line in text.splitlines() if f"# {equation}" in line]
        return {code.replace("return", "").split("= ")[-1].replace(" ", "") for code, _ in found}

    of_page = lines_of(README)
    assert len(of_page) == 1 and of_page <= lines_of((HERE / "guard.py").read_text())
