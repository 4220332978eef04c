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
    of_others = of_torchrun | {"port", "only", "kills", "growth", "processes", "memory", "merged", "beside", "start"}
    text = "\n".join(CODE)
    assert flags > of_others
    assert [flag for flag in flags - of_others if not re.search(rf"^    {flag}: ", text, re.M)] == []
