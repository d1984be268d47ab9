"""README.md and docs: their Python runs, the real parser reads their command lines, their links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpg_fast
from rpg_fast.train.cli import build_parser
from rpg_fast.train.published import batches
from rpg_fast.train.recipes import from_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROCESSES = 8  # of the table of published options
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for word, text in FENCE.findall(page.read_text()) if word == language]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in pages]


# ---------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to #{anchor}, {target.name} has {anchors(target)}"


def test_the_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, f"README.md does not link docs/{page.name}"


def test_every_picture_is_shown() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert f"images/{picture.name}" in shown, f"nothing shows docs/images/{picture.name}"


# --------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("page", named([page for page in PAGES if page.parent != ROOT and blocks(page, "python")]))
def test_python_blocks_run(page: Path) -> None:
    space: dict[str, Any] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), space)


def test_python_blocks_of_the_readme_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10))
    x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    space = {
        **{"torch": torch, "rpg_fast": rpg_fast, "model": model, "x": x, "y": y, "tail_energy": 0.1},
        **{"criterion": nn.CrossEntropyLoss(), "loader": [(x, y)] * 250, "epochs": 1},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "weights": [module.weight for module in model if isinstance(module, nn.Conv2d)],
    }
    signature, meaning, swap, pruner = blocks(ROOT / "README.md", "python")
    assert signature.startswith("rpg_fast.rank_loss(")
    for block in (meaning, swap, pruner):
        values = dict(space)
        exec(compile(block, "README.md", "exec"), values)
        if block is meaning:
            torch.testing.assert_close(values["rank_loss"], rpg_fast.rank_loss(space["weights"], 0.1))
    assert int(values["pruner"].masks.count().sum()) == round(0.02 * sum(values["pruner"].masks.layout.numels))


# -------------------------------------------------------------------------------------------------------- command lines


def commands(page: Path) -> list[str]:
    """Lines of code, and code within text, that call the program; no patterns with | or ... in them."""
    lines = "\n".join(text for word, text in FENCE.findall(page.read_text()) if word != "python")
    lines = lines.replace("\\\n", " ")
    code = [re.sub(r"\s+", " ", text) for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]
    found = [line.partition(" #")[0].strip() for line in [*lines.splitlines(), *code]]
    return [
        line
        for line in found
        if re.match(r"(rpg-fast|torchrun|python -m) ", line) and not re.search(r"\||\.\.\.", line)
    ]


def arguments_of(command: str) -> list[str] | None:
    """What the program's parser gets to see; None: the command calls something else, which must exist."""
    words = shlex.split(command)
    if words[0] == "rpg-fast":
        return words[1:]
    module = words[words.index("-m") + 1]
    assert importlib.util.find_spec(module) is not None, f"there is no module {module}: {command}"
    return words[words.index("-m") + 2 :] if module == "rpg_fast" else None


def exit_code(arguments: list[str]) -> object:
    try:
        build_parser().parse_args(arguments)
    except SystemExit as left:
        return left.code
    return 0


@pytest.mark.parametrize("page", named(PAGES))
def test_command_lines_are_read(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        arguments = arguments_of(command)
        if not arguments or arguments[0] in ("info", "--version"):
            continue
        if len(arguments) == 1:  # the name of a command, without what it needs
            arguments = [*arguments, "--help"]
        assert exit_code(arguments) == 0, f"{page.name}: {command}\n{capsys.readouterr().err}"


def test_files_in_command_lines_exist() -> None:
    for page in PAGES:
        for command in "\n".join(text for _, text in FENCE.findall(page.read_text())).split():
            if re.fullmatch(r"(benchmarks|tests|examples|docs)/[\w/.]+\.(py|sh|md)", command):
                assert (ROOT / command).exists(), f"{page.name} names {command}, which does not exist"


# ------------------------------------------------------------------------------------- the tables of docs/migrate.md


def rows(heading: str) -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "migrate.md").read_text().split(heading, 1)[1].split("\n#", 1)[0]
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    return [(left, right) for left, right in cells]


def options(command: str) -> dict[str, Any]:
    parsed: argparse.Namespace = build_parser().parse_args(["train", *shlex.split(command)])
    given = {name: value for name, value in vars(parsed).items() if name not in ("command", "name")}
    batches(given, PROCESSES)
    return {name: value for name, value in given.items() if name not in ("named", "notes")}


def test_the_published_line_is_the_recipe() -> None:
    [line] = [command for command in commands(ROOT / "docs" / "migrate.md") if "--lamb 4" in command]
    given = options(line.partition("-m rpg_fast train")[2])
    same = {name: given[name] for name in ("data", "pretrained")}
    published, recipe = (from_recipe(choice).to_dict() for choice in (given, {"recipe": "rpg-98", **same}))
    for values in (published, recipe):
        del values["recipe"], values["start_from"]  # that of a file of weights, said or not
    assert published == recipe


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(("published", "here"), rows("### Options with another name"), ids=lambda cell: cell[:40])
def test_published_options_mean_what_the_table_says(published: str, here: str) -> None:
    wanted = options(code(here)[0]) if code(here) else {}
    for command in code(published):
        assert options(command) == wanted, command


@pytest.mark.parametrize(("published", "why"), rows("### Options that are not there"), ids=lambda cell: cell[:40])
def test_published_options_that_are_gone_say_so(published: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    del why
    for command, star in re.findall(r"`([^`]+)`(\*?)", published):
        if star:
            assert options(command) == {}, command
            continue
        with pytest.raises(SystemExit):
            options(command)
        assert "is not an option here" in capsys.readouterr().err, command
