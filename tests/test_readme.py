"""What the README says of the code is still so."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text()
CODE = (HERE / "guard.py").read_text().splitlines()


def test_every_link_to_a_line_points_at_the_name_it_gives():
    links = re.findall(r"\[`(\w+)`\]\(guard\.py#L(\d+)\)", README)
    assert len(links) >= 10
    for name, line in links:
        assert re.match(rf"(def )?{name}\b", CODE[int(line) - 1]), f"{name} is not at line {line}"


def test_every_flag_it_names_exists():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", README))
    of_torchrun = {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint"}
    scripts = "".join(path.read_text() for path in (HERE / "rewards.py", *HERE.glob("experiments/*.py")))
    of_scripts = set(re.findall(r'"--([a-z_]+)"', scripts))
    of_guard = set(re.findall(r"^    (\w+): .* = flag\(", "\n".join(CODE), re.M))
    assert len(flags & of_guard) > 20 and flags > of_torchrun
    assert flags - of_torchrun - of_scripts - of_guard == set()
