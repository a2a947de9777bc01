"""The Chinese pages say what the English ones say."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHINESE_PAGES = sorted([*ROOT.glob("*.zh-CN.md"), *(ROOT / "docs").rglob("*.zh-CN.md")])
README = ROOT / "README.zh-CN.md"

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) +(.+)$", re.MULTILINE)
COMMENT = re.compile(r"(\s+# |(?<=…)\s{2,}).*$", re.MULTILINE)
FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:\s?(?:%|[kMGT]i?B|ms|s|min|h)(?![A-Za-z]))?")
NAME = re.compile(r"[A-Z][A-Za-z]*[A-Z]", re.ASCII)  # TLS, FedAvg, …
LINK = re.compile(r"\]\(([^)\s]+)\)")


def english_page(chinese: Path) -> Path:
    return chinese.with_name(chinese.name.replace(".zh-CN", ""))


def sections(page: str) -> list[tuple[str, str, str]]:
    """Level, title and text of each section. Code blocks contain no headings."""
    masked = FENCE.sub(lambda block: "." * len(block[0]), page)
    headings = list(HEADING.finditer(masked))
    ends = [*(heading.start() for heading in headings[1:]), len(page)]
    return [(found[1], found[2], page[found.end() : end]) for found, end in zip(headings, ends, strict=True)]


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def facts(title: str, text: str, anchors: list[str]) -> dict[str, object]:
    """What a section and its translation have in common."""
    prose = FENCE.sub("```", text)

    def target(link: str) -> str:
        return f"section {anchors.index(link)}" if link in anchors else link

    return {
        "code blocks": [COMMENT.sub("", block) for block in FENCE.findall(text)],
        "figures": Counter(figure.replace(" ", "") for figure in FIGURE.findall(title + text)),
        "inline code": set(re.findall(r"`([^`\n]+)`", prose)),
        "links": Counter(target(link) for link in LINK.findall(prose)),
        "bold phrases": prose.count("**"),
        "table rows": len(re.findall(r"^\|", prose, re.MULTILINE)),
        "bullets": len(re.findall(r"^\s*(?:[*-]|\d+\.) ", prose, re.MULTILINE)),
        "paragraphs": len(re.findall(r"\S\n\n+(?=\S)", prose)),
    }


def differences(english: str, chinese: str) -> list[str]:
    """What one of two pages says and the other does not. Links to either language are the same."""
    pair = [sections(page.replace(".zh-CN", "")) for page in (english, chinese)]
    levels = [[level for level, _, _ in page] for page in pair]
    if levels[0] != levels[1]:
        return [f"headings: {levels[0]} != {levels[1]}"]
    anchors = [[anchor(title) for _, title, _ in page] for page in pair]
    found = []
    for (_, title, text), (_, chinese_title, chinese_text) in zip(*pair, strict=True):
        actual = facts(chinese_title, chinese_text, anchors[1])
        for kind, expected in facts(title, text, anchors[0]).items():
            if actual[kind] != expected:
                found.append(f"{title}: {kind}: {expected} != {actual[kind]}")
        if lost := set(NAME.findall(text)) - set(NAME.findall(chinese_text)):
            found.append(f"{title}: names: {sorted(lost)}")
    return found


def test_the_readme_and_the_tutorial_exist_in_chinese() -> None:
    assert {README, ROOT / "docs/tutorial/first-federation.zh-CN.md"} <= set(CHINESE_PAGES)


@pytest.mark.parametrize("chinese", CHINESE_PAGES, ids=lambda page: page.name)
def test_a_chinese_page_says_what_the_english_one_says(chinese: Path) -> None:
    english = english_page(chinese).read_text(encoding="utf-8")
    assert differences(english, chinese.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("chinese", CHINESE_PAGES, ids=lambda page: page.name)
def test_the_two_languages_link_to_each_other(chinese: Path) -> None:
    english = english_page(chinese)
    assert f"]({chinese.name})" in english.read_text(encoding="utf-8")
    assert f"]({english.name})" in chinese.read_text(encoding="utf-8")


def without(pattern: str) -> Callable[[str], str]:
    return lambda page: re.sub(pattern, "", page, count=1, flags=re.MULTILINE)


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda page: page.replace(old, new, 1)


def without_a_section(page: str) -> str:
    _, title, text = sections(page)[3]
    return page.replace(f"## {title}{text}", "")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (without_a_section, "headings"),
        (without(r"^## .*$"), "headings"),
        (replaced("\n## ", "\n### "), "headings"),
        (replaced("torch 2.9 ", "torch 2.8 "), "figures"),
        (replaced("缩小 29 倍", "缩小 92 倍"), "figures"),
        (without(r"^\$ fedshelf runs stop .*\n"), "code blocks"),
        (replaced("--workers 2", "--workers 4"), "code blocks"),
        (replaced("`--insecure`", "`--secure`"), "inline code"),
        (replaced("(docs/explanation/privacy-status.md)", "(docs/index.md)"), "links"),
        (replaced("(#哪些内容会离开门店)", "(#安装)"), "links"),
        (replaced("**未运行过**", "运行过"), "bold phrases"),
        (without(r"^\| macOS .*\n"), "table rows"),
        (without(r"^\* \*\*TLS .*\n"), "bullets"),
        (without(r"^请了解当前版本的局限.*\n\n"), "paragraphs"),
        (replaced("SCAFFOLD、", ""), "names"),
    ],
)
def test_the_comparison_finds_what_a_translation_lost(change: Callable[[str], str], found: str) -> None:
    chinese = README.read_text(encoding="utf-8")
    changed = change(chinese)
    assert changed != chinese
    kinds = "\n".join(differences(english_page(README).read_text(encoding="utf-8"), changed))
    assert f"{found}:" in kinds


def test_the_unit_of_a_figure_counts() -> None:
    assert differences("# A\n\n80 % of 12 MB", "# A\n\n12 MB 的 80%") == []
    assert differences("# A\n\n80 % of 12 MB", "# A\n\n12 GB 的 80") != []


def test_comments_in_code_may_be_translated() -> None:
    english = "# A\n\n```console\n$ fedshelf runs list   # what has been trained\n```\n"
    assert differences(english, english.replace("what has been trained", "训练过什么")) == []
